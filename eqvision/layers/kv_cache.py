"""Keys and values that a text decoder keeps from token to token, in arrays of one size.

A cache has slots, the same for all rows of a batch: those of a prefix (an image's vectors), then those of text. A call
of the decoder takes the next slots for its tokens and reads all that are taken: a whole prompt and a single token go
through the same code. Slots of padding are never read.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from eqvision.layers.attention import Visible


class Memory(NamedTuple):
    """Keys and values of what the decoder attends to across, made once: one row for each example.

    Rows of the decoder may be several times as many, those of one example side by side, as in a beam search.
    """

    keys: Float[Array, "l b m h d"]
    values: Float[Array, "l b m h d"]
    mask: Bool[Array, "b m"] | None


class KVCache(NamedTuple):
    """The first ``length`` slots of text are taken; the masks say which slots hold something and not padding."""

    keys: Float[Array, "l b s h d"]
    values: Float[Array, "l b s h d"]
    prefix_mask: Bool[Array, "b p"]
    mask: Bool[Array, "b t"]
    length: Int[Array, ""]
    memory: Memory | None

    @property
    def prefix(self) -> int:
        """How many slots the prefix has."""
        return self.prefix_mask.shape[1]

    @property
    def room(self) -> int:
        """How many tokens of text fit."""
        return self.mask.shape[1]

    def grown(self, slots: int) -> "KVCache":
        """With room for so many more tokens."""
        keys, values = (jnp.pad(x, ((0, 0), (0, 0), (0, slots), (0, 0), (0, 0))) for x in (self.keys, self.values))
        return self._replace(keys=keys, values=values, mask=jnp.pad(self.mask, ((0, 0), (0, slots))))

    def rows(self, rows: Int[Array, " r"]) -> "KVCache":
        """Of these rows; the memory stays, so rows of one example must stay side by side and equally many."""
        keys, values = (jnp.take(x, rows, axis=1) for x in (self.keys, self.values))
        return self._replace(keys=keys, values=values, prefix_mask=self.prefix_mask[rows], mask=self.mask[rows])

    def taken(self, mask: Bool[Array, "b n"]) -> "KVCache":
        """With the next ``n`` slots taken, by tokens where ``mask`` is True; a decoder writes into them afterwards.

        Raises ValueError where there are not so many at all. That too few are free is known when the program runs:
        the decoder gives NaN then.
        """
        if mask.shape[1] > self.room:
            raise ValueError(f"KVCache: {mask.shape[1]} tokens and room for {self.room}; make it larger with grown()")
        after = lax.dynamic_update_slice(self.mask, mask, (0, self.length))
        return self._replace(mask=after, length=self.length + mask.shape[1])

    def places(self) -> Int[Array, "b t"]:
        """The place in its row's text, from 0, of the token in each slot; padding has that of the token before it."""
        return jnp.maximum(jnp.cumsum(self.mask.astype(jnp.int32), axis=1) - 1, 0)

    def last_places(self, number: int) -> Int[Array, "b n"]:
        """Of the tokens in the slots that were taken last."""
        return lax.dynamic_slice_in_dim(self.places(), self.length - number, number, axis=1)

    def visible(self, number: int) -> Visible:
        """What the tokens in the last ``number`` slots may see: the prefix, and the text up to themselves."""
        slot, query = jnp.arange(self.room), self.length - number + jnp.arange(number)
        text = self.mask[:, None] & (slot <= query[:, None])
        prefix = jnp.broadcast_to(self.prefix_mask[:, None], (*text.shape[:2], self.prefix))
        return jnp.concatenate([prefix, text], axis=2)


class LayerSlots(NamedTuple):
    """The slots of one layer, in which a block writes and reads; ``start`` is the first slot of the new tokens."""

    keys: Float[Array, "l b s h d"]
    values: Float[Array, "l b s h d"]
    layer: Int[Array, ""]
    start: Int[Array, ""]

    def write(self, keys: Float[Array, "b n h d"], values: Float[Array, "b n h d"]) -> "LayerSlots":
        """All layers are in one array that is carried along: a new token costs no copy of the others."""
        place = (self.layer, 0, self.start, 0, 0)
        new_keys, new_values = (
            lax.dynamic_update_slice(old, new[None].astype(old.dtype), place)
            for old, new in ((self.keys, keys), (self.values, values))
        )
        return self._replace(keys=new_keys, values=new_values)

    def read(self) -> tuple[Float[Array, "b s h d"], Float[Array, "b s h d"]]:
        keys, values = (
            lax.dynamic_index_in_dim(x, self.layer, axis=0, keepdims=False) for x in (self.keys, self.values)
        )
        return keys, values


def empty_cache(
    depth: int,
    prefix_mask: Bool[Array, "b p"],
    num_heads: int,
    head_width: int,
    *,
    dtype=jnp.float32,
    memory: Memory | None = None,
) -> KVCache:
    """A cache with slots for the prefix and no room for text, which ``KVCache.grown`` makes."""
    batch, prefix = prefix_mask.shape
    slots = jnp.zeros((depth, batch, prefix, num_heads, head_width), dtype)
    return KVCache(slots, slots, prefix_mask, jnp.zeros((batch, 0), bool), jnp.int32(0), memory)
