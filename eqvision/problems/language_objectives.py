"""What kinds of language models differ in: how they are asked, and their losses."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from eqvision.language.t5 import shift_right
from eqvision.losses import BertCounts, BertTargets, bert_counts, bert_loss, softmax_cross_entropy, token_cross_entropy
from eqvision.metrics import Mean, accuracy
from eqvision.recipes.text_config import LanguageTaskConfig
from eqvision.types import LanguageBatch

Loss = tuple[Float[Array, ""], dict[str, Float[Array, ""]]]


class Told(NamedTuple):
    """Of a batch: the cross entropy of each target, the likeliest token in its place, whether the model could not see
    the target, and parts of the loss that are not of tokens."""

    values: Float[Array, "b m"]
    likeliest: Int[Array, "b m"]
    unseen: Bool[Array, "b m"]
    loss_parts: dict[str, Mean]
    figures: dict[str, Mean]


@runtime_checkable
class Objective(Protocol):
    """Of a language model."""

    def loss(self, model: Any, batch: LanguageBatch, dtype: Any, key: Key[Array, ""], counts: BertCounts) -> Loss:
        """This device's share of the loss and its terms, whose divisors are ``counts``."""
        ...

    def tell(self, model: Any, batch: LanguageBatch, dtype: Any) -> Told: ...


def target_counts(batch: LanguageBatch) -> BertCounts:
    """What the losses are divided by: tokens that are to be told, and texts."""
    return bert_counts(_targets(batch), batch.weights)


def target_weights(batch: LanguageBatch) -> Float[Array, "b m"]:
    """1 on what is to be told; 0 elsewhere, and on rows that only pad the batch."""
    return batch.target_mask * batch.weights[:, None]


def _targets(batch: LanguageBatch) -> BertTargets:
    return BertTargets(batch.targets, batch.target_mask.astype(jnp.float32), batch.next_sentence)


@dataclass(frozen=True)
class HiddenWords:
    """BERT's: the model is asked for the words at ``positions`` alone, and for whether the second text follows.

    A tenth of these words stand in the text as they are, and to know that alone is worth half a nat a word: what counts
    as unseen are the words behind ``[MASK]``.
    """

    task: LanguageTaskConfig
    mask: int

    def loss(self, model: Any, batch: LanguageBatch, dtype: Any, key: Key[Array, ""], counts: BertCounts) -> Loss:
        outputs = model(batch.text, positions=batch.positions, dtype=dtype, train=True, key=key)
        smoothing = self.task.label_smoothing
        return bert_loss(outputs, _targets(batch), batch.weights, counts, label_smoothing=smoothing)

    def tell(self, model: Any, batch: LanguageBatch, dtype: Any) -> Told:
        outputs = model(batch.text, positions=batch.positions, dtype=dtype)
        values = token_cross_entropy(outputs.mlm_logits, batch.targets, target_weights(batch))
        parts, figures = {}, {}
        if batch.next_sentence is not None:
            pair = softmax_cross_entropy(outputs.next_sentence, batch.next_sentence)
            parts["next_sentence_loss"] = Mean.of(pair, batch.weights)
            figures["next_sentence_accuracy"] = accuracy(outputs.next_sentence, batch.next_sentence, batch.weights)
        assert batch.positions is not None
        unseen = jnp.take_along_axis(batch.text.ids, batch.positions, axis=1) == self.mask
        return Told(values, jnp.argmax(outputs.mlm_logits, axis=-1), unseen, parts, figures)


@dataclass(frozen=True)
class Spans:
    """T5's: the decoder writes what was taken out, each span behind its sentinel."""

    task: LanguageTaskConfig
    start: int
    """What the decoder reads first."""

    def loss(self, model: Any, batch: LanguageBatch, dtype: Any, key: Key[Array, ""], counts: BertCounts) -> Loss:
        logits = model(batch.text, shift_right(batch.targets, self.start), dtype=dtype, train=True, key=key)
        weights = target_weights(batch)
        options = {"label_smoothing": self.task.label_smoothing, "z_loss": self.task.z_loss}
        values = token_cross_entropy(logits, batch.targets, weights, **options)
        return (values * weights).sum() / jnp.where(counts.words == 0, 1.0, counts.words), {}

    def tell(self, model: Any, batch: LanguageBatch, dtype: Any) -> Told:
        logits = model(batch.text, shift_right(batch.targets, self.start), dtype=dtype)
        values = token_cross_entropy(logits, batch.targets, target_weights(batch))
        return Told(values, jnp.argmax(logits, axis=-1), jnp.ones_like(batch.target_mask), {}, {})
