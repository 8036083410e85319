"""One pass of a masked autoencoder over a split."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float, UInt8

from eqvision.data import Source, device_feed
from eqvision.evaluate import StoppedEvaluation, local_rows
from eqvision.mesh import BATCH
from eqvision.metrics import Mean, compute, merge
from eqvision.pretraining import MAE, MAEOutputs
from eqvision.sharding import parameter_specs, sharded_call
from eqvision.types import ClassificationBatch

NUM_SAMPLES = 12


class MaskedSample(NamedTuple):
    """An image of the split, the pixels that were predicted for its patches, and which patches were masked."""

    image: UInt8[np.ndarray, "h w c"]
    pixels: Float[np.ndarray, "n p"]
    mask: Bool[np.ndarray, " n"]


class MaskedEvaluation(NamedTuple):
    """The loss, and samples in the order of the split."""

    metrics: dict[str, float]
    samples: tuple[MaskedSample, ...]


@runtime_checkable
class Evaluated(Protocol):
    """What the evaluator needs of a problem."""

    @property
    def test_source(self) -> Source: ...

    def evaluation_stream(self) -> Iterator[ClassificationBatch]: ...

    def evaluate_batch(
        self, model: MAE, batch: ClassificationBatch, stats: eqx.nn.State
    ) -> tuple[dict[str, Mean], MAEOutputs]: ...


class MaskedEvaluator:
    """``evaluator(model, stats)`` runs the split; compiled once."""

    def __init__(self, problem: Evaluated, mesh: Mesh):
        self._problem, self._mesh = problem, mesh

        @jax.jit
        def step(batch: ClassificationBatch, model: MAE, stats: eqx.nn.State):
            specs = parameter_specs(model, mesh)
            return sharded_call(problem.evaluate_batch, mesh, specs, (P(), BATCH))(model, batch, stats)

        self._step = step

    def __call__(
        self, model: MAE, stats: eqx.nn.State, *, stop: Callable[[], bool] = lambda: False
    ) -> MaskedEvaluation:
        """Raises StoppedEvaluation as soon as ``stop()`` says so."""
        sums: dict[str, Mean] = {}
        samples: list[MaskedSample] = []
        length = len(self._problem.test_source)
        wanted = np.linspace(0, length - 1, min(NUM_SAMPLES, length)).round().astype(int)
        stream: Any = self._problem.evaluation_stream()
        with device_feed(stream, NamedSharding(self._mesh, BATCH)) as feed:
            for batch in feed:
                if stop():
                    raise StoppedEvaluation
                found, outputs = self._step(batch, model, stats)
                sums = merge(sums, found) if sums else found
                samples += _samples(batch, outputs, wanted)
        return MaskedEvaluation(compute(sums), tuple(samples))


def _samples(batch: ClassificationBatch, outputs: MAEOutputs, wanted: np.ndarray) -> list[MaskedSample]:
    """The rows of the batch whose place in the source is ``wanted``, as far as this host holds them."""
    rows = np.flatnonzero(np.isin(local_rows(batch.indices), wanted))
    if not len(rows):
        return []
    images, pixels, mask = local_rows(batch.images), local_rows(outputs.pixels), local_rows(outputs.mask)
    return [MaskedSample(images[row], np.asarray(pixels[row], np.float32), mask[row]) for row in rows]
