"""How well pixels are classified: confusion of true and predicted classes, mean IoU, accuracies."""

from collections.abc import Iterable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from eqvision.metrics.coco import all_hosts
from eqvision.metrics.sums import ratio
from eqvision.types import IGNORE_LABEL


class PixelConfusion(NamedTuple):
    """Pixels by true class (row) and predicted class (column), void ones left out; exact below 2**31.

    ``undefined`` counts pixels whose logits are NaN or whose label is no class: no figure can be told of them.
    """

    counts: Int[Array, "k k"]
    undefined: Int[Array, ""]


def pixel_confusion(
    logits: Float[Array, "b h w n"],
    labels: Int[Array, "b h w"],
    weights: Float[Array, " b"],
    *,
    num_classes: int | None = None,
) -> PixelConfusion:
    """Sums of one batch, the highest logit being the prediction; rows of weight 0 and void pixels add nothing.

    ``num_classes`` is that of the data, where the model has more: logits beyond it are never the prediction. Sum over
    devices with ``all_reduce``; over batches on the host, in ``SegmentationMetric``. Raises ValueError where the model
    has fewer classes than the data.
    """
    k = logits.shape[-1] if num_classes is None else num_classes
    if k > logits.shape[-1]:
        raise ValueError(f"the logits have {logits.shape[-1]} classes and the data {k}; expected at least as many.")
    counted = (labels != IGNORE_LABEL) & (weights != 0)[:, None, None]
    wrong = counted & (jnp.isnan(logits).any(axis=-1) | (labels < 0) | (labels >= k))
    cells = jnp.where(counted & ~wrong, labels * k + logits[..., :k].argmax(axis=-1), k * k)
    counts = jnp.zeros(k * k + 1, jnp.int32).at[cells.reshape(-1)].add(1)
    return PixelConfusion(counts[:-1].reshape(k, k), wrong.sum(dtype=jnp.int32))


class SegmentationMetric:
    """Sums of pixels over a split; each pixel that is not void counts once.

    ``update`` takes the sums of a batch, ``add`` a predicted and a true map of any size. IoU of a class is the number
    of pixels that are and are found to be it, by the number of those that are or are found to be; a class that is
    neither has none and is left out of means. Figures are NaN where a pixel was undefined.
    """

    def __init__(self, class_names: Iterable[str]) -> None:
        self.class_names = tuple(class_names)
        self.counts = np.zeros((len(self.class_names),) * 2, np.int64)
        self.undefined = 0

    def update(self, confusion: PixelConfusion) -> None:
        """Add the sums of a batch. Raises ValueError for another number of classes."""
        counts = np.asarray(confusion.counts)
        if counts.shape != self.counts.shape:
            raise ValueError(f"the sums are {counts.shape}; expected those of {len(self.class_names)} classes.")
        self.counts += counts
        self.undefined += int(confusion.undefined)

    def add(self, predicted: Integer[np.ndarray, "h w"], labels: Integer[np.ndarray, "h w"]) -> None:
        """Add an image: its predicted classes and its labels, 255 void. Raises ValueError for what does not fit."""
        k = len(self.class_names)
        if predicted.shape != labels.shape:
            raise ValueError(f"the predicted map is {predicted.shape}, the labels {labels.shape}; expected one shape.")
        counted = labels != IGNORE_LABEL
        found, true = predicted[counted].astype(np.int64), labels[counted].astype(np.int64)
        for name, values in (("predicted", found), ("true", true)):
            if values.size and not 0 <= values.min() <= values.max() < k:
                raise ValueError(
                    f"{name} classes reach from {values.min()} to {values.max()}; expected 0 to {k - 1}, in the labels "
                    f"{IGNORE_LABEL} for void pixels."
                )
        self.counts += np.bincount(true * k + found, minlength=k * k).reshape(k, k)

    def merge(self, other: "SegmentationMetric") -> "SegmentationMetric":
        """A new accumulator over the pixels of both. Raises ValueError where their classes differ."""
        if self.class_names != other.class_names:
            raise ValueError(f"metrics of different classes: {self.class_names} and {other.class_names}.")
        return self._holding(self.counts + other.counts, self.undefined + other.undefined)

    def merge_hosts(self) -> "SegmentationMetric":
        """The sums of all hosts, where each has seen other images; the same on each. Every host has to call it."""
        sums = np.append(self.counts.ravel(), self.undefined).astype(np.int64)
        total = np.sum([np.frombuffer(state, np.int64) for state in all_hosts(sums.tobytes())], axis=0)
        return self._holding(total[:-1].reshape(self.counts.shape), int(total[-1]))

    def _holding(self, counts: np.ndarray, undefined: int) -> "SegmentationMetric":
        merged = SegmentationMetric(self.class_names)
        merged.counts, merged.undefined = counts, undefined
        return merged

    def per_class(self) -> dict[str, Float[np.ndarray, " k"]]:
        """``iou``, ``accuracy`` (share of the true pixels found), ``precision``, and ``share`` of all true pixels.

        From 0 to 1; NaN for what has no pixels.
        """
        right, true, found = np.diagonal(self.counts), self.counts.sum(axis=1), self.counts.sum(axis=0)
        figures = {
            "iou": _quotients(right, true + found - right),
            "accuracy": _quotients(right, true),
            "precision": _quotients(right, found),
            "share": _quotients(true, np.full(len(true), true.sum())),
        }
        return {name: np.full_like(values, np.nan) if self.undefined else values for name, values in figures.items()}

    def compute(self) -> dict[str, float]:
        """``mean_iou`` and ``mean_accuracy`` over the classes that have them, ``pixel_accuracy`` over all pixels."""
        classes = self.per_class()
        right = ratio(float(np.trace(self.counts)), float(self.counts.sum()))
        return {
            "mean_iou": _mean(classes["iou"]),
            "pixel_accuracy": float("nan") if self.undefined else right,
            "mean_accuracy": _mean(classes["accuracy"]),
        }

    def table(self) -> str:
        """The figures of each class in percent, a line each, and their means."""
        classes, total = self.per_class(), self.compute()
        columns = ("iou", "accuracy", "precision", "share")
        width = max(len("mean over classes"), *(len(name) for name in self.class_names))
        lines = [f"{'class':{width}}" + "".join(f"{name:>11}" for name in columns)]
        for k, name in enumerate(self.class_names):
            lines.append(f"{name:{width}}" + "".join(_percent(classes[column][k]) for column in columns))
        means = total["mean_iou"], total["mean_accuracy"], _mean(classes["precision"])
        lines.append(f"{'mean over classes':{width}}" + "".join(map(_percent, means)))
        lines.append(f"{'all pixels':{width}}" + " " * 11 + _percent(total["pixel_accuracy"]))
        return "\n".join(lines)


def _quotients(above: np.ndarray, below: np.ndarray) -> Float[np.ndarray, " k"]:
    return np.divide(above, below, out=np.full(len(above), np.nan), where=below != 0)


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def _percent(value: float) -> str:
    return f"{'-' if np.isnan(value) else f'{100 * value:.1f}':>11}"
