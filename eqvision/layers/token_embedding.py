"""Vectors of the words of a vocabulary, and words from vectors by the same table."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from eqvision.layers.init import normal
from eqvision.layers.linear import Initializer


def _published(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
    return normal(key, shape, 0.02)


class TokenEmbedding(eqx.Module):
    """One vector for each number of a vocabulary; ``attend`` reads the table backwards, as tied output layers do.

    A number outside the vocabulary has NaN for its vector: a tokenizer of another model does not go unnoticed, as
    it would if the nearest row were taken. What stands where ``mask`` is False may be anything.
    """

    weight: Float[Array, "v d"]

    def __init__(self, vocab_size: int, width: int, *, init: Initializer = _published, key: PRNGKeyArray):
        self.weight = init(key, (vocab_size, width))

    def __call__(self, ids: Int[Array, "..."], mask: Bool[Array, "..."] | None = None) -> Float[Array, "... d"]:
        ids = ids if mask is None else jnp.where(mask, ids, 0)
        # A negative number is outside too, and counts from the end in jnp.take.
        ids = jnp.where(ids < 0, self.weight.shape[0], ids)
        return jnp.take(self.weight, ids, axis=0, mode="fill", fill_value=jnp.nan)

    def attend(self, x: Float[Array, "... d"]) -> Float[Array, "... v"]:
        """The product of each vector with those of all words, in float32 as logits are."""
        flat, wide = x.reshape(-1, x.shape[-1]), jnp.promote_types(x.dtype, jnp.float32)
        logits = jnp.matmul(flat, self.weight.T.astype(x.dtype), preferred_element_type=wide)
        return logits.reshape(*x.shape[:-1], logits.shape[-1])
