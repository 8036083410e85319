"""Losses on words: the cross entropy of tokens, and BERT's two pre-training tasks.

Normalisers are global, as in ``segmentation.py``: ``bert_counts`` gives the sums of one device, the caller adds them up
over devices (and over the parts of an accumulated batch) and hands the result to ``bert_loss``, whose value is then
this device's share. ``token_cross_entropy`` and the weights of its tokens go to ``weighted_mean`` or ``weighted_sums``.

Tokens of weight 0 may hold anything, NaN logits and targets outside the vocabulary included, and change neither loss
nor gradients. A target outside the vocabulary that counts makes the loss NaN, so that the words of another tokenizer
do not train in silence.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from eqvision.losses.classification import softmax_cross_entropy
from eqvision.losses.reduce import mask_rows
from eqvision.types import BertOutputs


def token_cross_entropy(
    logits: Float[Array, "... v"],
    targets: Int[Array, "..."],
    weights: Float[Array, "..."],
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Float[Array, "..."]:
    """Cross entropy of each token, in nats and float32; 0 where its weight is 0, else the weight does not matter.

    Smoothing turns targets ``t`` into ``t * (1 - s) + s / v``, as in ``softmax_cross_entropy``, without a row of the
    vocabulary's length for each target. ``z_loss`` is the factor of the squared logarithm of the softmax's normaliser,
    which keeps logits from drifting (1e-4 in T5X). Raises ValueError for a smoothing outside [0, 1) and for targets or
    weights of another shape than the logits' tokens.
    """
    _check(logits, targets, weights, label_smoothing)
    logits = mask_rows(logits, weights).astype(jnp.float32)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    known = (targets >= 0) & (targets < logits.shape[-1])
    at = jnp.take_along_axis(logits, jnp.where(known, targets, 0)[..., None], axis=-1)[..., 0]
    values = normaliser - (1 - label_smoothing) * at
    if label_smoothing:
        values = values - label_smoothing * jnp.mean(logits, axis=-1)
    values = values + z_loss * jnp.square(normaliser)
    return mask_rows(jnp.where(known, values, jnp.nan), weights)


def _check(logits: Array, targets: Array, weights: Array, smoothing: float) -> None:
    if not 0.0 <= smoothing < 1.0:
        raise ValueError(f"label_smoothing is {smoothing}; expected a value in [0, 1), commonly 0.1.")
    if not targets.shape == weights.shape == logits.shape[:-1]:
        raise ValueError(
            f"logits of shape {logits.shape} are for tokens of shape {logits.shape[:-1]}, but the targets have shape "
            f"{targets.shape} and their weights {weights.shape}; give one target and one weight for each token."
        )


class BertTargets(NamedTuple):
    """What BERT should have said: the words, which of them count, and whether the second text is another's (1) or not.

    ``word_weights`` are 1 at hidden words and 0 elsewhere, where ``words`` may be anything. ``next_sentence`` is None
    where the texts are no pairs.
    """

    words: Int[Array, "b n"]
    word_weights: Float[Array, "b n"]
    next_sentence: Int[Array, " b"] | None = None


class BertCounts(NamedTuple):
    """What the losses are divided by: hidden words, and texts."""

    words: Float[Array, ""]
    texts: Float[Array, ""]


def bert_counts(targets: BertTargets, weights: Float[Array, " b"]) -> BertCounts:
    """Counts of the rows given, those of weight 0 left out.

    Sum them over devices, as by ``jax.tree.map(global_sum, counts)``.
    """
    return BertCounts(_word_weights(targets, weights).sum(), weights.astype(jnp.float32).sum())


def bert_loss(
    outputs: BertOutputs,
    targets: BertTargets,
    weights: Float[Array, " b"],
    counts: BertCounts,
    *,
    label_smoothing: float = 0.0,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """This device's share of the loss, and of its terms ``mlm`` and ``next_sentence`` (Devlin et al. 2019, A.2).

    The first is the mean over all hidden words of the global batch, and not that of the texts' means; the second the
    mean over texts. They are added. ``weights`` are 0 for texts that only pad the batch, ``counts`` the global sums of
    ``bert_counts``; a count of 0 gives 0. Raises ValueError where model and targets differ in having next sentences.
    """
    each = _word_weights(targets, weights)
    values = token_cross_entropy(outputs.mlm_logits, targets.words, each, label_smoothing=label_smoothing)
    terms = {"mlm": (values * each).sum() / _divisor(counts.words)}
    if (outputs.next_sentence is None) != (targets.next_sentence is None):
        has, lacks = ("model", "data") if targets.next_sentence is None else ("data", "model")
        raise ValueError(f"the {has} has next sentences and the {lacks} none; next_sentence=... of the model says it.")
    if outputs.next_sentence is not None and targets.next_sentence is not None:
        logits, weights = mask_rows(outputs.next_sentence, weights), weights.astype(jnp.float32)
        values = mask_rows(softmax_cross_entropy(logits, targets.next_sentence), weights)
        terms["next_sentence"] = (values * weights).sum() / _divisor(counts.texts)
    return jnp.stack(list(terms.values())).sum(), terms


def _word_weights(targets: BertTargets, weights: Float[Array, " b"]) -> Float[Array, "b n"]:
    """A text that only pads the batch has no hidden words, whatever it holds."""
    weights = weights.astype(jnp.float32)[:, None]
    return jnp.where(weights == 0, 0.0, targets.word_weights.astype(jnp.float32) * weights)


def _divisor(count: Float[Array, ""]) -> Float[Array, ""]:
    return jnp.where(count == 0, 1.0, count)
