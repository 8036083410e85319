"""Mean average precision of multi-label classification: on the host, since it ranks all scores of a class."""

import numpy as np
from jaxtyping import Float, Num, Shaped


class MeanAveragePrecision:
    """Keeps scores and labels in numpy; equals ``sklearn.metrics.average_precision_score`` class by class.

    Give it logits rather than sigmoids: the ranking is the same, and a saturated sigmoid makes ties. Memory
    is eight bytes for each example and class. ``update`` raises ValueError for shapes that differ, NaN logits
    and labels other than 0 and 1; ``compute`` for no batch and for batches of different widths.
    """

    def __init__(self) -> None:
        self._scores: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._weights: list[np.ndarray] = []

    def update(
        self, logits: Float[np.ndarray, "b k"], labels: Num[np.ndarray, "b k"], weights: Num[np.ndarray, " b"]
    ) -> None:
        """Add one batch of 0/1 labels; rows of weight 0 are dropped."""
        used = np.asarray(weights) != 0
        scores, labels = np.asarray(logits, np.float32)[used], np.asarray(labels, np.float32)[used]
        self._check(scores, labels)
        self._scores.append(scores)
        self._labels.append(labels)
        self._weights.append(np.asarray(weights, np.float64)[used])

    def merge(self, other: "MeanAveragePrecision") -> "MeanAveragePrecision":
        """A new accumulator over the examples of both."""
        merged = MeanAveragePrecision()
        merged._scores = self._scores + other._scores
        merged._labels = self._labels + other._labels
        merged._weights = self._weights + other._weights
        return merged

    def per_class(self) -> Float[np.ndarray, " k"]:
        """Average precision of each class, 0..1; NaN for classes without a positive."""
        if not self._scores:
            raise ValueError("average precision of no batch; call update at least once before compute.")
        self._check_widths()
        scores, labels = np.concatenate(self._scores), np.concatenate(self._labels)
        weights = np.concatenate(self._weights)
        return np.array([average_precision(scores[:, c], labels[:, c], weights) for c in range(scores.shape[1])])

    def compute(self) -> float:
        """Mean over the classes that have positives; NaN if none has."""
        values = self.per_class()
        values = values[~np.isnan(values)]
        return float(values.mean()) if values.size else float("nan")

    def _check(self, scores: np.ndarray, labels: np.ndarray) -> None:
        if scores.shape != labels.shape:
            raise ValueError(
                f"logits have shape {scores.shape} and labels {labels.shape}; expected equal shapes [b k]."
            )
        if np.isnan(scores).any():
            rows = np.flatnonzero(np.isnan(scores).any(axis=1))
            raise ValueError(f"logits are NaN in {rows.size} of {len(scores)} counted rows; they cannot be ranked.")
        if not np.isin(labels, (0, 1)).all():
            raise ValueError("labels hold values other than 0 and 1; average precision needs hard multi-hot labels.")

    def _check_widths(self) -> None:
        widths = {scores.shape[1] for scores in self._scores}
        if len(widths) > 1:
            raise ValueError(f"batches have different numbers of classes: {sorted(widths)}; expected one number.")


def average_precision(
    scores: Float[np.ndarray, " n"], labels: Shaped[np.ndarray, " n"], weights: Num[np.ndarray, " n"]
) -> float:
    """Sum of precision times gain in recall over distinct scores, highest first; NaN without positives.

    Not interpolated: the definition of ``sklearn.metrics.average_precision_score``.
    """
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    # equal scores are one threshold, so that the result does not depend on the order of the examples
    ends = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1) if len(ranked) else []
    found = np.cumsum((labels * weights)[order], dtype=np.float64)[ends]
    if not len(found) or found[-1] == 0:
        return float("nan")
    precision = found / np.cumsum(weights[order], dtype=np.float64)[ends]
    return float((np.diff(found / found[-1], prepend=0.0) * precision).sum())
