"""Semantic segmentation: a class for each pixel."""

from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from eqvision.counting import count
from eqvision.data.detection import normalize_padded
from eqvision.data.segmentation import SegmentationStream, segmentation_eval_stream, segmentation_train_stream
from eqvision.keys import StepKeys
from eqvision.losses import (
    SegmentationCounts,
    SegmentationLossConfig,
    segmentation_counts,
    segmentation_loss,
)
from eqvision.metrics import Mean, all_reduce, pixel_confusion
from eqvision.names import nearest
from eqvision.ops.collectives import global_sum
from eqvision.problems.frozen import check_frozen
from eqvision.problems.segmentation_data import check_splits, eval_plan, load_segmentation, train_plan
from eqvision.problems.segmentation_evaluator import (
    SegmentationEvaluation,
    SegmentationEvaluator,
    SegmentationSums,
)
from eqvision.recipes.segmentation_config import SegmentationConfig
from eqvision.run_folder import Row, RunFolder
from eqvision.types import SegmentationBatch
from eqvision.zoo import DETECTORS, MODELS, SEGMENTERS, builder

MULTIPLE = 8  # pixels, of the sides of evaluated batches: little padding, and few shapes to compile for


@dataclass(frozen=True)
class Segmentation:
    """A ``Problem``: a class for each pixel of an image."""

    config: SegmentationConfig
    source: Any
    test_source: Any
    num_classes: int
    headline: str = "mean_iou"

    def build(self) -> tuple[Any, eqx.nn.State]:
        """Raises ValueError for frozen batch norms without weights to begin with."""
        model, stats = build_segmenter(self.config, self.num_classes)
        check_frozen(model, self.config.model.name, self.config.init)
        return model, stats

    def forward_macs(self) -> int:
        height, width = self.config.data.size
        images = jax.ShapeDtypeStruct((1, height, width, self.config.model.in_channels), jnp.float32)
        model, stats = eqx.filter_eval_shape(self.build)
        return count(model, images, stats).macs

    def teacher(self, mesh: Mesh) -> None:
        return None

    def stream(self, start_step: int) -> SegmentationStream:
        data, plan = self.config.data, train_plan(self.config.data)
        return segmentation_train_stream(
            self.source,
            batch_size=self.config.loop.batch_size,
            seed=self.config.seed,
            canvas=data.size,
            transform=plan.transform,
            num_threads=data.num_threads,
            start_step=start_step,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def evaluation_stream(self) -> SegmentationStream:
        data, plan = self.config.data, eval_plan(self.config.data)
        return segmentation_eval_stream(
            self.test_source,
            batch_size=self.config.loop.eval_batch_size,
            canvas=plan.canvas,
            transform=plan.transform,
            multiple=MULTIPLE,
            num_threads=data.num_threads,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def counts(self, batch: SegmentationBatch) -> SegmentationCounts:
        return segmentation_counts(batch.labels, batch.weights, self.config.task)

    def loss(
        self,
        model: Any,
        stats: eqx.nn.State,
        batch: SegmentationBatch,
        keys: StepKeys,
        counts: SegmentationCounts,
        teacher: None,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]], eqx.nn.State]:
        outputs, new = _outputs(model, self._images(batch), stats, keys)
        shares = [segmentation_loss(each, batch.labels, batch.weights, counts, self.config.task) for each in outputs]
        loss, terms = shares[0]
        extra = sum((share for share, _ in shares[1:]), jnp.zeros(()))
        return loss + self.config.model.auxiliary_weight * extra, terms, new

    def _images(self, batch: SegmentationBatch) -> Array:
        """Padding has the colour of the mean: networks continue images so at their borders, too."""
        images = normalize_padded(batch.images, batch.size, self.config.data.mean, self.config.data.std).images
        return images.astype(jnp.dtype(self.config.loop.compute_dtype))

    def evaluate_batch(
        self, model: Any, batch: SegmentationBatch, stats: eqx.nn.State
    ) -> tuple[SegmentationSums, Int[Array, "b h w"]]:
        """Sums of the loss and the confusion over the global batch, and the predicted class of each pixel."""
        logits, _ = model(self._images(batch), stats)
        mine, task = self.counts(batch), self.config.task
        counts = jax.tree.map(global_sum, mine)
        _, terms = segmentation_loss(logits, batch.labels, batch.weights, counts, task)
        sums = {name: _mean(name, value, mine, counts, task) for name, value in terms.items()}
        classes = len(self.test_source.class_names)  # the model may have more
        confusion = pixel_confusion(logits, batch.labels, batch.weights, num_classes=classes)
        predicted = jnp.argmax(logits[..., :classes], axis=-1)
        return all_reduce(SegmentationSums(sums, confusion)), predicted

    def evaluator(self, mesh: Mesh) -> SegmentationEvaluator:
        return SegmentationEvaluator(self, mesh)

    @property
    def late_metrics(self) -> bool:
        return False

    def more_metrics(
        self, model: Any, stats: eqx.nn.State, number: int, last: bool, folder: RunFolder, mesh: Mesh
    ) -> dict:
        return {}

    def report(self, folder: RunFolder, rows: list[Row], evaluation: SegmentationEvaluation) -> None:
        from eqvision.problems.segmentation_report import write_segmentation_report

        write_segmentation_report(folder, rows, evaluation, self.test_source)


def _mean(
    name: str,
    share: Float[Array, ""],
    mine: SegmentationCounts,
    counts: SegmentationCounts,
    task: SegmentationLossConfig,
) -> Mean:
    """A term of the loss and what it is divided by: images for the terms that are taken image by image, else pixels."""
    own, whole = (mine.images, counts.images) if name in ("dice", "lovasz") else (mine.pixels, counts.pixels)
    return Mean(getattr(task, name) * share * whole, own)


def _outputs(model: Any, images: Array, stats: eqx.nn.State, keys: StepKeys) -> tuple[tuple[Array, ...], eqx.nn.State]:
    """Logits, and behind them those of auxiliary heads, where the model has any."""
    if getattr(model, "auxiliary", ()):
        return model.with_auxiliary(images, stats, train=True, key=keys.own)
    logits, new = model(images, stats, train=True, key=keys.own)
    return (logits,), new


def build_segmenter(config: SegmentationConfig, num_classes: int) -> tuple[Any, eqx.nn.State]:
    """The model of a run as it is before step 0. Raises UnknownNameError, ValueError for what is no segmenter."""
    model = config.model
    require_segmenter(model.name)
    options = {} if model.norm is None else {"norm": model.norm}
    return eqx.nn.make_with_state(builder(model.name, options))(
        num_classes=num_classes,
        image_size=config.data.size,
        in_channels=model.in_channels,
        key=jax.random.fold_in(jax.random.key(config.seed), 0),
    )


def require_segmenter(name: str) -> None:
    """Raise ValueError for another kind of model, UnknownNameError for a name that no model has."""
    for table, kind in ((MODELS, "an image classifier"), (DETECTORS, "a detector")):
        if name in table:
            raise ValueError(
                f"--model.name {name} is {kind}, and this recipe trains segmenters (eqvision list --kind segmenter)"
            )
    if name not in SEGMENTERS:
        raise nearest(name, list(SEGMENTERS), "--model.name: segmenter")


def segmentation_problem(config: SegmentationConfig) -> Segmentation:
    """Find the images and check that everything fits together, before anything is computed or written."""
    require_segmenter(config.model.name)
    check_splits(config.data)
    channels = config.model.in_channels
    source = load_segmentation(config.data, channels, config.data.train_split)
    test_source = load_segmentation(config.data, channels, config.data.test_split, source.class_names)
    num_classes = config.model.num_classes or len(source.class_names)
    if num_classes < len(source.class_names):
        raise ValueError(
            f"--model.num-classes {num_classes} is fewer than the {len(source.class_names)} classes of the data; "
            "leave it out to take their number"
        )
    return Segmentation(config, source, test_source, num_classes)
