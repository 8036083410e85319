"""Which training examples choose the regularisation, and which are the shots. Both are functions of the seed alone."""

import numpy as np
from jaxtyping import Bool, Int

Labels = Int[np.ndarray, " n"]
Rows = Bool[np.ndarray, " n"]

VALIDATION_SHARE = 0.2
MAX_VALIDATION = 10_000  # examples; more say nothing new about one number, and cost time at 1,000 classes


def class_ranks(labels: Labels, seed: int) -> Labels:
    """The place of each example within its class, in a random order: 0, 1, ... in every class."""
    # RandomState, whose stream numpy has frozen: the shots must not change with a numpy version.
    order = np.random.RandomState(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    first = np.searchsorted(labels[order], labels[order])
    ranks = np.empty(len(labels), np.int64)
    ranks[order] = np.arange(len(labels)) - first
    return ranks


def validation_rows(labels: Labels, seed: int) -> Rows:
    """True for the held-out examples: a fifth of each class, at least one of a class of two or more.

    At most about 10,000 in all. Raises ValueError where no class has two examples.
    """
    classes, counts = np.unique(labels, return_counts=True)
    most = max(1, MAX_VALIDATION // max(1, len(classes)))
    held = np.clip((counts * VALIDATION_SHARE).astype(int), np.minimum(1, counts - 1), most)
    if not held.any():
        raise ValueError(
            f"{len(labels)} training examples of {len(classes)} classes: no class has two, so that none can be held "
            "out to choose the regularisation; give at least two examples of a class"
        )
    return class_ranks(labels, seed) < held[np.searchsorted(classes, labels)]


def shot_rows(labels: Labels, shots: int, seed: int) -> Rows:
    """True for the first ``shots`` examples of each class that are not held out; fewer shots are among more.

    Raises ValueError for ``shots`` below 1.
    """
    if shots < 1:
        raise ValueError(f"shots={shots}; expected 1 or more examples of each class")
    held = validation_rows(labels, seed)
    classes = np.unique(labels)
    num_held = np.array([held[labels == each].sum() for each in classes])
    ranks = class_ranks(labels, seed) - num_held[np.searchsorted(classes, labels)]
    return ~held & (ranks < shots)


def rarest_class(labels: Labels, seed: int) -> tuple[int, int]:
    """Of the classes that occur: the one with the fewest examples that may be shots, and their number."""
    classes = np.unique(labels)
    available = np.bincount(labels[~validation_rows(labels, seed)], minlength=classes[-1] + 1)[classes]
    rarest = int(np.argmin(available))
    return int(classes[rarest]), int(available[rarest])
