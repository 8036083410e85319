"""Layer, group and RMS normalisation. Statistics in float32, output in the input's type.

The gradients of layer and batch normalisation are written by hand. Reverse-mode differentiation of the
mean and variance formulas recomputes them in every consumer on XLA:CPU: 20-45 % of a ViT's training
step, and a multiple of its compile time. The price: no forward mode (``jax.jvp``) through these layers.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from eqvision.ops.collectives import vary_like


def _mean_rstd(x: Float[Array, "... c"], eps: float) -> tuple[Float[Array, "... 1"], Float[Array, "... 1"]]:
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True)
    return mean, lax.rsqrt(variance + eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
    x: Float[Array, "... c"], weight: Float[Array, " c"], bias: Float[Array, " c"], eps: float
) -> Float[Array, "... c"]:
    """Normalise the last axis (Ba et al. 2016), then scale and shift. Reverse mode only."""
    return _layer_norm_forward(x, weight, bias, eps)[0]


def _layer_norm_forward(x, weight, bias, eps):
    mean, rstd = _mean_rstd(x, eps)
    y = (x - mean) * rstd * weight + bias
    return y.astype(x.dtype), (x, weight, bias, mean, rstd)


def _layer_norm_backward(eps, saved, g):
    x, weight, bias, mean, rstd = saved
    normed = (x - mean) * rstd
    g = g.astype(rstd.dtype)
    g_normed = g * weight
    mean_g = jnp.mean(g_normed, axis=-1, keepdims=True)
    mean_gx = jnp.mean(g_normed * normed, axis=-1, keepdims=True)
    g_x = rstd * (g_normed - mean_g - normed * mean_gx)
    leading = tuple(range(x.ndim - 1))
    g_weight = jnp.sum(g * normed, axis=leading).astype(weight.dtype)
    return g_x.astype(x.dtype), g_weight, jnp.sum(g, axis=leading).astype(bias.dtype)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


class LayerNorm(eqx.Module):
    """Layer normalisation over the last axis. ``eps`` differs between checkpoints: 1e-6 in ViT, 1e-12 in BERT."""

    weight: Float[Array, " c"]
    bias: Float[Array, " c"]
    eps: float = eqx.field(static=True)

    def __init__(self, features: int, *, eps: float = 1e-6):
        self.weight = jnp.ones((features,))
        self.bias = jnp.zeros((features,))
        self.eps = eps

    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        weight, bias = vary_like((self.weight, self.bias), x)
        return layer_norm(x, weight, bias, self.eps)


class RMSNorm(eqx.Module):
    """Zhang and Sennrich 2019: no mean, no shift."""

    weight: Float[Array, " c"]
    eps: float = eqx.field(static=True)

    def __init__(self, features: int, *, eps: float = 1e-6):
        self.weight = jnp.ones((features,))
        self.eps = eps

    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        rstd = lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * rstd * self.weight).astype(x.dtype)


class GroupNorm(eqx.Module):
    """Wu and He 2018: statistics of each example over all positions and the channels of one group."""

    weight: Float[Array, " c"]
    bias: Float[Array, " c"]
    num_groups: int = eqx.field(static=True)
    eps: float = eqx.field(static=True)

    def __init__(self, features: int, *, num_groups: int = 32, eps: float = 1e-5, weight_init: float = 1.0):
        if features % num_groups:
            raise ValueError(f"GroupNorm: {features} channels cannot be split into {num_groups} equal groups")
        self.weight = jnp.full((features,), weight_init, jnp.float32)
        self.bias = jnp.zeros((features,))
        self.num_groups = num_groups
        self.eps = eps

    def __call__(self, x: Float[Array, "b ... c"]) -> Float[Array, "b ... c"]:
        b, c = x.shape[0], x.shape[-1]
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        grouped = wide.reshape(b, -1, self.num_groups, c // self.num_groups)
        mean = jnp.mean(grouped, axis=(1, 3), keepdims=True)
        variance = jnp.mean(jnp.square(grouped - mean), axis=(1, 3), keepdims=True)
        normed = ((grouped - mean) * lax.rsqrt(variance + self.eps)).reshape(x.shape)
        return (normed * self.weight + self.bias).astype(x.dtype)
