"""A detector for your own objects: images with boxes in COCO's format."""

from eqvision.losses.set_prediction import DEFORMABLE_DETR_LOSS
from eqvision.recipes.config import LoopConfig, OptimizerConfig, ScheduleConfig
from eqvision.recipes.detection_config import DetectionConfig, DetectionDataConfig, DetectorConfig


def detect() -> DetectionConfig:
    """A small Deformable DETR on your own COCO data, PATH/annotations/{train,val}.json with PATH/{train,val}/*.jpg.

    Command: eqvision train detect --data.path PATH
    Data: COCO json, with any category ids; other layouts of folders are found too (docs/detection.md), and
    `eqvision data convert` makes COCO json of YOLO and VOC folders. --data.train-split and --data.test-split name
    other splits.
    Sizes: images are fitted into --data.size HEIGHT WIDTH and keep their shape; larger sizes find smaller objects
    and take longer, in proportion to the area. --data.jitter is by how much training enlarges and shrinks them.
    Start: from scratch; from a detector's run (--init RUN, other classes are no matter); or from an image classifier,
    published (--model.name deformable_detr_r18 --init resnet18) or a run's with the same backbone (--init RUN).
    The defaults are for a few hundred photographs and a CPU. With much data and a GPU take --model.name
    deformable_detr_r50 and pretrained weights, or the recipe coco_deformable_detr_r50.
    Cost and result: docs/results.md, printed by this command.
    """
    return DetectionConfig(
        model=DetectorConfig(name="deformable_detr_small", num_queries=100, dropout=0.0),
        task=DEFORMABLE_DETR_LOSS,
        data=DetectionDataConfig(
            transform="lsj", size=(144, 192), jitter=(0.6, 1.6), color_jitter=0.3, max_objects=100
        ),
        optimizer=OptimizerConfig(
            learning_rate=4e-4,
            weight_decay=1e-4,
            clip_norm=1.0,
            learning_rate_multipliers={r"sampling_offsets|reference": 0.1},
        ),
        schedule=ScheduleConfig(warmup_steps=100),
        loop=LoopConfig(epochs=60.0, batch_size=8, eval_batch_size=8, log_every=25, eval_every=250),
    )
