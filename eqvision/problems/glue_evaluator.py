"""Evaluation on a task of GLUE, and what people look at in its run folder."""

import importlib.util
import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from eqvision.data import device_feed
from eqvision.evaluate import StoppedEvaluation
from eqvision.mesh import BATCH
from eqvision.metrics import GlueMetric, Mean, merge
from eqvision.report import plot_curves
from eqvision.run_folder import Row, RunFolder, without_nan
from eqvision.sharding import parameter_specs, sharded_call
from eqvision.types import LabelledTextBatch

NUM_SAMPLES = 20


class GlueEvaluation(NamedTuple):
    """The figures by name, and the outputs for the first examples."""

    metrics: dict[str, float]
    indices: Int[np.ndarray, " n"]
    outputs: Float[np.ndarray, "n k"]


@runtime_checkable
class Evaluated(Protocol):
    """What the evaluator needs of a problem."""

    @property
    def task_name(self) -> str: ...

    def evaluation_stream(self) -> Any: ...

    def evaluate_batch(
        self, model: Any, batch: LabelledTextBatch, stats: eqx.nn.State
    ) -> tuple[Mean, Float[Array, "b k"]]: ...


class GlueEvaluator:
    """``evaluator(model, stats)`` runs the split; compiled once."""

    def __init__(self, problem: Evaluated, mesh: Mesh):
        self._problem, self._mesh = problem, mesh

        @jax.jit
        def step(batch: LabelledTextBatch, model: Any, stats: eqx.nn.State):
            specs = parameter_specs(model, mesh)
            return sharded_call(problem.evaluate_batch, mesh, specs, (P(), BATCH))(model, batch, stats)

        self._step = step

    def __call__(self, model: Any, stats: eqx.nn.State, *, stop: Callable[[], bool] = lambda: False) -> GlueEvaluation:
        """Raises StoppedEvaluation as soon as ``stop()`` says so."""
        metric, loss, seen = GlueMetric(self._problem.task_name), None, []
        with device_feed(self._problem.evaluation_stream(), NamedSharding(self._mesh, BATCH)) as feed:
            for batch in feed:
                if stop():
                    raise StoppedEvaluation
                found, outputs = self._step(batch, model, stats)
                loss = found if loss is None else merge(loss, found)
                outputs, labels, weights, indices = _all_rows(outputs, batch.labels, batch.weights, batch.indices)
                metric.update(outputs, labels, weights)
                seen.append((indices[weights != 0], outputs[weights != 0]))
        assert loss is not None, "streams refuse a source without examples"
        indices, outputs = (np.concatenate(column)[:NUM_SAMPLES] for column in zip(*seen[:NUM_SAMPLES], strict=True))
        return GlueEvaluation({"loss": loss.compute(), **metric.compute()}, indices, outputs)


def _all_rows(*arrays: Array) -> list[np.ndarray]:
    """The rows of all hosts, in numpy."""
    from jax.experimental.multihost_utils import process_allgather

    return [np.asarray(process_allgather(array, tiled=True)) for array in arrays]


def write_glue_report(folder: RunFolder, rows: list[Row], evaluation: GlueEvaluation, problem: Any) -> None:
    """``result.json``, ``predictions.txt`` (the first texts with what the model says) and the learning curve, where
    matplotlib is installed, else a line that says how."""
    metrics = {f"test/{name}": value for name, value in evaluation.metrics.items()}
    (folder.path / "result.json").write_text(json.dumps(without_nan(metrics), indent=2))
    lines = map(_line, evaluation.indices, evaluation.outputs, [problem.test_source] * len(evaluation.indices))
    (folder.path / "predictions.txt").write_text("\n".join(lines) + "\n", "utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots were drawn: matplotlib is not installed (pip install 'eqvision[plots]')", file=sys.stderr)
        return
    plot_curves(folder.path / "learning_curve.png", rows, problem.headline)


def _line(index: Any, outputs: np.ndarray, source: Any) -> str:
    """``right  acceptable  The cat sat.``; of a regression both values."""
    (first, second, label), names = source[int(index)], source.class_names
    text = first if second is None else f"{first} | {second}"
    if not names:
        return f"{outputs[0]:.2f}\tis {label:.2f}\t{text}"
    told, true = names[int(outputs.argmax())], names[int(label)]
    return f"{told}\t{'right' if told == true else f'is {true}'}\t{text}"
