"""One pass over a split: every example counts once, whatever the batch size and the number of devices."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, UInt8

from eqvision.classifiers import Classifier
from eqvision.data import Source, device_feed, eval_stream, eval_transform, normalize
from eqvision.mesh import BATCH
from eqvision.metrics import all_reduce, compute, merge
from eqvision.recipes import TrainConfig
from eqvision.sharding import parameter_specs, sharded_call
from eqvision.tasks import Task
from eqvision.types import ClassificationBatch

NUM_SAMPLES = 16


class Samples(NamedTuple):
    """A few examples with what the model said, for a picture."""

    images: UInt8[np.ndarray, "n h w c"]
    labels: np.ndarray
    outputs: Float[np.ndarray, "n k"]


@dataclass(frozen=True)
class Evaluation:
    """Metrics by name, the confusion matrix of a single-label task, and samples."""

    metrics: dict[str, float]
    confusion: Float[np.ndarray, "k k"] | None
    samples: Samples


class StoppedEvaluation(Exception):
    """The evaluation was left unfinished on request."""


class Evaluator:
    """``evaluator(model, stats)`` runs the split; compiled once."""

    def __init__(self, config: TrainConfig, task: Task, source: Source, mesh: Mesh):
        self._config, self._task, self._source, self._mesh = config, task, source, mesh
        self._step = make_eval_step(task, mesh, config)

    def __call__(
        self, model: Classifier, stats: eqx.nn.State, *, stop: Callable[[], bool] = lambda: False
    ) -> Evaluation:
        """Raises StoppedEvaluation as soon as ``stop()`` says so."""
        sums: dict[str, Any] = {}
        samples, host = [], self._task.host_metrics()
        wanted = np.linspace(0, len(self._source) - 1, min(NUM_SAMPLES, len(self._source))).round().astype(int)
        with device_feed(self._stream(), NamedSharding(self._mesh, BATCH)) as feed:
            for batch in feed:
                if stop():
                    raise StoppedEvaluation
                batch_sums, outputs = self._step(batch, model, stats)
                sums = merge(sums, batch_sums) if sums else batch_sums
                samples.append(_samples(batch, outputs, wanted))
                for metric in host.values():
                    metric.update(*_gathered(outputs, batch.labels, batch.weights))
        confusion = np.asarray(sums["confusion"].counts) if "confusion" in sums else None
        scalars = {name: metric for name, metric in sums.items() if name != "confusion"}
        together = Samples(*(np.concatenate(column) for column in zip(*samples, strict=True)))
        return Evaluation(compute({**scalars, **host}), confusion, together)

    def _stream(self):
        return evaluation_stream(self._config, self._source)


def evaluation_stream(config: TrainConfig, source: Source) -> Iterator[ClassificationBatch]:
    """This process's rows of every batch of a split, prepared as in evaluation."""
    data = config.data
    return eval_stream(
        source,
        batch_size=config.loop.eval_batch_size,
        transform=eval_transform(data.transform, config.model.image_size, data.interpolation, data.crop_fraction),
        num_threads=data.num_threads,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def make_eval_step(task: Task, mesh: Mesh, config: TrainConfig) -> Callable[..., tuple[dict[str, Any], Array]]:
    """``(batch, model, stats) -> (sums over the global batch, outputs)``."""
    dtype = jnp.dtype(config.loop.compute_dtype)

    def local(model: Classifier, batch: ClassificationBatch, stats: eqx.nn.State):
        images = jnp.asarray(normalize(batch.images, config.data.mean, config.data.std), dtype)
        outputs, _ = model(images, stats)
        return all_reduce(task.metrics(outputs, batch)), outputs

    @jax.jit
    def step(batch: ClassificationBatch, model: Classifier, stats: eqx.nn.State):
        return sharded_call(local, mesh, parameter_specs(model, mesh), (P(), BATCH))(model, batch, stats)

    return step


def _gathered(*arrays: Array) -> list[np.ndarray]:
    """The rows of all hosts, in numpy."""
    from jax.experimental.multihost_utils import process_allgather

    return [np.asarray(process_allgather(array, tiled=True)) for array in arrays]


def _samples(batch: ClassificationBatch, outputs: Array, wanted: np.ndarray) -> Samples:
    """The rows of the batch whose place in the source is ``wanted``, as far as this host holds them."""
    chosen = np.flatnonzero(np.isin(local_rows(batch.indices), wanted))
    if not len(chosen):
        return Samples(*(np.zeros((0, *x.shape[1:]), x.dtype) for x in (batch.images, batch.labels, outputs)))
    return Samples(*(local_rows(x)[chosen] for x in (batch.images, batch.labels, outputs)))


def local_rows(array: Array) -> np.ndarray:
    """The rows that this host holds."""
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])
