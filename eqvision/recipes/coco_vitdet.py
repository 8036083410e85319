"""Mask R-CNN with a plain vision transformer (ViTDet) on COCO as it was published."""

from eqvision.losses.rcnn import DETECTRON2_LOSS
from eqvision.recipes.config import LoopConfig, OptimizerConfig, ScheduleConfig
from eqvision.recipes.detection_config import DetectionConfig, DetectionDataConfig, DetectorConfig


def coco_vitdet_b() -> DetectionConfig:
    """Mask R-CNN with ViTDet-B on COCO 2017, with the hyperparameters of Li et al. 2022.

    Command: eqvision train coco_vitdet_b --data.path COCO
    Data: COCO/annotations/instances_{train,val}2017.json, COCO/train2017/*.jpg, COCO/val2017/*.jpg.
    Published: box AP 51.6 and mask AP 45.9 on val2017 after 100 epochs (detectron2's projects/ViTDet). Not run here.
    Settings are those of its configuration: AdamW 1e-4 with layer decay 0.7, weight decay 0.1 but none on positions
    and norms, stochastic depth 0.1, batch 64, warm-up over 250 steps, a tenth of the rate after 88.9 % and 96.3 % of
    the steps; large-scale jitter 0.1 to 2 into 1024x1024 pixels. Other than there, the tables of relative positions do
    not decay.
    Start: the published run starts from a ViT-B pre-trained as a masked autoencoder, which cannot be loaded into this
    model yet: it starts fresh here, or from a published detector (--init mask_rcnn_vitdet_b:FILE).
    """
    return DetectionConfig(
        model=DetectorConfig(name="mask_rcnn_vitdet_b"),
        task=DETECTRON2_LOSS,
        data=DetectionDataConfig(
            kind="coco", transform="lsj", size=(1024, 1024), jitter=(0.1, 2.0), flip=0.5, keep_empty=False
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-4,
            weight_decay=0.1,
            weight_decays={r"backbone\.position": 0.0},
            clip_norm=1.0,
            layer_decay=0.7,
        ),
        schedule=ScheduleConfig(kind="step", warmup_steps=250, milestones=(0.8889, 0.963), factor=0.1),
        loop=LoopConfig(epochs=100.0, batch_size=64, eval_batch_size=16, compute_dtype="bfloat16", log_every=50),
    )
