"""Boxes and masks of your own objects: images with segmentations in COCO's format."""

from eqvision.losses.rcnn import DETECTRON2_LOSS
from eqvision.recipes.config import LoopConfig, OptimizerConfig, ScheduleConfig
from eqvision.recipes.detection_config import DetectionConfig, DetectionDataConfig, DetectorConfig


def instances() -> DetectionConfig:
    """A small Mask R-CNN on your own COCO data, PATH/annotations/{train,val}.json with PATH/{train,val}/*.jpg.

    Command: eqvision train instances --data.path PATH
    Data: COCO json with a segmentation (polygons or run lengths) of every object, and any category ids.
    --data.train-split and --data.test-split name other splits.
    Sizes: images are fitted into --data.size HEIGHT WIDTH and keep their shape; enlarge them where objects are
    smaller than 10 pixels, at a cost in proportion to the area. --data.jitter is by how much training enlarges and
    shrinks them.
    Start: from scratch, or from a run of this recipe (--init RUN, other classes are no matter). The defaults are for
    a few hundred images and a CPU. With much data and a GPU take the recipe coco_mask_rcnn_r50_fpn.
    Cost and result: docs/results.md, printed by this command.
    """
    return DetectionConfig(
        model=DetectorConfig(name="mask_rcnn_small"),
        task=DETECTRON2_LOSS,
        data=DetectionDataConfig(
            transform="lsj",
            size=(256, 256),
            jitter=(0.7, 1.5),
            color_jitter=0.2,
            max_objects=100,
            mask_crop=28,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=1e-4, clip_norm=1.0),
        schedule=ScheduleConfig(warmup_steps=100),
        loop=LoopConfig(epochs=60.0, batch_size=8, eval_batch_size=8, log_every=15, eval_every=150),
    )
