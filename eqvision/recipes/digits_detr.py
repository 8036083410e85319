"""A detector on scenes of real handwritten digits, embedded, no network."""

from eqvision.losses.set_prediction import DEFORMABLE_DETR_LOSS
from eqvision.recipes.config import LoopConfig, OptimizerConfig, ScheduleConfig
from eqvision.recipes.detection_config import DetectionConfig, DetectionDataConfig, DetectorConfig


def digits_detr() -> DetectionConfig:
    """A small Deformable DETR on scenes composed of scikit-learn's handwritten digits (96x96 pixels, 1 to 6 digits).

    Command: eqvision train digits_detr
    Data: none to fetch; needs the extras [demo] and [coco].
    Cost and result: docs/results.md, printed by this command.
    """
    return DetectionConfig(
        model=DetectorConfig(name="deformable_detr_small", in_channels=1, dropout=0.0),
        task=DEFORMABLE_DETR_LOSS,
        data=DetectionDataConfig(
            kind="digits", size=(96, 96), test_split="test", flip=0.0, max_objects=6, mean=(0.3,), std=(0.2,)
        ),
        optimizer=OptimizerConfig(
            learning_rate=4e-4,
            weight_decay=1e-4,
            clip_norm=1.0,
            learning_rate_multipliers={r"sampling_offsets|reference": 0.1},
        ),
        schedule=ScheduleConfig(warmup_steps=200),
        loop=LoopConfig(epochs=8.0, batch_size=16, eval_batch_size=32, log_every=32, eval_every=512),
    )
