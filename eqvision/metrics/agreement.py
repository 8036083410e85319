"""How well predictions agree with labels, as the tasks of GLUE measure it: plain numbers from whole data sets in numpy.

Each equals scikit-learn's or scipy's function of that name. What is undefined (no examples, values that are all the
same) is NaN, but for F1 and Matthews, where scikit-learn's 0 is kept.
"""

import numpy as np
from jaxtyping import Int, Num


def f1_score(predicted: Int[np.ndarray, " n"], labels: Int[np.ndarray, " m"], *, positive: int = 1) -> float:
    """Harmonic mean of precision and recall of the class ``positive``; 0 where it is neither predicted nor there."""
    _check(predicted, labels)
    if not labels.size:
        return float("nan")
    hits = np.sum((predicted == positive) & (labels == positive))
    both = np.sum(predicted == positive) + np.sum(labels == positive)
    return float(2 * hits / both) if both else 0.0


def matthews_correlation(predicted: Int[np.ndarray, " n"], labels: Int[np.ndarray, " m"]) -> float:
    """Matthews' correlation coefficient in [-1, 1] for any number of classes (Gorodkin 2004).

    0 where all predictions or all labels are one class.
    """
    _check(predicted, labels)
    if not labels.size:
        return float("nan")
    classes = np.union1d(predicted, labels)
    said, true = (np.sum(x[:, None] == classes, axis=0).astype(np.float64) for x in (predicted, labels))
    total, right = float(labels.size), float(np.sum(predicted == labels))
    spread = (total**2 - said @ said) * (total**2 - true @ true)
    return float((right * total - said @ true) / np.sqrt(spread)) if spread > 0 else 0.0


def pearson_correlation(predicted: Num[np.ndarray, " n"], labels: Num[np.ndarray, " m"]) -> float:
    """Correlation of the values, in [-1, 1]; NaN for fewer than two examples and for constant values."""
    _check(predicted, labels)
    x, y = (values - values.mean() if values.size else values for values in _float64(predicted, labels))
    spread = np.sqrt(x @ x) * np.sqrt(y @ y)
    return float(np.clip(x @ y / spread, -1.0, 1.0)) if x.size > 1 and spread > 0 else float("nan")


def spearman_correlation(predicted: Num[np.ndarray, " n"], labels: Num[np.ndarray, " m"]) -> float:
    """Correlation of the ranks, equal values sharing the mean of theirs; NaN as ``pearson_correlation``."""
    _check(predicted, labels)
    if np.isnan(predicted).any() or np.isnan(labels).any():
        return float("nan")
    return pearson_correlation(_ranks(predicted), _ranks(labels))


def _ranks(values: Num[np.ndarray, " n"]) -> Num[np.ndarray, " n"]:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]


def _float64(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    return tuple(np.asarray(array, np.float64) for array in arrays)


def _check(predicted: np.ndarray, labels: np.ndarray) -> None:
    if predicted.shape != labels.shape:
        raise ValueError(f"{predicted.shape[0]} predictions and {labels.shape[0]} labels; expected as many of each.")
