"""Deformable DETR on COCO as it was published."""

from eqvision.losses.set_prediction import DEFORMABLE_DETR_LOSS
from eqvision.recipes.coco_detr import COCO_DATA, EVERYTHING, FROZEN
from eqvision.recipes.config import LoopConfig, OptimizerConfig, ScheduleConfig
from eqvision.recipes.detection_config import DetectionConfig, DetectorConfig


def coco_deformable_detr_r50() -> DetectionConfig:
    """Deformable DETR with a ResNet-50 on COCO 2017, with the hyperparameters of Zhu et al. 2021.

    Command: eqvision train coco_deformable_detr_r50 --data.path COCO
    Data: COCO/annotations/instances_{train,val}2017.json, COCO/train2017/*.jpg, COCO/val2017/*.jpg.
    Published: AP 44.5 on val2017 after 50 epochs (fundamentalvision/Deformable-DETR, README; 43.8 in the paper's
    table 1, trained by other code). Other models of the README: --model.name deformable_detr_r50_refine 46.2,
    deformable_detr_r50_two_stage 46.9, deformable_detr_r50_single_scale 39.4, and its _dc5 41.5. Not run here.
    Settings are those of the published main.py: AdamW 2e-4, a tenth of it for the backbone and for the linear layers
    of sampling offsets and reference points, weight decay 1e-4 on all parameters, gradients clipped to 0.1,
    dropout 0.1, a tenth of the rates from epoch 40 on, focal loss, 300 queries, batch 32.
    Start: torchvision's ResNet-50 of 2017, which is fetched once; --init resnet50:FILE names one that is there.
    """
    return DetectionConfig(
        init="resnet50:torchvision_v1",
        model=DetectorConfig(name="deformable_detr_r50", dropout=0.1),
        task=DEFORMABLE_DETR_LOSS,
        data=COCO_DATA,
        optimizer=OptimizerConfig(
            learning_rate=2e-4,
            weight_decay=1e-4,
            weight_decays={EVERYTHING: 1e-4},
            clip_norm=0.1,
            learning_rate_multipliers={r"^backbone\.|sampling_offsets|reference": 0.1},
            freeze=FROZEN,
        ),
        schedule=ScheduleConfig(kind="step", milestones=(0.8,), factor=0.1),
        loop=LoopConfig(epochs=50.0, batch_size=32, eval_batch_size=16, log_every=50),
    )
