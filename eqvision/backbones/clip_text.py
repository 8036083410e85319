"""The text towers of CLIP (Radford et al. 2021, section 2.4) and of SigLIP (Zhai et al. 2023)."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

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
)
from eqvision.types import TextTokens


class TextSize(NamedTuple):
    width: int
    depth: int
    num_heads: int
    mlp_dim: int


class ClipText(eqx.Module):
    """Token and position embeddings, a scanned stack of pre-norm blocks, a final norm over all tokens.

    CLIP's tokens see those before them (``causal``) and no padding. SigLIP's see all, and padding too, for so it was
    trained: ``attend_padding``. Its activation is ``gelu_tanh`` and its ``eps`` 1e-6. An id that is not in the
    vocabulary has NaN for its vector, so that a tokenizer of another model does not go unnoticed.

    Raises ValueError for texts longer than the ``length`` positions.
    """

    token_embedding: TokenEmbedding
    position: PositionEmbedding1D
    encoder: TransformerStack
    norm: LayerNorm
    dropout: float = eqx.field(static=True)
    causal: bool = eqx.field(static=True)
    attend_padding: bool = eqx.field(static=True)
    channels: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        size: TextSize,
        *,
        vocab_size: int = 49408,
        length: int = 77,
        causal: bool = True,
        attend_padding: bool = False,
        activation: Activation = "quick_gelu",
        eps: float = 1e-5,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        implementation: Implementation = "xla",
        remat: Remat = "none",
        unroll: int = 1,
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key, 3)
        self.token_embedding = TokenEmbedding(vocab_size, size.width, key=keys[0])
        self.position = PositionEmbedding1D(length, size.width, std=0.01, key=keys[1])
        self.encoder = TransformerStack(
            size.depth,
            size.width,
            size.num_heads,
            size.mlp_dim,
            eps=eps,
            activation=activation,
            dropout=dropout,
            drop_path=drop_path,
            implementation=implementation,
            remat=remat,
            unroll=unroll,
            key=keys[2],
        )
        self.norm = LayerNorm(size.width, eps=eps)
        self.dropout = dropout
        self.causal = causal
        self.attend_padding = attend_padding
        self.channels = (size.width,)

    def __call__(
        self, text: TextTokens, *, dtype: DTypeLike | None = None, train: bool = False, key: PRNGKeyArray | None = None
    ) -> Float[Array, "b n d"]:
        """``dtype`` is what the tower computes in; None: the type of its parameters."""
        # Nobody reads a causal tower's padding, which may therefore be anything; SigLIP reads the last place.
        tokens = self.token_embedding(text.ids, text.mask if self.causal else None)
        tokens = tokens + self.position(text.ids.shape[1])
        tokens = tokens if dtype is None else tokens.astype(dtype)
        tokens = dropout(tokens, self.dropout, train=train, key=fold(key, 0))
        key_mask = None if self.attend_padding else text.mask
        tokens = self.encoder(tokens, key_mask=key_mask, causal=self.causal, train=train, key=fold(key, 1))
        return self.norm(tokens)


def pool_end(features: Float[Array, "b n d"], text: TextTokens, *, end_id: int | None = None) -> Float[Array, "b d"]:
    """The feature of each text's end token, which in a causal tower has seen the whole text.

    It is the first token of ``end_id``; None: the first of the highest id, which is the end token in OpenAI's
    vocabulary. Padding is not looked at. A text without an end token gives its first feature, as in transformers.
    """
    hits = jnp.where(text.mask, text.ids, -1) if end_id is None else text.mask & (text.ids == end_id)
    index = jnp.argmax(hits, axis=1)
    return jnp.take_along_axis(features, index[:, None, None], axis=1)[:, 0]
