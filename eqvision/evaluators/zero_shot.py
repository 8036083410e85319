"""Classes told by their names: of each, the mean vector of some sentences that name it (Radford et al. 2021, 3.1.4)."""

import numpy as np
from jaxtyping import Float, Int

from eqvision.evaluators.checks import check_features
from eqvision.evaluators.linear_probe import accuracy
from eqvision.multimodal.zero_shot import check_prompts, class_vectors

__all__ = ["check_prompts", "class_vectors", "zero_shot"]


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
