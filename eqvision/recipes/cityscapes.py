"""DeepLabV3+ on Cityscapes by a usual schedule."""

from eqvision.recipes.config import LoopConfig, OptimizerConfig, ScheduleConfig
from eqvision.recipes.segmentation_config import SegmentationConfig, SegmentationDataConfig, SegmenterConfig


def cityscapes_deeplabv3plus_r50() -> SegmentationConfig:
    """DeepLabV3+ with a ResNet-50 on Cityscapes, 19 classes.

    Command: eqvision train cityscapes_deeplabv3plus_r50 --data.path CITYSCAPES
    Data: CITYSCAPES/leftImg8bit/{train,val}/CITY/*.png and CITYSCAPES/gtFine/{train,val}/CITY/*.png, as published.
    Settings: SGD 0.01 with momentum 0.9 for batches of 8, weight decay 5e-4, the rate falling to 0 with the power 0.9
    over 80,000 steps, images scaled by 0.5 to 2 and cut to 512x1024. They are common ones and follow no single
    publication. Not run here. Other models: --model.name upernet_r50, fcn_r50, deeplabv3_r50.
    Start: torchvision's ResNet-50 of 2017, which is fetched once; --init resnet50:FILE names one that is there.
    """
    return SegmentationConfig(
        init="resnet50:torchvision_v1",
        model=SegmenterConfig(name="deeplabv3plus_r50"),
        data=SegmentationDataConfig(
            layout="cityscapes", transform="crop", size=(512, 1024), scale=(0.5, 2.0), flip=0.5, color_jitter=0.4
        ),
        optimizer=OptimizerConfig(name="sgd", learning_rate=0.01, momentum=0.9, weight_decay=5e-4, clip_norm=None),
        schedule=ScheduleConfig(kind="polynomial", power=0.9),
        loop=LoopConfig(epochs=215.0, batch_size=8, eval_batch_size=1, log_every=50),
    )
