"""BERT's encoder (Devlin et al. 2019, section 3): texts of words, positions and segments to one vector a token."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.backbones.checks import check_layer
from eqvision.layers import (
    Activation,
    Implementation,
    LayerNorm,
    PositionEmbedding1D,
    Remat,
    TokenEmbedding,
    TransformerStack,
    dropout,
    fold,
    mimetic_attention,
    sine_positions,
    truncated_normal,
)
from eqvision.layers.transformer import NormOrder
from eqvision.types import TextTokens


class BertSize(NamedTuple):
    width: int
    depth: int
    num_heads: int
    mlp_dim: int


# b, l: Devlin et al. 2019, section 3. ti, mini, small, medium: Turc et al. 2019, table 1 (L/H); heads of 64 channels.
# s: width and depth of Scenic's BERT-S, which is Turc's L=12, H=256 too; Scenic's embeddings are narrower (128).
# Scenic's BERT-Ti has six blocks.
BERT_SIZES: dict[str, BertSize] = {
    "ti": BertSize(128, 2, 2, 512),
    "mini": BertSize(256, 4, 4, 1024),
    "small": BertSize(512, 4, 8, 2048),
    "medium": BertSize(512, 8, 8, 2048),
    "s": BertSize(256, 12, 4, 1024),
    "b": BertSize(768, 12, 12, 3072),
    "l": BertSize(1024, 24, 16, 4096),
}


class BertEncoder(eqx.Module):
    """Sum of word, position and segment embeddings, a norm, a scanned stack of blocks.

    ``norm_order="post"`` is the published one. With ``"pre"`` (Scenic's default) the blocks normalise what they read,
    and a final norm stands behind them; unlike Scenic's, whose MLP is added to the normalised sum, both residual
    paths are straight. Dropout is that of ``TransformerBlock`` and behind the first norm; attention weights are not
    dropped. What stands in padding (``text.mask`` False) changes nothing for the other tokens. An id that is not in
    the vocabulary gives NaN in its text, so that a tokenizer of another model does not go unnoticed.

    Raises ValueError for texts longer than the ``max_positions``.
    """

    token_embedding: TokenEmbedding
    position: PositionEmbedding1D
    segment_embedding: TokenEmbedding
    embedding_norm: LayerNorm
    encoder: TransformerStack
    norm: LayerNorm | None
    dropout: float = eqx.field(static=True)
    channels: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        size: BertSize,
        *,
        vocab_size: int = 30522,
        max_positions: int = 512,
        num_segments: int = 2,
        norm_order: NormOrder = "post",
        activation: Activation = "gelu",
        eps: float = 1e-12,
        dropout: float = 0.1,
        drop_path: float = 0.0,
        implementation: Implementation = "xla",
        remat: Remat = "none",
        unroll: int = 1,
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key, 4)
        self.token_embedding = TokenEmbedding(vocab_size, size.width, init=truncated_normal, key=keys[0])
        self.position = PositionEmbedding1D(max_positions, size.width, key=keys[1])
        self.segment_embedding = TokenEmbedding(num_segments, size.width, init=truncated_normal, key=keys[2])
        self.embedding_norm = LayerNorm(size.width, eps=eps)
        self.encoder = TransformerStack(
            size.depth,
            size.width,
            size.num_heads,
            size.mlp_dim,
            norm_order=norm_order,
            eps=eps,
            activation=activation,
            dropout=dropout,
            drop_path=drop_path,
            implementation=implementation,
            remat=remat,
            unroll=unroll,
            init=truncated_normal,
            key=keys[3],
        )
        self.norm = LayerNorm(size.width, eps=eps) if norm_order == "pre" else None
        self.dropout = dropout
        self.channels = (size.width,)

    @property
    def vocab_size(self) -> int:
        return self.token_embedding.weight.shape[0]

    def __call__(
        self, text: TextTokens, *, dtype: jnp.dtype | None = None, train: bool = False, key: PRNGKeyArray | None = None
    ) -> Float[Array, "b n d"]:
        """``dtype`` is what the encoder computes in; None: the type of its parameters."""
        tokens = dropout(self._embed(text, dtype), self.dropout, train=train, key=fold(key, 0))
        return self._normalised(self.encoder(tokens, key_mask=text.mask, train=train, key=fold(key, 1)))

    def intermediates(self, text: TextTokens, layers: tuple[int, ...]) -> tuple[Float[Array, "b n d"], ...]:
        """Outputs of the blocks ``layers`` (negative: from the end), through the final norm where there is one."""
        outputs = self.encoder.intermediates(self._embed(text, None), key_mask=text.mask)
        return tuple(self._normalised(outputs[check_layer(layer, self.encoder.depth)]) for layer in layers)

    def _embed(self, text: TextTokens, dtype: jnp.dtype | None) -> Float[Array, "b n d"]:
        length, longest = text.ids.shape[1], self.position.weight.shape[0]
        if length > longest:
            raise ValueError(
                f"texts of {length} tokens are given, and this BERT has {longest} positions; "
                "cut them to that length (Tokenizer.encode_batch), or split them"
            )
        segments = jnp.zeros_like(text.ids) if text.segments is None else text.segments
        tokens = self.token_embedding(text.ids, text.mask) + self.segment_embedding(segments, text.mask)
        tokens = self.embedding_norm(tokens + self.position(length))
        return tokens if dtype is None else tokens.astype(dtype)

    def _normalised(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return tokens if self.norm is None else self.norm(tokens)


def bert_encoder(
    size: str,
    *,
    vocab_size: int = 30522,
    max_positions: int = 512,
    num_segments: int = 2,
    norm_order: NormOrder = "post",
    activation: Activation = "gelu",
    eps: float = 1e-12,
    dropout: float = 0.1,
    drop_path: float = 0.0,
    attention: Implementation = "xla",
    remat: Remat = "none",
    unroll: int = 1,
    key: PRNGKeyArray,
) -> BertEncoder:
    """BERT's encoder of a named size; the vocabulary is that of bert-base-uncased unless told otherwise."""
    if size not in BERT_SIZES:
        raise ValueError(f"BERT size {size!r} does not exist; choose from {', '.join(BERT_SIZES)}")
    return BertEncoder(
        BERT_SIZES[size],
        vocab_size=vocab_size,
        max_positions=max_positions,
        num_segments=num_segments,
        norm_order=norm_order,
        activation=activation,
        eps=eps,
        dropout=dropout,
        drop_path=drop_path,
        implementation=attention,
        remat=remat,
        unroll=unroll,
        key=key,
    )


def mimetic_bert(encoder: BertEncoder, *, key: PRNGKeyArray) -> BertEncoder:
    """The encoder with attention that begins with what is near: sines for positions, and queries equal to keys."""
    parts = (sine_positions(encoder.position), mimetic_attention(encoder.encoder.blocks.attention, key=key))
    return eqx.tree_at(lambda e: (e.position, e.encoder.blocks.attention), encoder, parts)
