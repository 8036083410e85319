"""CenterNet (Objects as Points) on COCO."""

from eqvision.losses.centernet import CENTERNET_LOSS
from eqvision.recipes.config import LoopConfig, OptimizerConfig, ScheduleConfig
from eqvision.recipes.detection_config import DetectionConfig, DetectionDataConfig, DetectorConfig


def coco_centernet_r18() -> DetectionConfig:
    """CenterNet with a ResNet-18 and deformable convolutions on COCO 2017, after Zhou et al. 2019.

    Command: eqvision train coco_centernet_r18 --data.path COCO
    Data: COCO/annotations/instances_{train,val}2017.json, COCO/train2017/*.jpg, COCO/val2017/*.jpg.
    Published: AP 28.1 on val2017 after 140 epochs (xingyizhou/CenterNet, MODEL_ZOO: ctdet_coco_resdcn18). Not run
    here.
    Settings are those of its script: Adam 1.25e-4 for batches of 32, a tenth of the rate after epochs 90 and 120, no
    decay, random crops of 0.6 to 1.3 times the image's size, 512x512 pixels. Other than there, crops that reach over
    the image move it into the corner of the batch's square, colours change by up to 0.4 without the noise along
    principal axes, and crowds are left out.
    Evaluation fits each image into the same square; the published figure is of images of their own size.
    Start: torchvision's ResNet-18, which is fetched once; --init resnet18:FILE names one that is there.
    """
    return DetectionConfig(
        init="resnet18:torchvision_v1",
        model=DetectorConfig(name="centernet_r18_dcn"),
        task=CENTERNET_LOSS,
        data=DetectionDataConfig(
            kind="coco",
            transform="shifted",
            size=(512, 512),
            flip=0.5,
            color_jitter=0.4,
            max_objects=128,
            mean=(0.4703, 0.4472, 0.4079),
            std=(0.2781, 0.2741, 0.2886),
        ),
        optimizer=OptimizerConfig(name="adam", learning_rate=1.25e-4, weight_decay=0.0, clip_norm=None),
        schedule=ScheduleConfig(kind="step", milestones=(0.6429, 0.8571), factor=0.1),
        loop=LoopConfig(epochs=140.0, batch_size=32, eval_batch_size=32, log_every=50),
    )
