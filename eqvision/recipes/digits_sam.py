"""Masks for clicks and boxes on scenes of real handwritten digits, embedded, no network."""

from eqvision.recipes.config import LoopConfig, OptimizerConfig, ScheduleConfig
from eqvision.recipes.detection_config import DetectionDataConfig
from eqvision.recipes.prompted_config import PromptedConfig, PromptedLossConfig, PromptedModelConfig


def digits_sam() -> PromptedConfig:
    """A small Segment Anything, from scratch, on scenes composed of scikit-learn's handwritten digits (96x96 pixels).

    Command: eqvision train digits_sam
    Data: none to fetch; needs the extra [demo].
    Use: eqvision predict runs/digits_sam IMAGE --prompt-points X Y 1
    Cost and result: docs/results.md, printed by this command.
    """
    return PromptedConfig(
        model=PromptedModelConfig(name="sam_small"),
        task=PromptedLossConfig(points=2, clicks=3),
        data=DetectionDataConfig(kind="digits", size=(96, 96), test_split="test", flip=0.0, max_objects=6),
        optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=1e-2, clip_norm=1.0),
        schedule=ScheduleConfig(warmup_steps=100),
        loop=LoopConfig(epochs=3.0, batch_size=16, eval_batch_size=32, log_every=32, eval_every=512),
    )
