"""Boxes and masks on scenes of real handwritten digits, embedded, no network."""

from eqvision.losses.rcnn import DETECTRON2_LOSS
from eqvision.recipes.config import LoopConfig, OptimizerConfig, ScheduleConfig
from eqvision.recipes.detection_config import DetectionConfig, DetectionDataConfig, DetectorConfig


def digits_mask_rcnn() -> DetectionConfig:
    """A small Mask R-CNN on scenes composed of scikit-learn's handwritten digits (96x96 pixels, 1 to 6 digits).

    Command: eqvision train digits_mask_rcnn
    Data: none to fetch; needs the extras [demo] and [coco].
    Cost and result: docs/results.md, printed by this command.
    """
    return DetectionConfig(
        model=DetectorConfig(name="mask_rcnn_small", in_channels=1),
        task=DETECTRON2_LOSS,
        data=DetectionDataConfig(
            kind="digits",
            size=(96, 96),
            test_split="test",
            flip=0.0,
            max_objects=6,
            mask_crop=56,
            mean=(0.3,),
            std=(0.2,),
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=1e-4, clip_norm=1.0),
        schedule=ScheduleConfig(warmup_steps=200),
        loop=LoopConfig(epochs=8.0, batch_size=16, eval_batch_size=32, log_every=32, eval_every=512),
    )
