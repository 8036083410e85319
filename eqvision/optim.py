"""The optimizer of a run: optax transformations from the configuration."""

import jax
import optax
from jaxtyping import Array, PyTree

from eqvision.recipes.config import OptimizerConfig, ScheduleConfig


def make_schedule(config: ScheduleConfig, peak: float, total_steps: int) -> optax.Schedule:
    """Learning rate of a step: linear warm-up, then what the configuration says, ending at ``total_steps``."""
    rest = max(1, total_steps - config.warmup_steps)
    after = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
    }[config.kind]
    if config.warmup_steps == 0:
        return after
    # The first step already moves: its rate is peak / warmup_steps and not zero.
    rise = optax.linear_schedule(peak / config.warmup_steps, peak, max(1, config.warmup_steps - 1))
    return optax.join_schedules([rise, after], [config.warmup_steps])


def decay_mask(params: PyTree[Array]) -> PyTree[bool]:
    """True where weight decay applies: matrices and convolutions, not biases, scales, tokens and positions."""
    return jax.tree.map_with_path(lambda path, leaf: _is_matrix(path, leaf), params)


def _is_matrix(path: tuple, leaf: Array) -> bool:
    names = [getattr(part, "name", "") for part in path]
    stacked = "blocks" in names or "rest" in names  # a scanned stack adds an axis to every parameter
    return names[-1] == "weight" and "position" not in names and leaf.ndim - stacked >= 2


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Clip, then AdamW, or SGD with L2 decay and Nesterov momentum."""
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    if config.name == "adamw":
        update = optax.adamw(
            schedule, b1=config.momentum, b2=config.beta2, weight_decay=config.weight_decay, mask=decay_mask
        )
    else:
        update = optax.chain(
            optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
            optax.sgd(schedule, momentum=config.momentum, nesterov=True),
        )
    return optax.chain(clip, update)
