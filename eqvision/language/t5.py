"""T5 (Raffel et al. 2020): an encoder of one text and a decoder that writes another, word by word."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from eqvision.backbones.t5 import EPS, MT5_VOCAB_SIZE, T5_V1_0, T5_V1_1, VOCAB_SIZE, T5Encoder, T5Size, t5_blocks
from eqvision.layers import (
    Implementation,
    Linear,
    Remat,
    RMSNorm,
    dropout,
    fold,
    lecun_normal,
    mimetic_attention,
    near_bias,
)
from eqvision.layers.decoder import DecoderStack
from eqvision.layers.kv_cache import KVCache
from eqvision.layers.relative_buckets import RelativeBias
from eqvision.types import TextTokens

PAD_ID, END_ID = 0, 1  # of the published vocabularies; texts of the decoder begin with PAD_ID


class T5(eqx.Module):
    """Encoder and decoder share their word vectors; ``tied`` (version 1.0) the output layer too, else it is ``head``.

    ``model(source, target_ids)`` is for training: ``target_ids`` are what the decoder reads, which is the text shifted
    by one (``shift_right``), and the logits are those of the text. Padding behind the text needs no mask, since no
    token sees what follows it. ``mimetic`` begins with attention to what is near, and of the decoder to the same word
    in the source (``layers/mimetic.py``), for small texts.

    To generate: ``memory = model.encode(text)``, and ``greedy(model, model.start(memory, text.mask), prompt, ...)``.
    """

    encoder: T5Encoder
    relative: RelativeBias
    decoder: DecoderStack
    norm: RMSNorm
    head: Linear | None
    dropout: float = eqx.field(static=True)

    def __init__(
        self,
        size: T5Size,
        *,
        tied: bool,
        vocab_size: int = VOCAB_SIZE,
        decoder_depth: int | None = None,
        num_buckets: int = 32,
        max_distance: int = 128,
        dropout: float = 0.1,
        implementation: Implementation = "xla",
        remat: Remat = "none",
        unroll: int = 1,
        mimetic: bool = False,
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key, 4)
        options = {"dropout": dropout, "implementation": implementation, "remat": remat, "unroll": unroll}
        buckets = {"num_buckets": num_buckets, "max_distance": max_distance}
        self.encoder = T5Encoder(size, vocab_size=vocab_size, **buckets, **options, key=keys[0])
        std = size.width**-0.5
        self.relative = RelativeBias(size.num_heads, bidirectional=False, **buckets, std=std, key=keys[1])
        decoder_size = size if decoder_depth is None else size._replace(depth=decoder_depth)
        self.decoder = t5_blocks(decoder_size, crosses=True, **options, key=keys[2])
        self.norm = RMSNorm(size.width, eps=EPS)
        self.head = None if tied else Linear(size.width, vocab_size, use_bias=False, init=lecun_normal, key=keys[3])
        self.dropout = dropout
        if mimetic:
            self.relative = near_bias(self.relative)
            self.encoder = eqx.tree_at(lambda e: e.relative, self.encoder, near_bias(self.encoder.relative))
            self.decoder = _mimetic(self.decoder, key=jax.random.fold_in(key, 4))

    @property
    def vocab_size(self) -> int:
        return self.encoder.vocab_size

    def __call__(
        self,
        source: TextTokens,
        target_ids: Int[Array, "b m"],
        *,
        dtype: jnp.dtype | None = None,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "b m v"]:
        memory = self.encode(source, dtype=dtype, train=train, key=fold(key, 0))
        return self.decode(memory, source.mask, target_ids, train=train, key=fold(key, 1))

    def encode(
        self,
        source: TextTokens,
        *,
        dtype: jnp.dtype | None = None,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "b n d"]:
        """``dtype`` is what the model computes in; None: the type of its parameters."""
        return self.encoder(source, dtype=dtype, train=train, key=key)

    def decode(
        self,
        memory: Float[Array, "b n d"],
        memory_mask: Bool[Array, "b n"] | None,
        target_ids: Int[Array, "b m"],
        *,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "b m v"]:
        """The logits of all tokens at once; the memory may be of anything, as of a video in Vid2Seq."""
        vectors = self.encoder.token_embedding(target_ids).astype(memory.dtype)
        x = dropout(vectors, self.dropout, train=train, key=fold(key, 0))
        places = jnp.arange(x.shape[1])[None]
        options = {"bias": self.relative(places, places), "train": train, "key": fold(key, 1)}
        x = self.decoder(x, memory=memory, memory_mask=memory_mask, **options)
        return self._logits(dropout(self.norm(x), self.dropout, train=train, key=fold(key, 2)))

    def start(self, memory: Float[Array, "b n d"], memory_mask: Bool[Array, "b n"] | None = None) -> KVCache:
        """What ``decode_step`` begins with: the memory is read, and no text is written."""
        return self.decoder.start(memory[:, :0], memory=memory, memory_mask=memory_mask)

    def decode_step(
        self, ids: Int[Array, "b n"], cache: KVCache, *, mask: Bool[Array, "b n"] | None = None
    ) -> tuple[Float[Array, "b n v"], KVCache]:
        """Logits of what follows each of the next tokens; the cache must have room for them (``KVCache.grown``)."""
        mask = jnp.ones(ids.shape, bool) if mask is None else mask
        cache = cache.taken(mask)
        x = self.encoder.token_embedding(ids, mask).astype(cache.keys.dtype)
        bias = self.relative(cache.last_places(ids.shape[1]), cache.places())
        x, cache = self.decoder.step(x, cache, bias=bias)
        return self._logits(self.norm(x)), cache

    def _logits(self, x: Float[Array, "b m d"]) -> Float[Array, "b m v"]:
        if self.head is None:
            return self.encoder.token_embedding.attend(x * x.shape[-1] ** -0.5)
        return self.head(x).astype(jnp.promote_types(x.dtype, jnp.float32))


def shift_right(ids: Int[Array, "b m"], start_id: int = PAD_ID) -> Int[Array, "b m"]:
    """What the decoder reads to write ``ids``: a start token, and all but the last."""
    return jnp.concatenate([jnp.full_like(ids[:, :1], start_id), ids[:, :-1]], axis=1)


def _mimetic(decoder: DecoderStack, *, key: PRNGKeyArray) -> DecoderStack:
    """A word of the decoder first looks for itself in the memory: a sentinel for the place that it stands for."""
    attention = decoder.blocks.cross_attention
    assert attention is not None
    return eqx.tree_at(lambda d: d.blocks.cross_attention, decoder, mimetic_attention(attention, key=key))


t5_small = functools.partial(T5, T5_V1_0["small"], tied=True)
t5_base = functools.partial(T5, T5_V1_0["base"], tied=True)
t5_large = functools.partial(T5, T5_V1_0["large"], tied=True)
t5_xl = functools.partial(T5, T5_V1_0["xl"], tied=True)
t5_xxl = functools.partial(T5, T5_V1_0["xxl"], tied=True)
t5_v1_1_small = functools.partial(T5, T5_V1_1["small"], tied=False)
t5_v1_1_base = functools.partial(T5, T5_V1_1["base"], tied=False)
t5_v1_1_large = functools.partial(T5, T5_V1_1["large"], tied=False)
t5_v1_1_xl = functools.partial(T5, T5_V1_1["xl"], tied=False)
t5_v1_1_xxl = functools.partial(T5, T5_V1_1["xxl"], tied=False)
mt5_small = functools.partial(t5_v1_1_small, vocab_size=MT5_VOCAB_SIZE)
mt5_base = functools.partial(t5_v1_1_base, vocab_size=MT5_VOCAB_SIZE)
mt5_large = functools.partial(t5_v1_1_large, vocab_size=MT5_VOCAB_SIZE)
mt5_xl = functools.partial(t5_v1_1_xl, vocab_size=MT5_VOCAB_SIZE)
mt5_xxl = functools.partial(t5_v1_1_xxl, vocab_size=MT5_VOCAB_SIZE)
