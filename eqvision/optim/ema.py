"""The exponential moving average of the parameters, which is what a run evaluates where it keeps one."""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

Params = TypeVar("Params", bound=PyTree[Array])


def ema_decay(decay: float, step: int | Int[Array, ""], warmup: bool = True) -> Float[Array, ""]:
    """The decay of the update that follows ``step`` updates: ``min(decay, (1 + step) / (10 + step))`` with ``warmup``.

    The smaller decay lets the average leave the initial parameters quickly (TensorFlow's
    ``ExponentialMovingAverage(num_updates)``): 0.1 in the first update, 0.9 after 80. Raises ValueError unless
    ``decay`` lies in [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"--optimizer.ema is {decay}; expected a decay in [0, 1), such as 0.9999")
    if not warmup:
        return jnp.float32(decay)
    number = jnp.asarray(step, jnp.float32)
    return jnp.minimum(decay, (1 + number) / (10 + number))


def update_ema(ema: Params, params: Params, decay: float | Float[Array, ""]) -> Params:
    """``decay * ema + (1 - decay) * params``, leaf by leaf, in the average's type.

    Written as a step towards ``params``, so that parameters which do not change (frozen ones) stay equal bit for bit.
    """

    def leaf(average: Array, value: Array) -> Array:
        return average + ((1 - decay) * (value.astype(average.dtype) - average)).astype(average.dtype)

    return jax.tree.map(leaf, ema, params)
