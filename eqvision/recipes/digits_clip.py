"""CLIP on real handwritten digits and sentences about them, embedded, no network."""

from eqvision.recipes.config import LoopConfig, OptimizerConfig, ScheduleConfig
from eqvision.recipes.contrastive_config import ClipModelConfig, ContrastiveConfig, PairsDataConfig, TokenizerConfig


def digits_clip() -> ContrastiveConfig:
    """A small CLIP, from scratch, on scikit-learn's handwritten digits (8x8 pixels) with a sentence about each.

    Command: eqvision train digits_clip
    Data: none to fetch; needs the extras [demo] and [text]. Eight sentences about each digit, such as "the number
    three, written by hand" and "this is a 3"; a vocabulary of whole words is made of them.
    Use: eqvision predict runs/digits_clip IMAGE
    Cost and result: docs/results.md, printed by this command. Zero-shot accuracy is that on the test images, whose
    classes are asked for with sentences that no caption has.
    """
    return ContrastiveConfig(
        model=ClipModelConfig(name="clip_tiny", image_size=8, in_channels=1, length=12),
        data=PairsDataConfig(kind="digits", test_split="test", transform="digits", mean=(0.3,), std=(0.35,)),
        tokenizer=TokenizerConfig(kind="wordpiece", size=256),
        optimizer=OptimizerConfig(learning_rate=4e-3, weight_decay=0.1, beta2=0.98, eps=1e-6),
        schedule=ScheduleConfig(warmup_steps=100),
        loop=LoopConfig(epochs=30.0, batch_size=64, eval_batch_size=120, log_every=20, eval_every=110),
    )
