"""Detection: boxes of objects, by set prediction."""

import inspect
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
from eqvision.layers import FrozenBatchNorm
from eqvision.losses import detr_loss, target_counts
from eqvision.losses.set_prediction import Counts, SetPredictionConfig
from eqvision.mesh import BATCH
from eqvision.metrics import CocoMetric, Mean, all_reduce, merge
from eqvision.names import nearest
from eqvision.ops.collectives import global_sum
from eqvision.problems.detection_data import check_splits, eval_plan, load_detection, train_plan
from eqvision.recipes.detection_config import DetectionConfig
from eqvision.run_folder import Row, RunFolder
from eqvision.sharding import parameter_specs, sharded_call
from eqvision.types import DetectionBatch, Detections, PaddedImages
from eqvision.zoo import DETECTORS, MODELS, builder

NUM_SAMPLES = 8
LOGGED = ("class", "l1", "giou", "mask", "dice", "cardinality_error")  # terms of the last decoder layer


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
        """Raises ValueError for frozen batch norms without weights to begin with: they would do nothing for good."""
        model, stats = build_detector(self.config, self.num_classes)
        if not self.config.init and _has_frozen_norms(model):
            raise ValueError(
                f"the batch norms of the backbone of {self.config.model.name} are frozen, so it needs weights to begin "
                "with: --init resnet50:torchvision_v1 or --init RUN; or train the norms: --model.norm batch"
            )
        return model, stats

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
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]], eqx.nn.State]:
        predictions, new = model(self._inputs(batch), stats, train=True, key=key)
        loss, terms = detr_loss(predictions, batch.targets, batch.size, batch.weights, counts, self.config.task)
        return loss, {name: terms[name] for name in LOGGED if name in terms}, new

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
        shares = detr_loss(predictions, batch.targets, batch.size, batch.weights, counts, self.config.task)
        num_queries = predictions.logits.shape[2]
        sums = all_reduce(_loss_sums(*shares, self.counts(batch), counts, num_queries, self.config.task))
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
        # of no objects at all: divided by 1, as in training
        loss = sum(float(part.total) / (float(part.weight) or 1.0) for part in sums.values())
        metrics = {"loss": loss, **coco.merge_hosts().compute()}
        return DetectionEvaluation(metrics, coco, tuple(samples))

    def _add(self, coco: CocoMetric, batch: DetectionBatch, found: Detections, wanted: set[int]):
        source, samples = self._problem.test_source, []
        indices, rows = local_rows(batch.indices), jax.tree.map(local_rows, found)
        weights = local_rows(batch.weights)
        for row, index in enumerate(indices.tolist()):
            if weights[row] == 0:  # padding, or a corrupt image
                continue
            truth = source.truth(index)
            coco.add_truth(index, truth.boxes, truth.labels, area=truth.area, crowd=truth.iscrowd)
            named = rows.labels[row] < len(source.class_names)  # the head may have classes that the data has not
            coco.add_detections(index, rows.boxes[row][named], rows.scores[row][named], rows.labels[row][named])
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


def _loss_sums(
    loss: Float[Array, ""],
    terms: dict[str, Float[Array, ""]],
    mine: Counts,
    counts: Counts,
    num_queries: int,
    task: SetPredictionConfig,
) -> dict[str, Mean]:
    """The loss in its two parts and what they are divided by, so that batches add up to the loss of the whole split.

    ``loss`` and ``terms`` are this device's share of a batch of ``counts``, of which it holds ``mine``.
    """
    classes = task.class_weight * jnp.stack([terms[name] for name in terms if name.startswith("class")]).sum()
    rest = (loss - classes) * _divisor(counts)
    if task.classification == "sigmoid":
        return {"classes": Mean(classes * _divisor(counts), mine.objects), "rest": Mean(rest, mine.objects)}

    def queries(of: Counts) -> Float[Array, ""]:
        return of.objects + task.no_object_weight * (of.images * num_queries - of.objects)

    return {"classes": Mean(classes * queries(counts), queries(mine)), "rest": Mean(rest, mine.objects)}


def _divisor(counts: Counts) -> Float[Array, ""]:
    return jnp.maximum(counts.objects, 1.0)


def build_detector(config: DetectionConfig, num_classes: int) -> tuple[Any, eqx.nn.State]:
    """The model of a run as it is before step 0. Raises UnknownNameError, ValueError for what is no detector."""
    model = config.model
    require_detector(model.name)
    names = ("num_queries", "norm", "dropout", "remat", "unroll")
    options = {name: getattr(model, name) for name in names if getattr(model, name) is not None}
    return eqx.nn.make_with_state(builder(model.name, options))(
        num_classes=num_classes,
        image_size=config.data.size,
        in_channels=model.in_channels,
        key=jax.random.fold_in(jax.random.key(config.seed), 0),
    )


def _has_frozen_norms(model: Any) -> bool:
    def frozen(node: object) -> bool:
        return isinstance(node, FrozenBatchNorm)

    return any(frozen(node) for node in jax.tree.leaves(model, is_leaf=frozen))


def require_detector(name: str) -> None:
    """Raise ValueError for an image classifier, UnknownNameError for a name that no model has."""
    if name in MODELS:
        raise ValueError(
            f"--model.name {name} is an image classifier, and this recipe trains detectors (eqvision list --kind "
            f"detector). A run of it can be the start of a detector's backbone: --init RUN"
        )
    if name not in DETECTORS:
        raise nearest(name, list(DETECTORS), "--model.name: detector")


def detection_problem(config: DetectionConfig) -> Detection:
    """Read the annotations and check that everything fits together, before anything is computed or written."""
    require_detector(config.model.name)
    source, test_source = _load_splits(config)
    _check_queries(config)
    num_classes = config.model.num_classes or len(source.class_names)
    if num_classes < len(source.class_names):
        raise ValueError(
            f"--model.num-classes {num_classes} is fewer than the {len(source.class_names)} classes of the data; "
            "leave it out to take their number"
        )
    return Detection(config, source, test_source, num_classes)


def _load_splits(config: DetectionConfig) -> tuple[Any, Any]:
    """To train on and to evaluate on. The classes are those that the file of the training split lists."""
    data, channels = config.data, config.model.in_channels
    check_splits(data)
    source = load_detection(data, channels, data.train_split)
    if data.kind == "digits":
        return source, load_detection(data, channels, data.test_split)
    if not source.num_objects.sum():
        raise ValueError(
            f"{source.json} has {len(source)} images and not one object to train on; left out: {source.dropped}"
        )
    return source, load_detection(data, channels, data.test_split, source.categories)


def _check_queries(config: DetectionConfig) -> None:
    """An object beyond the queries would have none to learn it."""
    model, row = config.model, inspect.signature(DETECTORS[config.model.name]).parameters
    most = model.num_queries or (row["num_queries"].default if "num_queries" in row else None)
    if most is not None and config.data.max_objects > most:
        raise ValueError(
            f"--data.max-objects {config.data.max_objects} is more than the {most} queries of {model.name}, which find "
            "one object each; raise --model.num-queries or keep fewer objects"
        )
