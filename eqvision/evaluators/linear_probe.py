"""A linear classifier on frozen features, fitted on all training examples."""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from eqvision.evaluators.checks import check_features, check_pair
from eqvision.evaluators.logistic import logistic_regression
from eqvision.evaluators.ridge import ridge_system
from eqvision.evaluators.splits import validation_rows

L2S = tuple(2.0**power for power in range(-10, 21))
LOGISTIC_L2S = L2S[::3]  # a fit for each by iteration, not one decomposition for all

Kind = Literal["ridge", "logistic"]
Matrix = Float[np.ndarray, "n d"]
Labels = Int[np.ndarray, " n"]


class ProbeResult(NamedTuple):
    """Accuracy on the test examples, in [0, 1]; the strength of regularisation and the validation accuracy that chose
    it; and the classifier, ``features @ weight + bias``.
    """

    accuracy: float
    l2: float
    validation_accuracy: float
    weight: Float[np.ndarray, "d k"]
    bias: Float[np.ndarray, " k"]


def linear_probe(
    train_features: Float[np.ndarray, "n d"],
    train_labels: Int[np.ndarray, " n"],
    test_features: Float[np.ndarray, "m e"],
    test_labels: Int[np.ndarray, " m"],
    *,
    num_classes: int,
    kind: Kind = "ridge",
    l2s: tuple[float, ...] | None = None,
    seed: int = 0,
) -> ProbeResult:
    """Fit a linear classifier and count how many test examples it labels correctly.

    ``ridge`` is least squares on one-hot targets in closed form (``ridge.py``), ``logistic`` multinomial logistic
    regression (``logistic.py``). The strength of regularisation is the one of ``l2s`` (None: powers of two from 2^-10
    to 2^20) with the best accuracy on a fifth of the training examples that is held out for it, the middle one among
    equals; then all training examples are fitted. Test examples choose nothing.

    Raises ValueError for features and labels that do not fit together.
    """
    check_pair(train_features, test_features)
    check_features(train_features, train_labels, num_classes, "training")
    check_features(test_features, test_labels, num_classes, "test")
    if kind not in ("ridge", "logistic"):
        raise ValueError(f"kind={kind!r}; expected 'ridge' or 'logistic'")
    fit = _logistic if kind == "logistic" else _ridge
    l2s = l2s or (LOGISTIC_L2S if kind == "logistic" else L2S)
    weight, bias, l2, best = fit(train_features, train_labels, num_classes, l2s, seed)
    return ProbeResult(accuracy(test_features @ weight + bias, test_labels), l2, best, weight, bias)


Fitted = tuple[np.ndarray, np.ndarray, float, float]  # weight, bias, l2 and its validation accuracy


def _ridge(features: Matrix, labels: Labels, num_classes: int, l2s: tuple[float, ...], seed: int) -> Fitted:
    held = validation_rows(labels, seed)
    trial = ridge_system(features[~held], labels[~held], num_classes)
    l2, best = select(l2s, trial.scores(features[held], l2s), labels[held])
    weight, bias = ridge_system(features, labels, num_classes).solve(l2)
    return weight, bias, l2, best


def _logistic(features: Matrix, labels: Labels, num_classes: int, l2s: tuple[float, ...], seed: int) -> Fitted:
    held, strong_first = validation_rows(labels, seed), tuple(sorted(l2s, reverse=True))
    trials = logistic_regression(features[~held], labels[~held], num_classes, strong_first)
    l2, best = select(strong_first, [features[held] @ fit.weight + fit.bias for fit in trials], labels[held])
    fit = logistic_regression(features, labels, num_classes, (l2,))[0]
    return fit.weight, fit.bias, l2, best


def select(l2s: tuple[float, ...], scores: list[Float[np.ndarray, "n k"]], labels: Labels) -> tuple[float, float]:
    """The strength whose scores label most examples correctly, the middle one among equals; and that accuracy."""
    accuracies = [accuracy(each, labels) for each in scores]
    best = max(accuracies)
    # Easy data are labelled equally well over decades of strength, whose ends are the least sure.
    equals = sorted(l2 for l2, value in zip(l2s, accuracies, strict=True) if value == best)
    return equals[len(equals) // 2], best


def accuracy(scores: Float[np.ndarray, "n k"], labels: Labels) -> float:
    """Share of rows whose largest score is at the label; the lower class wins a tie."""
    return float(np.mean(scores.argmax(axis=1) == labels))
