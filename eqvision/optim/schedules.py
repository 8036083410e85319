"""Learning rates as functions of the step: factors, their product, and the product that a configuration asks for.

Every schedule is a pure function ``step -> rate`` of the number of updates made before (0 in the first step). It takes
a Python int or a traced integer and returns a float32 scalar, so it works in ``jax.jit`` and as ``optax.Schedule``.
Factors begin at 1 and are composed by ``product``, as the compound schedules of Scenic and big_vision are.
"""

import math

import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from eqvision.names import nearest
from eqvision.recipes.config import ScheduleConfig

Step = ArrayLike  # a whole number
Factor = Float[Array, ""]


def product(*schedules: optax.Schedule) -> optax.Schedule:
    """The product of schedules at each step. Raises ValueError for none."""
    if not schedules:
        raise ValueError("product() got no schedule; give at least one, such as product(constant(1e-3), warmup(100))")

    def rate(step: Step) -> Factor:
        value = jnp.asarray(schedules[0](step), jnp.float32)
        for schedule in schedules[1:]:
            value = value * schedule(step)
        return value

    return rate


def constant(value: float = 1.0) -> optax.Schedule:
    """The same value at every step."""
    return lambda step: jnp.full(jnp.shape(step), value, jnp.float32)


def warmup(steps: int) -> optax.Schedule:
    """``(step + 1) / steps`` up to 1: the first step moves already, the last of the warm-up has the whole rate."""
    _check_whole("warmup: steps", steps, at_least=1)
    return lambda step: jnp.minimum((jnp.asarray(step, jnp.float32) + 1) / steps, 1.0)


def cooldown(total_steps: int, steps: int) -> optax.Schedule:
    """1, and a line to 0 over the last ``steps`` (Zhai et al. 2022, section 3.5); the last step still moves."""
    _check_whole("cooldown: steps", steps, at_least=1)
    return lambda step: jnp.clip((total_steps - jnp.asarray(step, jnp.float32)) / steps, 0.0, 1.0)


def linear(total_steps: int, *, start: int = 0, end_fraction: float = 0.0) -> optax.Schedule:
    """A line from 1 at step ``start`` to ``end_fraction`` at ``total_steps``."""
    return polynomial(total_steps, start=start, power=1.0, end_fraction=end_fraction)


def polynomial(total_steps: int, *, start: int = 0, power: float = 2.0, end_fraction: float = 0.0) -> optax.Schedule:
    """``(1 - progress) ** power`` from 1 at step ``start`` to ``end_fraction`` at ``total_steps``."""
    _check_end_fraction(end_fraction)
    if not 0 < power < math.inf:
        raise ValueError(f"polynomial: power is {power}; expected a positive number, such as 2")

    def rate(step: Step) -> Factor:
        left = 1 - _progress(step, start, total_steps)
        return end_fraction + (1 - end_fraction) * (left if power == 1 else left**power)

    return rate


def cosine(total_steps: int, *, start: int = 0, end_fraction: float = 0.0) -> optax.Schedule:
    """Half a cosine from 1 at step ``start`` to ``end_fraction`` at ``total_steps`` (Loshchilov & Hutter 2017)."""
    return cosine_restarts(total_steps, start=start, num_cycles=1, end_fraction=end_fraction)


def cosine_restarts(
    total_steps: int, *, start: int = 0, num_cycles: int = 3, end_fraction: float = 0.0
) -> optax.Schedule:
    """``num_cycles`` equal half cosines, each from 1 to ``end_fraction`` (SGDR, Loshchilov & Hutter 2017)."""
    _check_end_fraction(end_fraction)
    _check_whole("cosine_restarts: num_cycles", num_cycles, at_least=1)

    span = max(1, total_steps - start)

    def rate(step: Step) -> Factor:
        since = jnp.clip(jnp.asarray(step) - start, 0, span)
        # In whole numbers: rounding must not put the first step of a cycle at the end of the one before.
        within = jnp.where(since == span, span, since * num_cycles % span)
        return end_fraction + (1 - end_fraction) * 0.5 * (1 + jnp.cos(jnp.pi * (within / span)))

    return rate


def step_decay(total_steps: int, *, milestones: tuple[float, ...] = (0.5, 0.75), factor: float = 0.1) -> optax.Schedule:
    """``factor`` to the power of the milestones passed; a milestone is a share of ``total_steps``, rounded.

    Raises ValueError unless the milestones rise and lie in (0, 1).
    """
    rising = list(milestones) == sorted(set(milestones))
    if not milestones or not rising or any(not 0 < share < 1 for share in milestones):
        raise ValueError(
            f"step_decay: milestones are {milestones}; expected rising shares of the run in (0, 1), such as (0.5, 0.75)"
        )
    if not 0 < factor < math.inf:
        raise ValueError(f"step_decay: factor is {factor}; expected a positive number, such as 0.1")
    boundaries = np.asarray([round(share * total_steps) for share in milestones])
    return lambda step: jnp.float32(factor) ** jnp.sum(jnp.asarray(step) >= boundaries)


def rsqrt(*, start: int = 0, timescale: int = 10_000) -> optax.Schedule:
    """``sqrt(timescale / (timescale + step - start))``, 1 before ``start`` (Zhai et al. 2022, section 3.5)."""
    _check_whole("rsqrt: timescale", timescale, at_least=1)

    def rate(step: Step) -> Factor:
        since = jnp.maximum(jnp.asarray(step, jnp.float32) - start, 0.0)
        return jnp.sqrt(timescale / (timescale + since))

    return rate


def make_schedule(config: ScheduleConfig, peak: float, total_steps: int) -> optax.Schedule:
    """Learning rate of a step: ``peak`` times warm-up times ``config.kind`` times cooldown; factors of 1 are left out.

    ``kind`` runs from the end of the warm-up to ``total_steps``; the cooldown multiplies its last steps. Milestones
    are shares of the whole run. Raises ValueError, naming the option, for values that make no sense together.
    """
    _check(config, peak, total_steps)
    factors = [constant(peak)]
    if config.warmup_steps:
        factors.append(warmup(config.warmup_steps))
    if config.kind != "constant":
        factors.append(_kind(config, total_steps))
    if config.cooldown_steps:
        factors.append(cooldown(total_steps, config.cooldown_steps))
    return product(*factors)


def _kind(config: ScheduleConfig, total_steps: int) -> optax.Schedule:
    start, end = config.warmup_steps, config.end_fraction
    match config.kind:
        case "linear":
            return linear(total_steps, start=start, end_fraction=end)
        case "cosine":
            return cosine(total_steps, start=start, end_fraction=end)
        case "cosine_restarts":
            return cosine_restarts(total_steps, start=start, num_cycles=config.num_cycles, end_fraction=end)
        case "polynomial":
            return polynomial(total_steps, start=start, power=config.power, end_fraction=end)
        case "step":
            return step_decay(total_steps, milestones=config.milestones, factor=config.factor)
        case "rsqrt":
            return rsqrt(start=start, timescale=config.timescale)
    kinds = ["constant", "linear", "cosine", "cosine_restarts", "polynomial", "step", "rsqrt"]
    raise nearest(config.kind, kinds, "--schedule.kind")


def _progress(step: Step, start: int, total_steps: int) -> Factor:
    """0 up to ``start``, 1 from ``total_steps`` on."""
    since = jnp.asarray(step, jnp.float32) - start
    return jnp.clip(since / max(1, total_steps - start), 0.0, 1.0)


def _check(config: ScheduleConfig, peak: float, total_steps: int) -> None:
    if not 0 <= peak < math.inf:
        raise ValueError(f"--optimizer.learning-rate is {peak}; expected a finite rate of at least 0, such as 1e-3")
    _check_whole("the number of training steps", total_steps, at_least=1)
    _check_whole("--schedule.warmup-steps", config.warmup_steps, at_least=0)
    _check_whole("--schedule.cooldown-steps", config.cooldown_steps, at_least=0)


def _check_whole(what: str, value: int, *, at_least: int) -> None:
    if value != int(value) or value < at_least:
        raise ValueError(f"{what} is {value}; expected a whole number of at least {at_least}")


def _check_end_fraction(value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"schedule: end_fraction is {value}; expected a share of the peak in [0, 1]")
