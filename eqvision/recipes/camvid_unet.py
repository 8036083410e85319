"""A U-Net on road scenes, or on your own images with a class for each pixel."""

from eqvision.recipes.config import LoopConfig, OptimizerConfig, ScheduleConfig
from eqvision.recipes.segmentation_config import SegmentationConfig, SegmentationDataConfig, SegmenterConfig


def camvid_unet() -> SegmentationConfig:
    """A small U-Net on CamVid or your own data: PATH/{train,val}/*.jpg with PATH/{train,val}_labels/*.png.

    Command: eqvision train camvid_unet --data.path PATH
    Data: label pictures hold a class index in each pixel, 255 where there is none; --data.void 11 names other values
    that are no class (the void of CamVid in 11 classes). PATH/classes.txt may name the classes, a line each. Other
    layouts of folders are found too: docs/segmentation.md.
    Cost and result: docs/results.md, printed by this command.
    """
    return SegmentationConfig(
        model=SegmenterConfig(name="unet_small"),
        data=SegmentationDataConfig(
            void=(11,), transform="crop", size=(192, 256), scale=(0.6, 1.5), flip=0.5, color_jitter=0.2
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, weight_decay=1e-4, clip_norm=1.0),
        schedule=ScheduleConfig(warmup_steps=50),
        loop=LoopConfig(epochs=30.0, batch_size=8, eval_batch_size=5, log_every=22, eval_every=220),
    )
