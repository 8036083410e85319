"""Segmenter (Strudel et al. 2021) on ADE20K as it was published."""

from eqvision.recipes.config import LoopConfig, OptimizerConfig, ScheduleConfig
from eqvision.recipes.segmentation_config import SegmentationConfig, SegmentationDataConfig, SegmenterConfig


def ade20k_segmenter_s16_mask() -> SegmentationConfig:
    """Segmenter with a ViT-S/16 and its mask transformer on ADE20K, with the hyperparameters of Strudel et al. 2021.

    Command: eqvision train ade20k_segmenter_s16_mask --data.path ADE
    Data: ADE/images/{training,validation}/*.jpg and ADE/annotations/{training,validation}/*.png, 150 classes.
    Published: mean IoU 45.3 on the validation split (rstrudel/segmenter, README, single scale). Not run here.
    Other models of the README: --model.name segmenter_vit_ti16_mask 38.1, segmenter_vit_b16_mask 48.5; _linear for the
    linear head.
    Settings are those of the published code: SGD 1e-3 with momentum 0.9 for batches of 8, no decay of weights, the
    rate falling to 0 with the power 0.9, 64 epochs, images brought to a shorter side of 512, scaled by 0.5 to 2 and
    cut to 512x512, channels in [-1, 1]. Other than there, evaluation sees whole images and not windows of 512 pixels,
    and crops may have one class only.
    Start: the ViT-S/16 of Steiner et al. 2022, which is fetched once; --init vit_s16_augreg:FILE names one.
    """
    return SegmentationConfig(
        init="vit_s16_augreg",
        model=SegmenterConfig(name="segmenter_vit_s16_mask"),
        data=SegmentationDataConfig(
            layout="ade20k",
            transform="crop",
            size=(512, 512),
            scale=(0.5, 2.0),
            shortest=512,
            flip=0.5,
            mean=(0.5,),
            std=(0.5,),
        ),
        optimizer=OptimizerConfig(name="sgd", learning_rate=1e-3, momentum=0.9, weight_decay=0.0, clip_norm=None),
        schedule=ScheduleConfig(kind="polynomial", power=0.9),
        loop=LoopConfig(epochs=64.0, batch_size=8, eval_batch_size=1, log_every=50),
    )
