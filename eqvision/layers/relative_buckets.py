"""T5's relative positions (Raffel et al. 2020, section 2.1): a number for each head and each bucket of distances."""

import functools
import math

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from eqvision.layers.init import normal


def relative_buckets(
    distance: Int[Array, "..."], *, bidirectional: bool, num_buckets: int = 32, max_distance: int = 128
) -> Int[Array, "..."]:
    """The bucket, 0 to ``num_buckets`` - 1, of each distance: place of the key less place of the query.

    The nearer half of the buckets have one distance each, the others grow by a constant factor up to
    ``max_distance``, from where on all is one. ``bidirectional``: half of the buckets are for keys behind the query;
    otherwise keys behind it are in bucket 0, and it is for a mask to hide them.
    """
    least = 4 if bidirectional else 2
    if num_buckets < least or num_buckets % least:
        raise ValueError(f"relative_buckets: num_buckets must be a multiple of {least}, got {num_buckets}")
    one_side = num_buckets // 2 if bidirectional else num_buckets
    if max_distance <= one_side // 2:
        raise ValueError(
            f"relative_buckets: max_distance {max_distance} must be more than the {one_side // 2} distances that have "
            "buckets of their own"
        )
    table = jnp.asarray(_bucket_of(one_side, max_distance))
    away = jnp.abs(distance) if bidirectional else jnp.maximum(-distance, 0)
    bucket = table[jnp.minimum(away, max_distance)]
    return bucket + jnp.where(distance > 0, one_side, 0) if bidirectional else bucket


@functools.cache
def _bucket_of(buckets: int, max_distance: int) -> Int[np.ndarray, " n"]:
    """Buckets of the distances 0 to ``max_distance``, by the float32 arithmetic of the original."""
    exact, distance = buckets // 2, np.arange(max_distance + 1)
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    steps = ratio / np.float32(math.log(max_distance / exact)) * np.float32(buckets - exact)
    far = np.minimum(exact + steps.astype(np.int32), buckets - 1)
    return np.where(distance < exact, distance, far).astype(np.int32)


class RelativeBias(eqx.Module):
    """What is added to attention logits for the distance between key and query; ``weight`` has a row for each bucket.

    All layers of a T5 encoder share one, and those of its decoder another, which is not ``bidirectional``.
    """

    weight: Float[Array, "buckets heads"]
    bidirectional: bool = eqx.field(static=True)
    max_distance: int = eqx.field(static=True)

    def __init__(
        self,
        num_heads: int,
        *,
        bidirectional: bool,
        num_buckets: int = 32,
        max_distance: int = 128,
        std: float = 1.0,
        key: PRNGKeyArray,
    ):
        self.weight = normal(key, (num_buckets, num_heads), std)
        self.bidirectional = bidirectional
        self.max_distance = max_distance

    def __call__(self, queries: Int[Array, "b q"], keys: Int[Array, "b k"]) -> Float[Array, "b heads q k"]:
        """From the places of queries and keys; a batch of 1 serves all examples where places are the same."""
        buckets = relative_buckets(
            keys[:, None, :] - queries[:, :, None],
            bidirectional=self.bidirectional,
            num_buckets=self.weight.shape[0],
            max_distance=self.max_distance,
        )
        return jnp.moveaxis(self.weight[buckets], -1, 1)
