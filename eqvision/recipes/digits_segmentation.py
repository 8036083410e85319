"""A class for each pixel of scenes of real handwritten digits, embedded, no network."""

from eqvision.recipes.config import LoopConfig, OptimizerConfig, ScheduleConfig
from eqvision.recipes.segmentation_config import SegmentationConfig, SegmentationDataConfig, SegmenterConfig


def digits_segmentation() -> SegmentationConfig:
    """A small U-Net on scenes composed of scikit-learn's handwritten digits (96x96 pixels, 1 to 6 digits).

    Command: eqvision train digits_segmentation
    Data: none to fetch; needs the extra [demo].
    Cost and result: docs/results.md, printed by this command.
    """
    return SegmentationConfig(
        model=SegmenterConfig(name="unet_tiny", in_channels=1),
        data=SegmentationDataConfig(
            kind="digits",
            test_split="test",
            transform="fixed",
            size=(96, 96),
            flip=0.0,
            mean=(0.3,),
            std=(0.2,),
        ),
        optimizer=OptimizerConfig(learning_rate=5e-3, weight_decay=1e-4, clip_norm=1.0),
        schedule=ScheduleConfig(warmup_steps=30),
        loop=LoopConfig(epochs=3.5, batch_size=16, eval_batch_size=32, log_every=32, eval_every=256),
    )
