"""Single-label and multi-label classification, and regression."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from eqvision.losses import (
    absolute_error,
    mask_rows,
    sigmoid_cross_entropy,
    sigmoid_focal,
    softmax_cross_entropy,
    softmax_focal,
    squared_error,
)
from eqvision.metrics import (
    Mean,
    MeanAveragePrecision,
    accuracy,
    calibration_error,
    confusion_matrix,
    mean_absolute_error,
    mean_squared_error,
    precision_at_k,
    recall,
)
from eqvision.types import ClassificationBatch, WeightedValues

Sums = dict[str, Any]  # metrics that are sums on the device


@runtime_checkable
class Task(Protocol):
    """What the loop needs to know of a problem."""

    @property
    def headline(self) -> str:
        """The metric that sums up an evaluation."""
        ...

    def loss(self, outputs: Float[Array, "b k"], batch: ClassificationBatch) -> WeightedValues: ...

    def metrics(self, outputs: Float[Array, "b k"], batch: ClassificationBatch) -> Sums: ...

    def host_metrics(self) -> dict[str, MeanAveragePrecision]:
        """Accumulators that need the outputs of all examples; empty where there are none."""
        ...


@dataclass(frozen=True)
class SingleLabel:
    """One class per image."""

    loss_name: str = "cross_entropy"
    label_smoothing: float = 0.0
    headline: str = "accuracy"

    def loss(self, outputs: Float[Array, "b k"], batch: ClassificationBatch) -> WeightedValues:
        logits = mask_rows(outputs, batch.weights)
        if self.loss_name == "focal":
            return WeightedValues(softmax_focal(logits, batch.labels), batch.weights)
        values = softmax_cross_entropy(logits, batch.labels, label_smoothing=self.label_smoothing)
        return WeightedValues(values, batch.weights)

    def metrics(self, outputs: Float[Array, "b k"], batch: ClassificationBatch) -> Sums:
        given = (outputs, batch.labels, batch.weights)
        sums = {
            "loss": Mean.of(*self.loss(outputs, batch)),
            "accuracy": accuracy(*given),
            "calibration_error": calibration_error(*given),
            "confusion": confusion_matrix(*given),
        }
        return {**sums, "top5_accuracy": accuracy(*given, top=5)} if outputs.shape[1] > 5 else sums

    def host_metrics(self) -> dict[str, MeanAveragePrecision]:
        return {}


@dataclass(frozen=True)
class MultiLabel:
    """Any number of classes per image."""

    loss_name: str = "cross_entropy"
    label_smoothing: float = 0.0
    headline: str = "mean_average_precision"

    def loss(self, outputs: Float[Array, "b k"], batch: ClassificationBatch) -> WeightedValues:
        logits = mask_rows(outputs, batch.weights)
        if self.loss_name == "focal":
            return WeightedValues(sigmoid_focal(logits, batch.labels), batch.weights)
        values = sigmoid_cross_entropy(logits, batch.labels, label_smoothing=self.label_smoothing)
        return WeightedValues(values, batch.weights)

    def metrics(self, outputs: Float[Array, "b k"], batch: ClassificationBatch) -> Sums:
        given = (outputs, batch.labels, batch.weights)
        return {
            "loss": Mean.of(*self.loss(outputs, batch)),
            "precision_at_1": precision_at_k(*given, k=1),
            "recall": recall(*given),
        }

    def host_metrics(self) -> dict[str, MeanAveragePrecision]:
        return {"mean_average_precision": MeanAveragePrecision()}


@dataclass(frozen=True)
class Regression:
    """Real values per image; the mean over outputs is the loss of an image."""

    loss_name: str = "squared_error"
    headline: str = "mean_squared_error"

    def loss(self, outputs: Float[Array, "b k"], batch: ClassificationBatch) -> WeightedValues:
        error = absolute_error if self.loss_name == "absolute_error" else squared_error
        return WeightedValues(error(mask_rows(outputs, batch.weights), _columns(batch.labels)), batch.weights)

    def metrics(self, outputs: Float[Array, "b k"], batch: ClassificationBatch) -> Sums:
        given = (outputs, _columns(batch.labels), batch.weights)
        return {
            "loss": Mean.of(*self.loss(outputs, batch)),
            "mean_squared_error": mean_squared_error(*given),
            "mean_absolute_error": mean_absolute_error(*given),
        }

    def host_metrics(self) -> dict[str, MeanAveragePrecision]:
        return {}


def _columns(labels: Array) -> Float[Array, "b k"]:
    labels = labels.astype(jnp.float32)
    return labels[:, None] if labels.ndim == 1 else labels


LOSSES = {
    "single_label": ("cross_entropy", "focal"),
    "multi_label": ("cross_entropy", "focal"),
    "regression": ("squared_error", "absolute_error"),
}


def make_task(kind: str, loss: str, label_smoothing: float = 0.0) -> Task:
    """The task of a configuration. Raises ValueError for a loss that does not fit the kind, or smoothing the loss."""
    if kind not in LOSSES:
        raise ValueError(f"task.kind is {kind!r}; choose from {', '.join(LOSSES)}")
    if loss not in LOSSES[kind]:
        raise ValueError(f"task.loss {loss!r} does not fit task.kind {kind!r}; choose from {', '.join(LOSSES[kind])}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"task.label_smoothing is {label_smoothing}; expected a value in [0, 1), commonly 0.1")
    if label_smoothing and loss != "cross_entropy":
        raise ValueError(f"task.loss {loss!r} has no label smoothing; leave task.label_smoothing at 0")
    if kind == "regression":
        return Regression(loss)
    return (SingleLabel if kind == "single_label" else MultiLabel)(loss, label_smoothing)
