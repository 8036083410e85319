"""Classes told by their names: of each, the mean vector of some sentences that name it (Radford et al. 2021, 3.1.4)."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

from eqvision.evaluators.checks import check_features
from eqvision.evaluators.linear_probe import accuracy

Embed = Callable[[tuple[str, ...]], Float[np.ndarray, "m d"]]


def class_vectors(embed: Embed, names: Sequence[str], templates: Sequence[str]) -> Float[np.ndarray, "k d"]:
    """A vector of length one for each name: the mean of those that ``embed`` gives its sentences.

    ``templates`` are sentences with ``{}`` where the name stands. Raises ValueError for one without, for no templates,
    and for names that come twice.
    """
    check_prompts(names, templates)
    sentences = tuple(template.replace("{}", name) for name in names for template in templates)
    means = embed(sentences).reshape(len(names), len(templates), -1).mean(axis=1)
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def check_prompts(names: Sequence[str], templates: Sequence[str]) -> None:
    """Raise ValueError as ``class_vectors`` does."""
    if not names or len(set(names)) != len(names):
        twice = next((name for name in names if list(names).count(name) > 1), "none at all")
        raise ValueError(f"class names must differ, and {twice!r} comes twice" if names else "there are no class names")
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"the template {template!r} has no {{}} where the class's name stands")
    if not templates:
        raise ValueError("there are no templates; give at least one sentence, such as 'a photo of a {}.'")


def zero_shot(
    images: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"], classes: Float[np.ndarray, "k e"]
) -> dict[str, float]:
    """``zero_shot_accuracy``: the share of images whose nearest class is their own; and, of more than 5 classes,
    ``zero_shot_top5_accuracy``: among the nearest five. Of equally near classes the first counts.

    Raises ValueError for labels, widths and values that do not fit.
    """
    check_features(images, labels, len(classes), "image")
    if images.shape[1] != classes.shape[1]:
        raise ValueError(f"image features are {images.shape[1]} wide and class features {classes.shape[1]}")
    scores = images @ classes.T
    metrics = {"zero_shot_accuracy": accuracy(scores, labels)}
    if len(classes) > 5:
        best = np.argsort(-scores, axis=1, kind="stable")[:, :5]
        metrics["zero_shot_top5_accuracy"] = float((best == labels[:, None]).any(axis=1).mean())
    return metrics
