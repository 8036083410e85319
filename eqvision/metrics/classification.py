"""Classification metrics as device sums: accuracy, precision and recall at k, confusion matrix, calibration.

Labels are class indices ``[b]`` or rows ``[b k]``. NaN logits or a class index out of range make the metric
NaN, because any count would be an accident of ``argmax``; the same in a row of weight 0 changes nothing.
Equal logits rank the lower class index first.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from eqvision.losses.classification import label_rows
from eqvision.losses.reduce import mask_rows
from eqvision.metrics.sums import Mean, ratio
from eqvision.types import Labels


def accuracy(logits: Float[Array, "b k"], labels: Labels, weights: Float[Array, " b"], *, top: int = 1) -> Mean:
    """Share of examples whose class is among the ``top`` highest logits.

    The class of a soft row is its largest entry; with several positives use ``precision_at_k``. Raises
    ValueError for ``top`` outside 1..number of classes and for labels that do not fit the logits.
    """
    _check_rank("top", top, logits.shape[1])
    logits, rows = logits.astype(jnp.float32), label_rows(labels, logits.shape)
    return Mean.of(_in_top(logits, rows, top), weights)


def precision_at_k(logits: Float[Array, "b k"], labels: Labels, weights: Float[Array, " b"], *, k: int = 1) -> Mean:
    """Mean over examples of the share of positives among the ``k`` highest logits.

    With ``k=1`` this is Scenic's ``prec@1`` for multi-label data. Raises ValueError for
    ``k`` outside 1..number of classes and for labels that do not fit the logits.
    """
    _check_rank("k", k, logits.shape[1])
    logits, rows = logits.astype(jnp.float32), label_rows(labels, logits.shape)
    best = jax.lax.top_k(logits, k)[1]
    hits = jnp.take_along_axis(rows, best, axis=1).sum(axis=1)
    return Mean.of(jnp.where(_undefined(logits, rows), jnp.nan, hits / k), weights)


def recall(logits: Float[Array, "b k"], labels: Labels, weights: Float[Array, " b"]) -> Mean:
    """Mean over examples of the share of an example's n positives found among its n highest logits.

    Rows are multi-hot, 0 or 1. An example without positives counts as 0, as in Scenic's ``weighted_recall``.
    Raises ValueError for labels that do not fit the logits.
    """
    logits, rows = logits.astype(jnp.float32), label_rows(labels, logits.shape)
    positives = rows.sum(axis=1)
    ranked = jnp.take_along_axis(rows, jnp.argsort(-logits, axis=1), axis=1)
    found = jnp.where(jnp.arange(logits.shape[1]) < positives[:, None], ranked, 0.0).sum(axis=1)
    found = found / jnp.maximum(positives, 1.0)
    return Mean.of(jnp.where(_undefined(logits, rows), jnp.nan, found), weights)


class ConfusionMatrix(NamedTuple):
    """Weight of examples by true class (row) and predicted class (column)."""

    counts: Float[Array, "k k"]

    def normalized(self) -> Float[np.ndarray, "k k"]:
        """Rows divided by their sums, each class's share predicted as each class; NaN for absent classes."""
        counts = np.asarray(self.counts, np.float64)
        totals = counts.sum(axis=1, keepdims=True)
        return np.divide(counts, totals, out=np.full_like(counts, np.nan), where=totals != 0)

    def class_accuracy(self) -> Float[np.ndarray, " k"]:
        """Share of each class that was predicted right; NaN for classes without examples."""
        return np.diagonal(self.normalized())

    def compute(self) -> dict[str, float]:
        """Overall accuracy, and the mean of the class accuracies over the classes that have examples."""
        counts = np.asarray(self.counts, np.float64)
        classes = self.class_accuracy()[counts.sum(axis=1) != 0]
        mean = float(classes.mean()) if classes.size else float("nan")
        return {"accuracy": ratio(float(np.trace(counts)), float(counts.sum())), "mean_class_accuracy": mean}


def confusion_matrix(logits: Float[Array, "b k"], labels: Labels, weights: Float[Array, " b"]) -> ConfusionMatrix:
    """Sums of one batch, the highest logit being the prediction.

    Raises ValueError for labels that do not fit the logits.
    """
    rows = label_rows(labels, logits.shape)
    counted = _spoil(weights.astype(jnp.float32), logits, rows)
    empty = jnp.zeros((logits.shape[1],) * 2, jnp.float32)
    return ConfusionMatrix(empty.at[rows.argmax(axis=1), logits.argmax(axis=1)].add(counted))


class CalibrationError(NamedTuple):
    """Expected calibration error (Guo et al. 2017, equation 3): sums per bin of equal width."""

    confidence: Float[Array, " bins"]
    correct: Float[Array, " bins"]
    weight: Float[Array, " bins"]

    def compute(self) -> float:
        """Mean over examples of the gap between confidence and accuracy of their bin, or NaN."""
        gaps = np.abs(np.asarray(self.confidence, np.float64) - np.asarray(self.correct, np.float64))
        return ratio(float(gaps.sum()), float(np.asarray(self.weight, np.float64).sum()))


def calibration_error(
    logits: Float[Array, "b k"], labels: Labels, weights: Float[Array, " b"], *, num_bins: int = 15
) -> CalibrationError:
    """Sums of one batch, confidence being the largest softmax probability.

    Bins are open below and closed above. Raises ValueError for labels that do not fit the logits and for
    fewer than one bin.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins is {num_bins}; expected 1 or more (15 is usual).")
    logits, rows = logits.astype(jnp.float32), label_rows(labels, logits.shape)
    weights = weights.astype(jnp.float32)
    confidence = mask_rows(jax.nn.softmax(logits, axis=1).max(axis=1), weights)
    correct = mask_rows(_in_top(logits, rows, 1), weights)
    share = _bin_membership(confidence, num_bins) * weights[:, None]
    sums = (share * confidence[:, None]).sum(axis=0), (share * correct[:, None]).sum(axis=0)
    return CalibrationError(*sums, weight=share.sum(axis=0))


def _bin_membership(confidence: Float[Array, " b"], num_bins: int) -> Bool[Array, "b bins"]:
    index = jnp.clip(jnp.ceil(confidence * num_bins) - 1, 0, num_bins - 1)
    return index[:, None] == jnp.arange(num_bins)


def _in_top(logits: Float[Array, "b k"], rows: Float[Array, "b k"], top: int) -> Float[Array, " b"]:
    """1 where fewer than ``top`` classes rank before the labelled one: a count, cheaper than a sort."""
    hit = _rank(logits, rows.argmax(axis=1)) < top
    return jnp.where(_undefined(logits, rows), jnp.nan, hit.astype(jnp.float32))


def _rank(logits: Float[Array, "b k"], labels: Int[Array, " b"]) -> Int[Array, " b"]:
    score = jnp.take_along_axis(logits, labels[:, None], axis=1)
    earlier = jnp.arange(logits.shape[1]) < labels[:, None]
    return ((logits > score) | ((logits == score) & earlier)).sum(axis=1)


def _undefined(logits: Float[Array, "b k"], rows: Float[Array, "b k"]) -> Bool[Array, " b"]:
    return jnp.isnan(logits).any(axis=1) | jnp.isnan(rows).any(axis=1)


def _spoil(weights: Float[Array, " b"], logits: Float[Array, "b k"], rows: Float[Array, "b k"]) -> Float[Array, " b"]:
    """Weights with NaN where the row counts but cannot be judged."""
    return jnp.where(_undefined(logits, rows) & (weights != 0), jnp.nan, weights)


def _check_rank(name: str, rank: int, num_classes: int) -> None:
    if not 1 <= rank <= num_classes:
        raise ValueError(f"{name} is {rank}, but there are {num_classes} classes; expected 1 to {num_classes}.")
