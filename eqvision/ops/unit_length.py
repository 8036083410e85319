"""Vectors of length one."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def unit_length(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """``x`` over its Euclidean norm along the last axis, in float32; zeros stay zeros, and have finite gradients."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x * lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))
