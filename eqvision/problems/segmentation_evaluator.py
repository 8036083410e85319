"""Evaluation of a segmenter on a split: intersection over union, the loss, and samples for pictures."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, UInt8

from eqvision.data import device_feed
from eqvision.evaluate import StoppedEvaluation, local_rows
from eqvision.mesh import BATCH
from eqvision.metrics import Mean, PixelConfusion, SegmentationMetric, merge
from eqvision.sharding import parameter_specs, sharded_call
from eqvision.types import SegmentationBatch

NUM_SAMPLES = 8


class SegmentationSample(NamedTuple):
    """A test image as the model saw it, its labels and the predicted classes, for a picture."""

    index: int
    image: UInt8[np.ndarray, "h w c"]
    labels: Int[np.ndarray, "h w"]
    predicted: Int[np.ndarray, "h w"]


class SegmentationSums(NamedTuple):
    """Of a batch: terms of the loss, and pixels by true and predicted class."""

    terms: dict[str, Mean]
    confusion: PixelConfusion


class SegmentationEvaluation(NamedTuple):
    """The figures by name, what they are made from, and samples."""

    metrics: dict[str, float]
    pixels: SegmentationMetric
    samples: tuple[SegmentationSample, ...]


@runtime_checkable
class Evaluated(Protocol):
    """What the evaluator needs of a problem."""

    @property
    def test_source(self) -> Any: ...

    def evaluation_stream(self) -> Any: ...

    def evaluate_batch(
        self, model: Any, batch: SegmentationBatch, stats: eqx.nn.State
    ) -> tuple[SegmentationSums, Int[Array, "b h w"]]: ...


class SegmentationEvaluator:
    """``evaluator(model, stats)`` runs the split; compiled once for each shape of image."""

    def __init__(self, problem: Evaluated, mesh: Mesh):
        self._problem, self._mesh = problem, mesh

        @jax.jit
        def step(batch: SegmentationBatch, model: Any, stats: eqx.nn.State):
            specs = parameter_specs(model, mesh)
            return sharded_call(problem.evaluate_batch, mesh, specs, (P(), BATCH))(model, batch, stats)

        self._step = step

    def __call__(
        self, model: Any, stats: eqx.nn.State, *, stop: Callable[[], bool] = lambda: False
    ) -> SegmentationEvaluation:
        """Raises StoppedEvaluation as soon as ``stop()`` says so."""
        source, terms = self._problem.test_source, {}
        metric = SegmentationMetric(source.class_names)
        wanted = set(np.linspace(0, len(source) - 1, min(NUM_SAMPLES, len(source))).round().astype(int).tolist())
        samples: list[SegmentationSample] = []
        with device_feed(self._problem.evaluation_stream(), NamedSharding(self._mesh, BATCH)) as feed:
            for batch in feed:
                if stop():
                    raise StoppedEvaluation
                sums, predicted = self._step(batch, model, stats)
                metric.update(sums.confusion)
                terms = merge(terms, sums.terms) if terms else sums.terms
                samples += _samples(batch, predicted, wanted)
        # of void pixels alone: divided by 1, as in training
        loss = sum(float(part.total) / (float(part.weight) or 1.0) for part in terms.values())
        metrics = {"loss": loss, **metric.compute()}
        return SegmentationEvaluation(metrics, metric, tuple(samples))


def _samples(batch: SegmentationBatch, predicted: Array, wanted: set[int]) -> list[SegmentationSample]:
    indices, sizes = local_rows(batch.indices), local_rows(batch.size)
    rows = [row for row, index in enumerate(indices.tolist()) if index in wanted]
    if not rows:
        return []
    images, labels, classes = local_rows(batch.images), local_rows(batch.labels), local_rows(predicted)
    cut = [tuple(slice(side) for side in sizes[row]) for row in rows]
    return [
        SegmentationSample(int(indices[row]), images[row][area], labels[row][area], classes[row][area])
        for row, area in zip(rows, cut, strict=True)
    ]
