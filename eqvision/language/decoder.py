"""A decoder of texts about something: of captions as in GIT (Wang et al. 2022), BERT-like with causal attention.

What the text is about comes as a ``prefix``, vectors that stand before the words and see each other and no word, or as
a ``memory``, which the words read by cross-attention. GER-ALD and PixelLLM have such decoders too.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from eqvision.layers import (
    Activation,
    Implementation,
    LayerNorm,
    Linear,
    PositionEmbedding1D,
    Remat,
    TokenEmbedding,
    dropout,
    fold,
    truncated_normal,
)
from eqvision.layers.attention import Visible
from eqvision.layers.decoder import DecoderStack
from eqvision.layers.kv_cache import KVCache
from eqvision.layers.transformer import NormOrder
from eqvision.types import TextTokens

Prefix = Float[Array, "b p e"]
PrefixMask = Bool[Array, "b p"]


class PrefixProjection(eqx.Module):
    """GIT's way from an image's features to vectors beside the words: linear, norm."""

    linear: Linear
    norm: LayerNorm

    def __init__(self, in_width: int, width: int, *, eps: float = 1e-5, key: PRNGKeyArray):
        self.linear = Linear(in_width, width, key=key)
        self.norm = LayerNorm(width, eps=eps)

    def __call__(self, x: Prefix) -> Float[Array, "b p d"]:
        return self.norm(self.linear(x))


class TextDecoder(eqx.Module):
    """Words and places, a norm, ``depth`` blocks, logits of the next word.

    ``prefix_width`` is of features that are projected (GIT); None: a prefix has ``width`` channels and goes in as it
    is. ``memory_width`` None: no cross-attention. With ``norm_order`` "pre" a last norm stands before the logits.
    Computes in the type of prefix or memory.

    To generate: ``language.greedy(model, model.start(prefix), prompt, ...)``.
    """

    token_embedding: TokenEmbedding
    position: PositionEmbedding1D
    embedding_norm: LayerNorm
    projection: PrefixProjection | None
    decoder: DecoderStack
    norm: LayerNorm | None
    head: Linear
    dropout: float = eqx.field(static=True)

    def __init__(
        self,
        *,
        vocab_size: int = 30522,
        width: int = 768,
        depth: int = 6,
        num_heads: int = 12,
        mlp_dim: int = 3072,
        max_positions: int = 1024,
        prefix_width: int | None = None,
        memory_width: int | None = None,
        norm_order: NormOrder = "post",
        activation: Activation = "gelu",
        eps: float = 1e-12,
        dropout: float = 0.1,
        implementation: Implementation = "xla",
        remat: Remat = "none",
        unroll: int = 1,
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key, 5)
        self.token_embedding = TokenEmbedding(vocab_size, width, key=keys[0])
        self.position = PositionEmbedding1D(max_positions, width, key=keys[1])
        self.embedding_norm = LayerNorm(width, eps=eps)
        self.projection = None if prefix_width is None else PrefixProjection(prefix_width, width, key=keys[2])
        self.decoder = DecoderStack(
            depth,
            width,
            num_heads,
            mlp_dim,
            memory_width=memory_width,
            norm_order=norm_order,
            eps=eps,
            activation=activation,
            dropout=dropout,
            implementation=implementation,
            remat=remat,
            unroll=unroll,
            init=truncated_normal,
            key=keys[3],
        )
        self.norm = LayerNorm(width, eps=eps) if norm_order == "pre" else None
        self.head = Linear(width, vocab_size, key=keys[4])
        self.dropout = dropout

    @property
    def vocab_size(self) -> int:
        return self.token_embedding.weight.shape[0]

    def __call__(
        self,
        text: TextTokens,
        *,
        prefix: Prefix | None = None,
        prefix_mask: PrefixMask | None = None,
        memory: Float[Array, "b m w"] | None = None,
        memory_mask: Bool[Array, "b m"] | None = None,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "b n v"]:
        """For each word the logits of the word behind it.

        Raises ValueError for texts longer than ``max_positions``.
        """
        vectors, mask = self._prefix(prefix, prefix_mask, memory, text.ids.shape[0])
        x = self.token_embedding(text.ids, text.mask) + self.position(text.ids.shape[1])
        x = dropout(self.embedding_norm(x.astype(vectors.dtype)), self.dropout, train=train, key=fold(key, 0))
        x = self.decoder(
            jnp.concatenate([vectors, x], axis=1),
            memory=memory,
            memory_mask=memory_mask,
            key_mask=jnp.concatenate([mask, text.mask], axis=1),
            visible=prefix_visible(vectors.shape[1], x.shape[1]),
            causal=False,
            train=train,
            key=fold(key, 1),
        )
        return self._logits(x[:, vectors.shape[1] :])

    def start(
        self,
        prefix: Prefix | None = None,
        *,
        prefix_mask: PrefixMask | None = None,
        memory: Float[Array, "b m w"] | None = None,
        memory_mask: Bool[Array, "b m"] | None = None,
    ) -> KVCache:
        """What ``decode_step`` begins with: prefix and memory are read, and no text is written.

        For a text about nothing give a prefix of no vectors: its batch is what counts.
        """
        about = memory if prefix is None else prefix
        if about is None:
            raise ValueError("TextDecoder: start needs a prefix or a memory; jnp.zeros((batch, 0, width)) is no prefix")
        vectors, mask = self._prefix(prefix, prefix_mask, memory, about.shape[0])
        return self.decoder.start(vectors, prefix_mask=mask, memory=memory, memory_mask=memory_mask)

    def decode_step(
        self, ids: Int[Array, "b n"], cache: KVCache, *, mask: Bool[Array, "b n"] | None = None
    ) -> tuple[Float[Array, "b n v"], KVCache]:
        """Logits of what follows each of the next words; the cache must have room for them (``KVCache.grown``).

        Raises ValueError for a cache with room for more words than there are places.
        """
        most = self.position.weight.shape[0]
        if cache.room > most:
            raise ValueError(f"TextDecoder: a text of {cache.room} words is longer than the {most} learned positions")
        mask = jnp.ones(ids.shape, bool) if mask is None else mask
        cache, dtype = cache.taken(mask), cache.keys.dtype
        x = self.token_embedding(ids, mask) + self.position.weight[cache.last_places(ids.shape[1])]
        x, cache = self.decoder.step(self.embedding_norm(x.astype(dtype)), cache)
        return self._logits(x), cache

    def _prefix(self, prefix, mask, memory, batch) -> tuple[Float[Array, "b p d"], PrefixMask]:
        """The vectors that stand before the words, of which there may be none."""
        if prefix is None:
            dtype = self.token_embedding.weight.dtype if memory is None else memory.dtype
            return jnp.zeros((batch, 0, self.token_embedding.weight.shape[1]), dtype), jnp.zeros((batch, 0), bool)
        mask = jnp.ones(prefix.shape[:2], bool) if mask is None else mask
        prefix = jnp.where(mask[:, :, None], prefix, 0)
        return (prefix if self.projection is None else self.projection(prefix)), mask

    def _logits(self, x: Float[Array, "b n d"]) -> Float[Array, "b n v"]:
        x = x if self.norm is None else self.norm(x)
        return self.head(x).astype(jnp.promote_types(x.dtype, jnp.float32))


def prefix_visible(prefix: int, words: int) -> Visible:
    """Words see the prefix, themselves and what is before them; the prefix sees itself."""
    place = jnp.arange(prefix + words)
    return ((place <= place[:, None]) | (place < prefix))[None]


# Wang et al. 2022, table 1 and section 3.2: CLIP's ViT-B/16 and ViT-L/14 before six layers of text.
git_text_base = functools.partial(TextDecoder, prefix_width=768)
git_text_large = functools.partial(TextDecoder, prefix_width=1024)
