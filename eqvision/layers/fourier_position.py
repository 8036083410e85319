"""Positions by random Fourier features (Tancik et al. 2020), as Segment Anything has them."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray


class FourierPosition(eqx.Module):
    """Sines, then cosines, of random combinations of x and y: ``width`` numbers for a point.

    ``matrix`` is drawn once and never trained. Its product is taken in full float32: the angles run over many turns.
    """

    matrix: Float[Array, "2 f"]

    def __init__(self, width: int, *, scale: float = 1.0, key: PRNGKeyArray):
        if width % 2:
            raise ValueError(f"FourierPosition: width {width} must be even, for as many sines as cosines")
        self.matrix = scale * jax.random.normal(key, (2, width // 2))

    def __call__(self, points: Float[Array, "*n 2"]) -> Float[Array, "*n d"]:
        """``points`` are x, y in [0, 1] of the image; float32."""
        matrix = lax.stop_gradient(self.matrix).astype(jnp.float32)
        turns = jnp.matmul(2 * points.astype(jnp.float32) - 1, matrix, precision=lax.Precision.HIGHEST)
        angles = 2 * math.pi * turns
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)

    def grid(self, height: int, width: int) -> Float[Array, "{height} {width} d"]:
        """Of the centres of a map's cells."""
        rows, columns = ((np.arange(n, dtype=np.float32) + 0.5) / n for n in (height, width))
        return self(jnp.stack(jnp.meshgrid(columns, rows), axis=-1))
