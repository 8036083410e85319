"""Detection: boxes of objects, by set prediction."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.counting import count
from eqvision.data import device_feed
from eqvision.data.detection import DetectionStream, detection_eval_stream, detection_train_stream, normalize_padded
from eqvision.detectors import decode_sigmoid, decode_softmax
from eqvision.evaluate import StoppedEvaluation, local_rows
from eqvision.losses import detr_loss, target_counts
from eqvision.losses.set_prediction import Counts
from eqvision.mesh import BATCH
from eqvision.metrics import CocoMetric, Mean, all_reduce, compute, merge
from eqvision.ops.collectives import global_sum
from eqvision.problems.detection_data import eval_plan, load_detection, train_plan
from eqvision.recipes.detection_config import DetectionConfig
from eqvision.run_folder import Row, RunFolder
from eqvision.sharding import parameter_specs, sharded_call
from eqvision.types import DetectionBatch, Detections, PaddedImages
from eqvision.zoo import create

NUM_SAMPLES = 8


class DetectionSample(NamedTuple):
    """A test image with what is in it and what was found, for a picture."""

    index: int
    found: Detections


class DetectionEvaluation(NamedTuple):
    """The figures by name, all that was found, and samples."""

    metrics: dict[str, float]
    coco: CocoMetric
    samples: tuple[DetectionSample, ...]


@dataclass(frozen=True)
class Detection:
    """A ``Problem``: a set of boxes for each image."""

    config: DetectionConfig
    source: Any
    test_source: Any
    num_classes: int
    headline: str = "AP"

    def build(self) -> tuple[Any, eqx.nn.State]:
        model, data = self.config.model, self.config.data
        return create(
            model.name,
            num_classes=self.num_classes,
            image_size=data.size,
            in_channels=model.in_channels,
            dropout=model.dropout,
            remat=model.remat,
            unroll=model.unroll,
            key=jax.random.fold_in(jax.random.key(self.config.seed), 0),
        )

    def forward_macs(self) -> int:
        height, width = self.config.data.size
        images = jax.ShapeDtypeStruct((1, height, width, self.config.model.in_channels), jnp.float32)
        inputs = PaddedImages(cast(Array, images), cast(Array, jax.ShapeDtypeStruct((1, 2), jnp.int32)))
        model, stats = eqx.filter_eval_shape(self.build)
        return count(model, inputs, stats).macs

    def teacher(self, mesh: Mesh) -> None:
        return None

    def stream(self, start_step: int) -> DetectionStream:
        data, config = self.config.data, self.config
        plan = train_plan(data)
        return detection_train_stream(
            self.source,
            batch_size=config.loop.batch_size,
            seed=config.seed,
            transform=plan.transform,
            buckets=plan.buckets,
            max_objects=data.max_objects,
            num_threads=data.num_threads,
            start_step=start_step,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def counts(self, batch: DetectionBatch) -> Counts:
        return target_counts(batch.targets, batch.weights)

    def loss(
        self,
        model: Any,
        stats: eqx.nn.State,
        batch: DetectionBatch,
        key: PRNGKeyArray,
        counts: Counts,
        teacher: None,
    ) -> tuple[Float[Array, ""], eqx.nn.State]:
        predictions, new = model(self._inputs(batch), stats, train=True, key=key)
        loss, _ = detr_loss(predictions, batch.targets, batch.size, batch.weights, counts, self.config.task)
        return loss, new

    def _inputs(self, batch: DetectionBatch):
        data = self.config.data
        inputs = normalize_padded(batch.images, batch.size, data.mean, data.std)
        return inputs._replace(images=inputs.images.astype(jnp.dtype(self.config.loop.compute_dtype)))

    def evaluate_batch(
        self, model: Any, batch: DetectionBatch, stats: eqx.nn.State
    ) -> tuple[dict[str, Mean], Detections]:
        """Sums of the loss over the global batch, and what is found in these rows, in pixels of the original images."""
        predictions, _ = model(self._inputs(batch), stats)
        counts = jax.tree.map(global_sum, self.counts(batch))
        loss, _ = detr_loss(predictions, batch.targets, batch.size, batch.weights, counts, self.config.task)
        images = batch.weights.sum()
        sums = all_reduce({"loss": Mean(loss * counts.images, images)})
        decode = decode_softmax if self.config.task.classification == "softmax" else decode_sigmoid
        return sums, decode(predictions, batch.original_size)

    def evaluator(self, mesh: Mesh) -> "DetectionEvaluator":
        return DetectionEvaluator(self, mesh)

    @property
    def late_metrics(self) -> bool:
        return False

    def more_metrics(
        self, model: Any, stats: eqx.nn.State, number: int, last: bool, folder: RunFolder, mesh: Mesh
    ) -> dict:
        return {}

    def report(self, folder: RunFolder, rows: list[Row], evaluation: DetectionEvaluation) -> None:
        from eqvision.problems.detection_report import write_detection_report

        write_detection_report(folder, rows, evaluation, self.test_source)


class DetectionEvaluator:
    """``evaluator(model, stats)`` runs the split; compiled once for each shape of image."""

    def __init__(self, problem: Detection, mesh: Mesh):
        self._problem, self._mesh = problem, mesh

        @jax.jit
        def step(batch: DetectionBatch, model: Any, stats: eqx.nn.State):
            specs = parameter_specs(model, mesh)
            return sharded_call(problem.evaluate_batch, mesh, specs, (P(), BATCH))(model, batch, stats)

        self._step = step

    def __call__(
        self, model: Any, stats: eqx.nn.State, *, stop: Callable[[], bool] = lambda: False
    ) -> DetectionEvaluation:
        """Raises StoppedEvaluation as soon as ``stop()`` says so."""
        source, sums = self._problem.test_source, {}
        coco = CocoMetric(source.class_names)
        wanted = set(np.linspace(0, len(source) - 1, min(NUM_SAMPLES, len(source))).round().astype(int).tolist())
        samples = []
        with device_feed(self._stream(), NamedSharding(self._mesh, BATCH)) as feed:
            for batch in feed:
                if stop():
                    raise StoppedEvaluation
                batch_sums, found = self._step(batch, model, stats)
                sums = merge(sums, batch_sums) if sums else batch_sums
                samples += self._add(coco, batch, found, wanted)
        metrics = {**compute(sums), **coco.merge_hosts().compute()}
        return DetectionEvaluation(metrics, coco, tuple(samples))

    def _add(self, coco: CocoMetric, batch: DetectionBatch, found: Detections, wanted: set[int]):
        source, samples = self._problem.test_source, []
        indices, rows = local_rows(batch.indices), jax.tree.map(local_rows, found)
        for row, index in enumerate(indices.tolist()):
            if index < 0:
                continue
            truth = source.truth(index)
            coco.add_truth(index, truth.boxes, truth.labels, area=truth.area, crowd=truth.iscrowd)
            coco.add_detections(index, rows.boxes[row], rows.scores[row], rows.labels[row])
            if index in wanted:
                samples.append(DetectionSample(index, jax.tree.map(lambda column, row=row: column[row], rows)))
        return samples

    def _stream(self) -> DetectionStream:
        config = self._problem.config
        plan = eval_plan(config.data)
        return detection_eval_stream(
            self._problem.test_source,
            batch_size=config.loop.eval_batch_size,
            transform=plan.transform,
            buckets=plan.buckets,
            max_objects=config.data.max_objects,
            num_threads=config.data.num_threads,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )


def detection(config: DetectionConfig) -> Detection:
    """Read the annotations and check that everything fits together, before anything is computed or written."""
    load = functools.partial(load_detection, config.data, config.model.in_channels)
    source, test_source = load(config.data.train_split), load(config.data.test_split)
    if source.class_names != test_source.class_names:
        raise ValueError(
            f"the splits have other classes: {config.data.train_split} {', '.join(source.class_names[:5])} ... and "
            f"{config.data.test_split} {', '.join(test_source.class_names[:5])} ..."
        )
    num_classes = config.model.num_classes or len(source.class_names)
    if num_classes < len(source.class_names):
        raise ValueError(
            f"--model.num-classes {num_classes} is fewer than the {len(source.class_names)} classes of the data; "
            "leave it out to take their number"
        )
    return Detection(config, source, test_source, num_classes)
