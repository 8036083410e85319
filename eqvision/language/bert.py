"""BERT with its heads: pre-training on hidden words and next sentences, and classification of texts (GLUE)."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from eqvision.backbones.bert import BertEncoder, bert_encoder, mimetic_bert
from eqvision.layers import (
    Activation,
    Implementation,
    LayerNorm,
    Linear,
    Remat,
    TokenEmbedding,
    activate,
    dropout,
    fold,
    truncated_normal,
)
from eqvision.layers.transformer import NormOrder
from eqvision.types import BertOutputs, TextTokens


class TextPooler(eqx.Module):
    """The vector of a text: that of its first token, a linear layer and tanh."""

    linear: Linear

    def __init__(self, width: int, *, key: PRNGKeyArray):
        self.linear = Linear(width, width, init=truncated_normal, key=key)

    def __call__(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b d"]:
        return jnp.tanh(self.linear(tokens[:, 0]))


class HiddenWords(eqx.Module):
    """Logits of words: linear, activation, norm, and then the table of word embeddings with a bias a word."""

    linear: Linear
    norm: LayerNorm
    bias: Float[Array, " v"]
    activation: Activation = eqx.field(static=True)

    def __init__(self, width: int, vocab_size: int, *, activation: Activation, eps: float, key: PRNGKeyArray):
        self.linear = Linear(width, width, init=truncated_normal, key=key)
        self.norm = LayerNorm(width, eps=eps)
        self.bias = jnp.zeros((vocab_size,))
        self.activation = activation

    def __call__(self, tokens: Float[Array, "b n d"], words: TokenEmbedding) -> Float[Array, "b n v"]:
        hidden = self.norm(activate(self.linear(tokens), self.activation))
        return words.attend(hidden) + self.bias


class BertPretraining(eqx.Module):
    """Devlin et al. 2019, section 3.1: which words were hidden, and whether the second text follows the first.

    Without ``next_sentence`` there is neither its head nor a pooler, as in models trained on hidden words alone.
    """

    backbone: BertEncoder
    pooler: TextPooler | None
    words: HiddenWords
    next_sentence: Linear | None

    def __init__(
        self, backbone: BertEncoder, *, next_sentence: bool = True, activation: Activation = "gelu", key: PRNGKeyArray
    ):
        keys, width = jax.random.split(key, 3), backbone.channels[-1]
        eps = backbone.embedding_norm.eps
        self.backbone = backbone
        self.pooler = TextPooler(width, key=keys[0]) if next_sentence else None
        self.words = HiddenWords(width, backbone.vocab_size, activation=activation, eps=eps, key=keys[1])
        self.next_sentence = Linear(width, 2, init=truncated_normal, key=keys[2]) if next_sentence else None

    def __call__(
        self,
        text: TextTokens,
        *,
        positions: Int[Array, "b p"] | None = None,
        dtype: jnp.dtype | None = None,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> BertOutputs:
        """Logits of the words at ``positions`` of each text, or everywhere, which takes a number for each word of the
        vocabulary at each of the places."""
        tokens = self.backbone(text, dtype=dtype, train=train, key=key)
        asked = tokens if positions is None else jnp.take_along_axis(tokens, positions[..., None], axis=1)
        words = self.words(asked, self.backbone.token_embedding)
        if self.pooler is None or self.next_sentence is None:
            return BertOutputs(words, None)
        return BertOutputs(words, self.next_sentence(self.pooler(tokens)).astype(jnp.float32))


class TextClassifier(eqx.Module):
    """Logits of classes for each text or pair of texts (section 4.1); one class is the value of a regression."""

    backbone: BertEncoder
    pooler: TextPooler
    head: Linear
    dropout: float = eqx.field(static=True)

    def __init__(self, backbone: BertEncoder, num_classes: int, *, dropout: float = 0.1, key: PRNGKeyArray):
        keys, width = jax.random.split(key), backbone.channels[-1]
        self.backbone = backbone
        self.pooler = TextPooler(width, key=keys[0])
        self.head = Linear(width, num_classes, init=truncated_normal, key=keys[1])
        self.dropout = dropout

    def __call__(
        self, text: TextTokens, *, dtype: jnp.dtype | None = None, train: bool = False, key: PRNGKeyArray | None = None
    ) -> Float[Array, "b k"]:
        pooled = self.pooler(self.backbone(text, dtype=dtype, train=train, key=fold(key, 0)))
        return self.head(dropout(pooled, self.dropout, train=train, key=fold(key, 1))).astype(jnp.float32)


def bert_pretraining(
    size: str,
    *,
    vocab_size: int = 30522,
    max_positions: int = 512,
    num_segments: int = 2,
    next_sentence: bool = True,
    norm_order: NormOrder = "post",
    activation: Activation = "gelu",
    eps: float = 1e-12,
    dropout: float = 0.1,
    drop_path: float = 0.0,
    attention: Implementation = "xla",
    remat: Remat = "none",
    unroll: int = 1,
    mimetic: bool = False,
    key: PRNGKeyArray,
) -> BertPretraining:
    """BERT of a named size with the heads that it is pre-trained with.

    ``mimetic`` begins with attention to what is near (``mimetic_bert``): without it a text of a few megabytes teaches
    next to nothing of context (docs/language.md).
    """
    keys = jax.random.split(key)
    backbone = bert_encoder(
        size,
        vocab_size=vocab_size,
        max_positions=max_positions,
        num_segments=num_segments,
        norm_order=norm_order,
        activation=activation,
        eps=eps,
        dropout=dropout,
        drop_path=drop_path,
        attention=attention,
        remat=remat,
        unroll=unroll,
        key=keys[0],
    )
    backbone = mimetic_bert(backbone, key=jax.random.fold_in(key, 2)) if mimetic else backbone
    return BertPretraining(backbone, next_sentence=next_sentence, activation=activation, key=keys[1])


def bert_classifier(
    size: str,
    *,
    num_classes: int = 2,
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
) -> TextClassifier:
    """BERT of a named size with a head for classes; ``num_classes=1`` is regression, as STS-B is."""
    keys = jax.random.split(key)
    backbone = bert_encoder(
        size,
        vocab_size=vocab_size,
        max_positions=max_positions,
        num_segments=num_segments,
        norm_order=norm_order,
        activation=activation,
        eps=eps,
        dropout=dropout,
        drop_path=drop_path,
        attention=attention,
        remat=remat,
        unroll=unroll,
        key=keys[0],
    )
    return TextClassifier(backbone, num_classes, dropout=dropout, key=keys[1])
