"""Batch normalisation (Ioffe and Szegedy 2015), batched, channels last, with ``torch.nn.BatchNorm2d``'s numbers."""

import functools
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from eqvision.ops.collectives import DATA_AXES, global_sum, vary_like, varying_axes

Channels = Float[Array, " c"]


def _global_count(x: Float[Array, "... c"], axes: tuple[str, ...]) -> int:
    return math.prod(x.shape[:-1]) * math.prod(lax.axis_size(axis) for axis in axes)


def _mean_variance(x: Float[Array, "... c"], axes: tuple[str, ...]) -> tuple[Channels, Channels]:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    count, leading = _global_count(x, axes), tuple(range(x.ndim - 1))
    mean = global_sum(jnp.sum(wide, axis=leading), axes) / count
    # Two passes: E[x^2] - E[x]^2 loses all digits where the mean is large against the spread.
    variance = global_sum(jnp.sum(jnp.square(wide - mean), axis=leading), axes) / count
    return mean, variance


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def batch_norm(
    x: Float[Array, "... c"], weight: Channels, bias: Channels, eps: float, axes: tuple[str, ...]
) -> tuple[Float[Array, "... c"], Channels, Channels]:
    """Normalise with the batch's own statistics; returns the output, the mean and the biased variance.

    ``axes`` are the mesh axes over which the batch is split. Reverse mode only; no gradient flows
    into the returned statistics.
    """
    return _batch_norm_forward(x, weight, bias, eps, axes)[0]


def _batch_norm_forward(x, weight, bias, eps, axes):
    mean, variance = _mean_variance(x, axes)
    rstd = lax.rsqrt(variance + eps)
    scale = weight * rstd
    y = (x * scale + (bias - mean * scale)).astype(x.dtype)
    return (y, mean, variance), (x, weight, bias, mean, rstd)


def _batch_norm_backward(eps, axes, saved, cotangents):
    x, weight, bias, mean, rstd = saved
    g = cotangents[0].astype(rstd.dtype)
    leading = tuple(range(x.ndim - 1))
    g_bias = jnp.sum(g, axis=leading)
    g_weight = jnp.sum(g * (x - mean), axis=leading) * rstd
    count = _global_count(x, axes)
    # dx = weight * rstd * (g - mean(g) - normed * mean(g * normed)), folded into one multiply-add each of g and x.
    slope = global_sum(g_weight, axes) * rstd / count
    offset = global_sum(g_bias, axes) / count - slope * mean
    g_x = (weight * rstd) * (g - slope * x - offset)
    return g_x.astype(x.dtype), g_weight.astype(weight.dtype), g_bias.astype(bias.dtype)


batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)


class BatchNorm(eqx.Module):
    """Batch normalisation over all axes but the last; running mean and variance live in ``eqx.nn.State``.

    In training the statistics are those of the global batch: inside ``jax.shard_map`` they are summed over
    those of ``axis_names`` over which the input varies (``shard_map`` must keep its checks on), under plain
    ``jit`` XLA does it. ``momentum`` is the weight of the newest batch, as in torch (0.1); the running
    variance is the unbiased one, as in torch.
    """

    weight: Channels
    bias: Channels
    stats: eqx.nn.StateIndex
    eps: float = eqx.field(static=True)
    momentum: float = eqx.field(static=True)
    axis_names: tuple[str, ...] = eqx.field(static=True)

    def __init__(
        self,
        features: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        weight_init: float = 1.0,
        axis_names: tuple[str, ...] = DATA_AXES,
    ):
        self.weight = jnp.full((features,), weight_init, jnp.float32)
        self.bias = jnp.zeros((features,))
        self.stats = eqx.nn.StateIndex((jnp.zeros((features,)), jnp.ones((features,))))
        self.eps = eps
        self.momentum = momentum
        self.axis_names = axis_names

    def __call__(
        self, x: Float[Array, "b ... c"], state: eqx.nn.State, *, train: bool = False
    ) -> tuple[Float[Array, "b ... c"], eqx.nn.State]:
        if not train:
            mean, variance = state.get(self.stats)
            return _normalise(x, mean, variance, self.weight, self.bias, self.eps), state
        axes = varying_axes(x, self.axis_names)
        weight, bias = vary_like((self.weight, self.bias), x)
        outputs: Any = batch_norm(x, weight, bias, self.eps, axes)  # a custom_vjp object has no type of its own
        y, mean, variance = outputs
        return y, state.set(self.stats, self._updated(state, mean, variance, _global_count(x, axes)))

    def _updated(
        self, state: eqx.nn.State, mean: Channels, variance: Channels, count: int
    ) -> tuple[Channels, Channels]:
        old_mean, old_variance = state.get(self.stats)
        unbiased = variance * (count / max(count - 1, 1))
        mix = lambda old, new: (1 - self.momentum) * old + self.momentum * lax.stop_gradient(new)  # noqa: E731
        return mix(old_mean, mean), mix(old_variance, unbiased)


class FrozenBatchNorm(eqx.Module):
    """Batch normalisation with fixed statistics, as detectors use it; nothing of it is trained."""

    weight: Channels
    bias: Channels
    running_mean: Channels
    running_var: Channels
    eps: float = eqx.field(static=True)

    def __init__(self, features: int, *, eps: float = 1e-5):
        self.weight = jnp.ones((features,))
        self.bias = jnp.zeros((features,))
        self.running_mean = jnp.zeros((features,))
        self.running_var = jnp.ones((features,))
        self.eps = eps

    def __call__(
        self, x: Float[Array, "b ... c"], state: eqx.nn.State, *, train: bool = False
    ) -> tuple[Float[Array, "b ... c"], eqx.nn.State]:
        fixed = lax.stop_gradient((self.running_mean, self.running_var, self.weight, self.bias))
        return _normalise(x, *fixed, eps=self.eps), state


def _normalise(
    x: Float[Array, "... c"], mean: Channels, variance: Channels, weight: Channels, bias: Channels, eps: float
) -> Float[Array, "... c"]:
    scale = weight * lax.rsqrt(variance + eps)
    return (x * scale + (bias - mean * scale)).astype(x.dtype)
