"""Optimizers and schedules as published runs set them, to begin a recipe from."""

from eqvision.recipes.config import OptimizerConfig, ScheduleConfig


def adafactor_vit_g() -> tuple[OptimizerConfig, ScheduleConfig]:
    """ViT-g and ViT-G on JFT-3B (Zhai et al. 2022; big_vision's ``proj/scaling_laws/train_vit_g.py``).

    Batch 16,384 and 1,000,000 steps. The head decays 100 times as fast as the rest.
    """
    optimizer = OptimizerConfig(
        name="adafactor", learning_rate=8e-4, weight_decay=0.03, weight_decays={r"^head\.linear\.weight$": 3.0}
    )
    return optimizer, ScheduleConfig(kind="rsqrt", timescale=10_000, warmup_steps=10_000, cooldown_steps=50_000)


def adafactor_stable() -> OptimizerConfig:
    """Second moments that forget faster, as UViM was trained (big_vision's ``proj/uvim``): fewer loss spikes.

    The gradient is not clipped there; its weight decay, 1e-6 in big_vision's terms, is 1e-3 in ours.
    """
    return OptimizerConfig(name="adafactor", learning_rate=1e-3, weight_decay=1e-3, beta2=0.95, clip_norm=None)
