"""The tasks of GLUE (Wang et al. 2019, table 1) and what each of them reports."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Num

from eqvision.metrics.agreement import f1_score, matthews_correlation, pearson_correlation, spearman_correlation
from eqvision.names import nearest


class GlueTask(NamedTuple):
    """``classes`` are names in the order of the labels; none: a regression. ``metrics`` are names of ``METRICS``."""

    classes: tuple[str, ...]
    metrics: tuple[str, ...]

    @property
    def num_outputs(self) -> int:
        """Width of the model's head."""
        return max(1, len(self.classes))


ENTAILMENT = ("entailment", "neutral", "contradiction")
# The order of classes is that of the GLUE data sets of Hugging Face and TensorFlow Datasets.
GLUE_TASKS: dict[str, GlueTask] = {
    "cola": GlueTask(("unacceptable", "acceptable"), ("matthews",)),
    "sst2": GlueTask(("negative", "positive"), ("accuracy",)),
    "mrpc": GlueTask(("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "qqp": GlueTask(("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "stsb": GlueTask((), ("pearson", "spearman")),  # similarity in [0, 5]
    "mnli_matched": GlueTask(ENTAILMENT, ("accuracy",)),
    "mnli_mismatched": GlueTask(ENTAILMENT, ("accuracy",)),
    "qnli": GlueTask(("entailment", "not_entailment"), ("accuracy",)),
    "rte": GlueTask(("entailment", "not_entailment"), ("accuracy",)),
    "wnli": GlueTask(("not_entailment", "entailment"), ("accuracy",)),
    "ax": GlueTask(ENTAILMENT, ("matthews",)),  # diagnostics, by a model of MNLI; no training data
}

Metric = Callable[[np.ndarray, np.ndarray], float]


def _accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(predicted == labels)) if labels.size else float("nan")


METRICS: dict[str, Metric] = {
    "accuracy": _accuracy,
    "f1": f1_score,
    "matthews": matthews_correlation,
    "pearson": pearson_correlation,
    "spearman": spearman_correlation,
}


def glue_task(name: str) -> GlueTask:
    """A row of ``GLUE_TASKS``. Raises UnknownNameError with the nearest names."""
    if name not in GLUE_TASKS:
        raise nearest(name, list(GLUE_TASKS), "GLUE task")
    return GLUE_TASKS[name]


class GlueMetric:
    """Keeps what was predicted and what is right, and gives the figures of a task, each in [-1, 1] or [0, 1].

    ``update`` raises ValueError for outputs of another width than the task's, outputs that are NaN and labels that are
    no class of it.
    """

    def __init__(self, task: str) -> None:
        self.name, self.task = task, glue_task(task)
        self._predicted: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []

    def update(
        self, outputs: Float[np.ndarray, "b k"], labels: Num[np.ndarray, " b"], weights: Num[np.ndarray, " b"]
    ) -> None:
        """Add the outputs of a head for one batch; rows of weight 0 are dropped."""
        used = np.asarray(weights) != 0
        outputs, labels = np.asarray(outputs)[used], np.asarray(labels)[used]
        self._check(outputs, labels)
        self._predicted.append(outputs.argmax(axis=1) if self.task.classes else outputs[:, 0].astype(np.float64))
        self._labels.append(labels.astype(np.int64 if self.task.classes else np.float64))

    def merge(self, other: "GlueMetric") -> "GlueMetric":
        """A new accumulator over the examples of both. Raises ValueError for another task's."""
        if other.name != self.name:
            raise ValueError(f"figures of {self.name} and of {other.name} cannot be merged: they are two tasks.")
        merged = GlueMetric(self.name)
        merged._predicted = self._predicted + other._predicted
        merged._labels = self._labels + other._labels
        return merged

    def compute(self) -> dict[str, float]:
        """The figures by name; NaN of no examples."""
        predicted, labels = _joined(self._predicted), _joined(self._labels)
        return {name: METRICS[name](predicted, labels) for name in self.task.metrics}

    def _check(self, outputs: np.ndarray, labels: np.ndarray) -> None:
        if outputs.shape[1] != self.task.num_outputs:
            raise ValueError(
                f"GLUE's {self.name} needs {self.task.num_outputs} outputs, and the model gives {outputs.shape[1]}; "
                f"build it with num_classes={self.task.num_outputs}."
            )
        if np.isnan(outputs).any():
            row = int(np.flatnonzero(np.isnan(outputs).any(axis=1))[0])
            raise ValueError(
                f"the outputs for example {row} of this batch are NaN; nothing can be predicted from them."
            )
        if self.task.classes and not np.isin(labels, np.arange(len(self.task.classes))).all():
            wrong = labels[~np.isin(labels, np.arange(len(self.task.classes)))][0]
            raise ValueError(
                f"label {wrong} is no class of GLUE's {self.name}, which are 0..{len(self.task.classes) - 1} "
                f"({', '.join(self.task.classes)}); test splits have no labels."
            )


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)
