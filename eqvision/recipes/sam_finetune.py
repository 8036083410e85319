"""Segment Anything on your own objects: fine-tuning on images with masks in COCO's format."""

from eqvision.recipes.config import LoopConfig, OptimizerConfig, ScheduleConfig
from eqvision.recipes.detection_config import DetectionDataConfig
from eqvision.recipes.prompted_config import PromptedConfig, PromptedLossConfig, PromptedModelConfig


def sam_finetune() -> PromptedConfig:
    """SAM ViT-B on your own COCO data, PATH/annotations/{train,val}.json with PATH/{train,val}/*.jpg.

    Command: eqvision train sam_finetune --data.path PATH --init sam_vit_b:FILE
    Data: COCO json with a segmentation (polygons or run lengths) of every object; categories are of no matter.
    Start: --init takes the official .pth, a folder of Hugging Face, or a run of this recipe.
    What learns: prompt encoder and mask decoder; the image encoder as well with --model.train-encoder and
    --optimizer.freeze without a value. It takes --optimizer.layer-decay 0.8 then, as in the paper.
    Loss and rounds of clicks: Kirillov et al. 2023, appendix A; AdamW and weight decay are theirs, the learning rate
    is a tenth of theirs, for a start from published weights.
    Cost: one image of 1024x1024 with 16 objects at a time needs a GPU; on a CPU about a minute a step.
    """
    return PromptedConfig(
        model=PromptedModelConfig(name="sam_vit_b", train_encoder=False),
        task=PromptedLossConfig(),
        data=DetectionDataConfig(
            transform="lsj", size=(1024, 1024), jitter=(0.8, 1.25), max_objects=16, keep_empty=False
        ),
        optimizer=OptimizerConfig(
            learning_rate=8e-5, weight_decay=0.1, clip_norm=0.1, freeze=(r"backbone\.", r"neck\.")
        ),
        schedule=ScheduleConfig(warmup_steps=250),
        loop=LoopConfig(epochs=10.0, batch_size=4, eval_batch_size=4, log_every=20, eval_every=500),
    )
