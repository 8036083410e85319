"""Attention to a few sampled points of several maps in place of all their cells."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, PRNGKeyArray

from eqvision.layers.init import xavier_uniform
from eqvision.layers.linear import Linear
from eqvision.ops.deformable import multi_scale_deformable_sampling

Maps = tuple[Float[Array, "b _ _ d"], ...]
Masks = tuple[Bool[Array, "b _ _"], ...]


class DeformableAttention(eqx.Module):
    """Multi-scale deformable attention (Zhu et al. 2021, section 4.1; ``MSDeformAttn`` of the authors' code).

    Each query looks at ``num_points`` points of each of ``num_levels`` maps, at offsets from its reference that it
    computes itself, and mixes the values there with weights whose softmax runs over levels and points. Points on
    padding read zeros, and their weight is not given to the others.
    Fresh offsets do not depend on the query: each head looks in its own of ``num_heads`` directions, point i at i + 1
    cells from the reference; fresh weights are equal. ``block_size`` is that of ``multi_scale_deformable_sampling``.
    """

    value_proj: Linear
    sampling_offsets: Linear
    attention_weights: Linear
    output_proj: Linear
    num_heads: int = eqx.field(static=True)
    num_levels: int = eqx.field(static=True)
    num_points: int = eqx.field(static=True)
    block_size: int | None = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        num_levels: int = 4,
        num_points: int = 4,
        block_size: int | None = 16_384,
        key: PRNGKeyArray,
    ):
        if width % num_heads:
            raise ValueError(f"DeformableAttention: width {width} cannot be split into {num_heads} heads of equal size")
        keys = jax.random.split(key)
        samples = num_heads * num_levels * num_points
        self.value_proj = Linear(width, width, init=xavier_uniform, key=keys[0])
        offsets = Linear(width, 2 * samples, init=_zeros, key=key)
        bias = jnp.asarray(_first_offsets(num_heads, num_levels, num_points).reshape(-1))
        self.sampling_offsets = eqx.tree_at(lambda linear: linear.bias, offsets, bias)
        self.attention_weights = Linear(width, samples, init=_zeros, key=key)
        self.output_proj = Linear(width, width, init=xavier_uniform, key=keys[1])
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        self.block_size = block_size

    def __call__(
        self, query: Float[Array, "b q d"], reference: Float[Array, "b q levels _"], maps: Maps, masks: Masks
    ) -> Float[Array, "b q d"]:
        """``maps`` are (b, h, w, d), one per level, and ``masks`` True where they show image.

        ``reference`` holds points (x, y) or boxes (x, y of the centre, width, height) in each level's padded map,
        1 being its whole width or height: coordinates within the image times the image's share of the map. Offsets
        count in cells around a point, and around a box in halves of its size divided by ``num_points``.
        """
        self._check(reference, maps, masks)
        sampled = multi_scale_deformable_sampling(
            self._values(maps, masks),
            self._locations(query, reference, maps),
            self._weights(query),
            block_size=self.block_size,
        )
        return self.output_proj(sampled.reshape(query.shape).astype(query.dtype))

    def _values(self, maps: Maps, masks: Masks) -> tuple[Float[Array, "b h w heads e"], ...]:
        values = []
        for level, mask in zip(maps, masks, strict=True):
            # Padding may hold anything: zero before the product for its gradient, and after it for the bias.
            value = self.value_proj(jnp.where(mask[..., None], level, 0))
            value = jnp.where(mask[..., None], value, 0)
            values.append(value.reshape(*mask.shape, self.num_heads, -1))
        return tuple(values)

    def _locations(
        self, query: Float[Array, "b q d"], reference: Float[Array, "b q levels _"], maps: Maps
    ) -> Float32[Array, "b q heads levels points 2"]:
        offsets = self._split(self.sampling_offsets(query), 2)
        reference = reference.astype(jnp.float32)[:, :, None, :, None]
        if reference.shape[-1] == 2:
            size = np.array([level.shape[2:0:-1] for level in maps], np.float32)  # width, height
            return reference + offsets / size[:, None]
        return reference[..., :2] + offsets / self.num_points * reference[..., 2:] * 0.5

    def _weights(self, query: Float[Array, "b q d"]) -> Float32[Array, "b q heads levels points"]:
        return jax.nn.softmax(self._split(self.attention_weights(query), 1)[..., 0], axis=(-2, -1))

    def _split(self, x: Float[Array, "b q n"], last: int) -> Float32[Array, "b q heads levels points last"]:
        shape = (*x.shape[:2], self.num_heads, self.num_levels, self.num_points, last)
        return x.astype(jnp.float32).reshape(shape)

    def _check(self, reference: Float[Array, "b q levels _"], maps: Maps, masks: Masks) -> None:
        if not len(maps) == len(masks) == reference.shape[2] == self.num_levels:
            raise ValueError(
                f"DeformableAttention was built for {self.num_levels} levels, and was given {len(maps)} maps, "
                f"{len(masks)} masks and references to {reference.shape[2]} levels"
            )
        if reference.shape[3] not in (2, 4):
            raise ValueError(
                f"DeformableAttention: the last axis of reference holds a point (2) or a box (4), got {reference.shape}"
            )


def _first_offsets(num_heads: int, num_levels: int, num_points: int) -> Float32[np.ndarray, "heads levels points 2"]:
    """Directions all around, stretched to the square's edge, one cell further for each point; alike on all levels."""
    angles = np.arange(num_heads) * (2 * math.pi / num_heads)
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    directions = directions / np.abs(directions).max(axis=-1, keepdims=True)
    offsets = directions[:, None, None] * np.arange(1, num_points + 1)[:, None]
    return np.broadcast_to(offsets, (num_heads, num_levels, num_points, 2)).astype(np.float32)


def _zeros(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
    return jnp.zeros(shape)
