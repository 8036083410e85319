"""DETR on COCO as it was published."""

from eqvision.losses.set_prediction import DETR_LOSS
from eqvision.recipes.config import LoopConfig, OptimizerConfig, ScheduleConfig
from eqvision.recipes.detection_config import DetectionConfig, DetectionDataConfig, DetectorConfig

FROZEN = (r"^backbone\.stem\.", r"^backbone\.stages\.0\.")
"""What DETR and Deformable DETR do not train, beside all batch norms: ``conv1`` and ``layer1``."""

EVERYTHING = r"."
"""Pattern of parameters: PyTorch's AdamW decays biases, norms and embeddings like matrices."""

COCO_DATA = DetectionDataConfig(kind="coco", transform="detr", size=(1344, 1344), flip=0.5, max_objects=100)
"""Horizontal flips; the shorter side to 480 .. 800 pixels, the longer to at most 1333, in half of the cases after a
crop. The shapes of batches are 800 x 1344, 1344 x 800 and, for crops, 1344 x 1344."""


def coco_detr_r50() -> DetectionConfig:
    """DETR with a ResNet-50 on COCO 2017, with the hyperparameters of Carion et al. 2020.

    Command: eqvision train coco_detr_r50 --data.path COCO
    Data: COCO/annotations/instances_{train,val}2017.json, COCO/train2017/*.jpg, COCO/val2017/*.jpg.
    Published: AP 42.0 on val2017 after 500 epochs (facebookresearch/detr, README; table 1 of the paper). Other models
    of the table: --model.name detr_r50_dc5 43.3; --model.name detr_r101 --init resnet101:torchvision_v1 43.5, and
    detr_r101_dc5 44.9. Not run here.
    Short schedule (the paper's ablations, the default of the published code): --loop.epochs 300
    --schedule.milestones 0.6667.
    Settings are those of the published main.py and of the paper's section A.4: AdamW 1e-4, backbone 1e-5, weight decay
    1e-4 on all parameters, gradients clipped to 0.1, dropout 0.1, batch 64 (16 cards with 4 images). On fewer devices
    --loop.accumulate cuts the batch; the README's own run of 150 epochs on 8 cards has batch 16 and gives 39.5.
    Start: torchvision's ResNet-50 of 2017, which is fetched once; --init resnet50:FILE names one that is there.
    """
    return DetectionConfig(
        init="resnet50:torchvision_v1",
        model=DetectorConfig(name="detr_r50", dropout=0.1),
        task=DETR_LOSS,
        data=COCO_DATA,
        optimizer=OptimizerConfig(
            learning_rate=1e-4,
            weight_decay=1e-4,
            weight_decays={EVERYTHING: 1e-4},
            clip_norm=0.1,
            learning_rate_multipliers={r"^backbone\.": 0.1},
            freeze=FROZEN,
        ),
        schedule=ScheduleConfig(kind="step", milestones=(0.8,), factor=0.1),
        loop=LoopConfig(epochs=500.0, batch_size=64, eval_batch_size=16, log_every=50),
    )
