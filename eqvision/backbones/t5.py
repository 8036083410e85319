"""T5's encoder (Raffel et al. 2020), of versions 1.0 and 1.1 and of mT5 (Xue et al. 2021)."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from eqvision.layers import Implementation, Remat, RMSNorm, TokenEmbedding, dropout, fold, lecun_normal, normal
from eqvision.layers.decoder import DecoderStack
from eqvision.layers.relative_buckets import RelativeBias
from eqvision.types import TextTokens

EPS = 1e-6  # of all norms


class T5Size(NamedTuple):
    """``head_width`` times ``num_heads`` need not be ``width``. ``gated``: the MLP of version 1.1 and mT5."""

    width: int
    depth: int
    num_heads: int
    head_width: int
    mlp_dim: int
    gated: bool


# Raffel et al. 2020, section 3.7: 60 million, 220 million, 770 million, 3 and 11 billion parameters.
T5_V1_0 = {
    "small": T5Size(512, 6, 8, 64, 2048, gated=False),
    "base": T5Size(768, 12, 12, 64, 3072, gated=False),
    "large": T5Size(1024, 24, 16, 64, 4096, gated=False),
    "xl": T5Size(1024, 24, 32, 128, 16384, gated=False),
    "xxl": T5Size(1024, 24, 128, 128, 65536, gated=False),
}
# The sizes of version 1.1 are those of mT5 (Xue et al. 2021, section 3.2) and of FLAN-T5 too.
T5_V1_1 = {
    "small": T5Size(512, 8, 6, 64, 1024, gated=True),
    "base": T5Size(768, 12, 12, 64, 2048, gated=True),
    "large": T5Size(1024, 24, 16, 64, 2816, gated=True),
    "xl": T5Size(2048, 24, 32, 64, 5120, gated=True),
    "xxl": T5Size(4096, 24, 64, 64, 10240, gated=True),
}
VOCAB_SIZE = 32128
MT5_VOCAB_SIZE = 250112


class T5Encoder(eqx.Module):
    """Embeddings without positions, pre-norm blocks with one bias by relative position for all of them, a last norm.

    ``encoded`` is for vectors that are no words: a part of the text, or features of images and speech.
    """

    token_embedding: TokenEmbedding
    relative: RelativeBias
    stack: DecoderStack
    norm: RMSNorm
    dropout: float = eqx.field(static=True)
    channels: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        size: T5Size,
        *,
        vocab_size: int = VOCAB_SIZE,
        num_buckets: int = 32,
        max_distance: int = 128,
        dropout: float = 0.1,
        implementation: Implementation = "xla",
        remat: Remat = "none",
        unroll: int = 1,
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key, 3)
        self.token_embedding = TokenEmbedding(vocab_size, size.width, init=normal, key=keys[0])
        self.relative = RelativeBias(
            size.num_heads,
            bidirectional=True,
            num_buckets=num_buckets,
            max_distance=max_distance,
            std=size.width**-0.5,
            key=keys[1],
        )
        self.stack = t5_blocks(
            size,
            crosses=False,
            dropout=dropout,
            implementation=implementation,
            remat=remat,
            unroll=unroll,
            key=keys[2],
        )
        self.norm = RMSNorm(size.width, eps=EPS)
        self.dropout = dropout
        self.channels = (size.width,)

    @property
    def vocab_size(self) -> int:
        return self.token_embedding.weight.shape[0]

    def __call__(
        self, text: TextTokens, *, dtype: jnp.dtype | None = None, train: bool = False, key: PRNGKeyArray | None = None
    ) -> Float[Array, "b n d"]:
        """``dtype`` is what the encoder computes in; None: the type of its parameters."""
        vectors = self.token_embedding(text.ids, text.mask)
        vectors = vectors if dtype is None else vectors.astype(dtype)
        return self.encoded(vectors, text.mask, train=train, key=key)

    def encoded(
        self,
        vectors: Float[Array, "b n d"],
        mask: Bool[Array, "b n"] | None = None,
        *,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "b n d"]:
        x = dropout(vectors, self.dropout, train=train, key=fold(key, 0))
        places = jnp.arange(x.shape[1])[None]
        bias = self.relative(places, places)
        x = self.stack(x, bias=bias, key_mask=mask, causal=False, train=train, key=fold(key, 1))
        return dropout(self.norm(x), self.dropout, train=train, key=fold(key, 2))


def t5_blocks(
    size: T5Size,
    *,
    crosses: bool,
    dropout: float,
    implementation: Implementation,
    remat: Remat,
    unroll: int,
    key: PRNGKeyArray,
) -> DecoderStack:
    """The blocks of an encoder, or with ``crosses`` of a decoder: no biases, logits that are not scaled."""
    return DecoderStack(
        size.depth,
        size.width,
        size.num_heads,
        size.mlp_dim,
        memory_width=size.width if crosses else None,
        inner_width=size.num_heads * size.head_width,
        scaled=False,
        use_bias=False,
        norm="rms",
        eps=EPS,
        mlp="gated" if size.gated else "plain",
        activation="gelu_tanh" if size.gated else "relu",
        dropout=dropout,
        implementation=implementation,
        remat=remat,
        unroll=unroll,
        init=lecun_normal,
        key=key,
    )
