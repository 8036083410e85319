"""Evaluation of a language model on a part of the text: loss, perplexity, accuracy, and samples to read."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from eqvision.data import device_feed
from eqvision.evaluate import StoppedEvaluation, local_rows
from eqvision.mesh import BATCH
from eqvision.metrics import Mean, Perplexity, compute, merge
from eqvision.sharding import parameter_specs, sharded_call
from eqvision.types import LanguageBatch

NUM_SAMPLES = 8


class LanguageSample(NamedTuple):
    """A text as the model read it, without padding; what was to be told, and the likeliest token in place of each;
    where these stood, for hidden words."""

    index: int
    ids: Int[np.ndarray, " n"]
    targets: Int[np.ndarray, " m"]
    likeliest: Int[np.ndarray, " m"]
    positions: Int[np.ndarray, " m"] | None


class LanguageSums(NamedTuple):
    """Of a batch: parts of the loss, which are added; of words alone (neither sentinels nor the end) their perplexity
    and other figures."""

    parts: dict[str, Mean]
    perplexity: Perplexity
    figures: dict[str, Mean]


class LanguageEvaluation(NamedTuple):
    """The figures by name, and samples."""

    metrics: dict[str, float]
    samples: tuple[LanguageSample, ...]


@runtime_checkable
class Evaluated(Protocol):
    """What the evaluator needs of a problem."""

    @property
    def test_source(self) -> Any: ...

    def evaluation_stream(self) -> Any: ...

    def evaluate_batch(
        self, model: Any, batch: LanguageBatch, stats: eqx.nn.State
    ) -> tuple[LanguageSums, Int[Array, "b m"]]: ...


class LanguageEvaluator:
    """``evaluator(model, stats)`` runs the split; compiled once."""

    def __init__(self, problem: Evaluated, mesh: Mesh):
        self._problem, self._mesh = problem, mesh

        @jax.jit
        def step(batch: LanguageBatch, model: Any, stats: eqx.nn.State):
            specs = parameter_specs(model, mesh)
            return sharded_call(problem.evaluate_batch, mesh, specs, (P(), BATCH))(model, batch, stats)

        self._step = step

    def __call__(
        self, model: Any, stats: eqx.nn.State, *, stop: Callable[[], bool] = lambda: False
    ) -> LanguageEvaluation:
        """Raises StoppedEvaluation as soon as ``stop()`` says so."""
        length = len(self._problem.test_source)
        wanted = np.linspace(0, length - 1, min(NUM_SAMPLES, length)).round().astype(int)
        samples: list[LanguageSample] = []
        sums: LanguageSums | None = None
        with device_feed(self._problem.evaluation_stream(), NamedSharding(self._mesh, BATCH)) as feed:
            for batch in feed:
                if stop():
                    raise StoppedEvaluation
                found, likeliest = self._step(batch, model, stats)
                sums = found if sums is None else merge(sums, found)
                samples += _samples(batch, likeliest, wanted)
        assert sums is not None, "streams refuse a source without examples"
        parts = compute(sums.parts)
        others = {name: value for name, value in parts.items() if name != "targets"}
        figures = {**compute(sums.figures), "perplexity": sums.perplexity.compute()}
        return LanguageEvaluation({"loss": sum(parts.values()), **figures, **others}, tuple(samples))


def _samples(batch: LanguageBatch, likeliest: Array, wanted: np.ndarray) -> list[LanguageSample]:
    """The rows of the batch whose place in the split is ``wanted``, as far as this host holds them."""
    indices = local_rows(batch.indices)
    rows = np.flatnonzero(np.isin(indices, wanted))
    if not len(rows):
        return []
    ids, real = local_rows(batch.text.ids), local_rows(batch.text.mask)
    targets, asked, told = local_rows(batch.targets), local_rows(batch.target_mask), local_rows(likeliest)
    places = None if batch.positions is None else local_rows(batch.positions)
    return [
        LanguageSample(
            int(indices[row]),
            ids[row][real[row]],
            targets[row][asked[row]],
            told[row][asked[row]],
            None if places is None else places[row][asked[row]],
        )
        for row in rows
    ]
