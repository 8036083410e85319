"""Evaluation of a model with prompts on a split: IoU for boxes and clicks, and samples for pictures."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, UInt8

from eqvision.data import device_feed
from eqvision.evaluate import StoppedEvaluation, local_rows
from eqvision.mesh import BATCH
from eqvision.metrics import Mean, merge
from eqvision.sharding import parameter_specs, sharded_call
from eqvision.types import DetectionBatch

NUM_SAMPLES = 8


class PromptedFound(NamedTuple):
    """For the box of each object: logits of the mask that was found, the true one at their size, and their IoU."""

    logits: Float[Array, "b p h w"]
    masks: Float[Array, "b p h w"]
    valid: Bool[Array, "b p"]
    iou: Float[Array, "b p"]


class PromptedSample(NamedTuple):
    """A test image as the model saw it, its objects' boxes, and the masks found for them at the size of logits."""

    index: int
    image: UInt8[np.ndarray, "h w c"]
    boxes: Float[np.ndarray, "n 4"]
    found: Bool[np.ndarray, "n h2 w2"]
    masks: Bool[np.ndarray, "n h2 w2"]
    iou: Float[np.ndarray, " n"]


class PromptedEvaluation(NamedTuple):
    metrics: dict[str, float]
    samples: tuple[PromptedSample, ...]


@runtime_checkable
class Evaluated(Protocol):
    """What the evaluator needs of a problem."""

    @property
    def test_source(self) -> Any: ...

    def evaluation_stream(self) -> Any: ...

    def evaluate_batch(
        self, model: Any, batch: DetectionBatch, stats: eqx.nn.State
    ) -> tuple[dict[str, Mean], PromptedFound]: ...


class PromptedEvaluator:
    """``evaluator(model, stats)`` runs the split; compiled once."""

    def __init__(self, problem: Evaluated, mesh: Mesh):
        self._problem, self._mesh = problem, mesh

        @jax.jit
        def step(batch: DetectionBatch, model: Any, stats: eqx.nn.State):
            specs = parameter_specs(model, mesh)
            return sharded_call(problem.evaluate_batch, mesh, specs, (P(), BATCH))(model, batch, stats)

        self._step = step

    def __call__(
        self, model: Any, stats: eqx.nn.State, *, stop: Callable[[], bool] = lambda: False
    ) -> PromptedEvaluation:
        """Raises StoppedEvaluation as soon as ``stop()`` says so."""
        source, sums = self._problem.test_source, {}
        wanted = set(np.linspace(0, len(source) - 1, min(NUM_SAMPLES, len(source))).round().astype(int).tolist())
        samples: list[PromptedSample] = []
        with device_feed(self._problem.evaluation_stream(), NamedSharding(self._mesh, BATCH)) as feed:
            for batch in feed:
                if stop():
                    raise StoppedEvaluation
                mine, found = self._step(batch, model, stats)
                sums = merge(sums, mine) if sums else mine
                samples += _samples(batch, found, wanted)
        metrics = {name: float(part.total) / (float(part.weight) or 1.0) for name, part in sums.items()}
        return PromptedEvaluation(metrics, tuple(samples))


def _samples(batch: DetectionBatch, found: PromptedFound, wanted: set[int]) -> list[PromptedSample]:
    indices = local_rows(batch.indices)
    rows = [row for row, index in enumerate(indices.tolist()) if index in wanted]
    if not rows:
        return []
    images, sizes, boxes = (local_rows(each) for each in (batch.images, batch.size, batch.targets.boxes))
    logits, masks, valid, iou = (local_rows(each) for each in found)
    return [
        PromptedSample(
            int(indices[row]),
            images[row][: sizes[row][0], : sizes[row][1]],
            boxes[row][valid[row]],
            logits[row][valid[row]] > 0,
            masks[row][valid[row]] > 0.5,
            iou[row][valid[row]],
        )
        for row in rows
    ]
