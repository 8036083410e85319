"""Faster and Mask R-CNN on COCO by the usual schedules."""

import dataclasses

from eqvision.losses.rcnn import MMDET_LOSS
from eqvision.recipes.coco_detr import EVERYTHING, FROZEN
from eqvision.recipes.config import LoopConfig, OptimizerConfig, ScheduleConfig
from eqvision.recipes.detection_config import DetectionConfig, DetectionDataConfig, DetectorConfig


def coco_mask_rcnn_r50_fpn() -> DetectionConfig:
    """Mask R-CNN with a ResNet-50 and a feature pyramid on COCO 2017, by the 1x schedule (12 epochs).

    Command: eqvision train coco_mask_rcnn_r50_fpn --data.path COCO
    Data: COCO/annotations/instances_{train,val}2017.json, COCO/train2017/*.jpg, COCO/val2017/*.jpg.
    Published: box AP 38.2 and mask AP 34.7 on val2017 (mmdetection's model zoo, mask_rcnn_r50_fpn, 1x). Not run here.
    3x schedule: --loop.epochs 36 --schedule.milestones 0.75 0.9167 --data.scales 640 672 704 736 768 800.
    Settings are those of mmdetection's configuration: SGD 0.02 with momentum 0.9 for batches of 16, warm-up over 500
    steps, weight decay 1e-4 on all parameters, a tenth of the rate after epochs 8 and 11, one scale of 800 pixels (at
    most 1333), flips, images without objects left out. Other than there, scales and shifts of the backbone's batch
    norms are fixed with their statistics. The gradient is not clipped.
    Rules of other libraries: --model.dialect torchvision or detectron2. The latter's ResNet needs weights of its own
    kind (MSRA), as are those of a published detector: --init mask_rcnn_r50_fpn:FILE.
    Start: torchvision's ResNet-50 of 2017, which is fetched once; --init resnet50:FILE names one that is there.
    """
    return DetectionConfig(
        init="resnet50:torchvision_v1",
        model=DetectorConfig(name="mask_rcnn_r50_fpn", dialect="mmdet"),
        task=MMDET_LOSS,
        data=DetectionDataConfig(
            kind="coco",
            transform="resize",
            size=(1344, 1344),
            scales=(800,),
            flip=0.5,
            max_objects=100,
            keep_empty=False,
        ),
        optimizer=OptimizerConfig(
            name="sgd",
            learning_rate=0.02,
            momentum=0.9,
            weight_decay=1e-4,
            weight_decays={EVERYTHING: 1e-4},
            clip_norm=None,
            freeze=FROZEN,
        ),
        schedule=ScheduleConfig(kind="step", warmup_steps=500, milestones=(0.6667, 0.9167), factor=0.1),
        loop=LoopConfig(epochs=12.0, batch_size=16, eval_batch_size=16, log_every=50),
    )


def coco_faster_rcnn_r50_fpn() -> DetectionConfig:
    """Faster R-CNN with a ResNet-50 and a feature pyramid on COCO 2017, by the 1x schedule (12 epochs).

    Command: eqvision train coco_faster_rcnn_r50_fpn --data.path COCO
    Data, settings and start: as coco_mask_rcnn_r50_fpn; segmentations are not needed.
    Published: box AP 37.4 on val2017 (mmdetection's model zoo, faster_rcnn_r50_fpn, 1x). Not run here.
    """
    config = coco_mask_rcnn_r50_fpn()
    return dataclasses.replace(config, model=DetectorConfig(name="faster_rcnn_r50_fpn", dialect="mmdet"))
