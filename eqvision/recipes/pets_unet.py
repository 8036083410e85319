"""A U-Net on the trimaps of pets."""

from eqvision.recipes.config import LoopConfig, OptimizerConfig, ScheduleConfig
from eqvision.recipes.segmentation_config import SegmentationConfig, SegmentationDataConfig, SegmenterConfig


def pets_unet() -> SegmentationConfig:
    """A small U-Net on the Oxford-IIIT Pet trimaps: pet, background and the border between them.

    Command: eqvision train pets_unet --data.path PETS
    Data: PETS/images/*.jpg, PETS/annotations/trimaps/*.png and the lists PETS/annotations/{trainval,test}.txt, as
    published. Training takes trainval.
    Settings are of our own making, and were not run on these data.
    """
    return SegmentationConfig(
        model=SegmenterConfig(name="unet_small"),
        data=SegmentationDataConfig(
            layout="pets", test_split="test", transform="fixed", size=(192, 192), flip=0.5, color_jitter=0.2
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, weight_decay=1e-4, clip_norm=1.0),
        schedule=ScheduleConfig(warmup_steps=100),
        loop=LoopConfig(epochs=20.0, batch_size=16, eval_batch_size=16, log_every=20),
    )
