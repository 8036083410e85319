"""Few-shot classification of frozen features by ridge regression."""

import numpy as np
from jaxtyping import Float, Int

from eqvision.evaluators.checks import check_features, check_pair
from eqvision.evaluators.linear_probe import L2S, ProbeResult, accuracy, select
from eqvision.evaluators.ridge import ridge_system
from eqvision.evaluators.splits import rarest_class, shot_rows, validation_rows

SHOTS = (1, 5, 10, 25)  # of big_vision's fewshot_lsr


def few_shot(
    train_features: Float[np.ndarray, "n d"],
    train_labels: Int[np.ndarray, " n"],
    test_features: Float[np.ndarray, "m e"],
    test_labels: Int[np.ndarray, " m"],
    *,
    num_classes: int,
    shots: int,
    l2s: tuple[float, ...] = L2S,
    seed: int = 0,
) -> ProbeResult:
    """Ridge regression on one-hot targets, fitted on ``shots`` examples of each class (ViT, Dosovitskiy et al. 2021,
    section 4.1).

    The shots are a function of the seed, and fewer shots are among more. The strength of regularisation is the one
    of ``l2s`` with the best accuracy on a fifth of the training examples, which is held out for it and gives no
    shots; the middle one among equals. Test examples choose nothing. Big_vision chooses on the test split and scales
    each feature to unit variance; both are otherwise here, so that numbers compare with scikit-learn's ``Ridge``.

    Raises ValueError that names the class where one has fewer examples than ``shots``, and for features and labels
    that do not fit together.
    """
    check_pair(train_features, test_features)
    check_features(train_features, train_labels, num_classes, "training")
    check_features(test_features, test_labels, num_classes, "test")
    rarest, available = rarest_class(train_labels, seed)
    if available < shots:
        raise ValueError(too_few(str(rarest), available, shots))
    held, chosen = validation_rows(train_labels, seed), shot_rows(train_labels, shots, seed)
    system = ridge_system(train_features[chosen], train_labels[chosen], num_classes)
    l2, best = select(l2s, system.scores(train_features[held], l2s), train_labels[held])
    weight, bias = system.solve(l2)
    return ProbeResult(accuracy(test_features @ weight + bias, test_labels), l2, best, weight, bias)


def too_few(name: str, available: int, shots: int) -> str:
    """What to say of a class that has fewer examples than shots."""
    return (
        f"class {name} has {available} training examples beside those held out to choose the regularisation, "
        f"and few-shot with {shots} shots needs {shots} of each class"
    )
