"""Classification and regression of whole images."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from eqvision.classifiers import Classifier
from eqvision.counting import count
from eqvision.data import (
    Source,
    augment_batch,
    check_augment,
    encoded_train_transform,
    mean_fill,
    normalize,
    train_stream,
)
from eqvision.evaluate import Evaluation, Evaluator
from eqvision.evaluators import check_evaluators, run_evaluators
from eqvision.finetune import load_teacher
from eqvision.keys import StepKeys, augment_key
from eqvision.losses import logit_distillation, token_distillation, weighted_sums
from eqvision.recipes import DistillConfig, TrainConfig
from eqvision.report import write_report
from eqvision.run_folder import Row, RunFolder
from eqvision.setup import build_model, check_targets, load_source, num_outputs
from eqvision.state import Teacher
from eqvision.tasks import Task, make_task
from eqvision.types import ClassificationBatch, TokenFeatures


@dataclass(frozen=True)
class Classification:
    """A ``Problem``: one row of outputs for each image."""

    config: TrainConfig
    task: Task
    source: Source
    test_source: Source
    num_classes: int

    @property
    def headline(self) -> str:
        return self.task.headline

    def build(self) -> tuple[Classifier, eqx.nn.State]:
        return build_model(self.config, self.num_classes)

    def forward_macs(self) -> int:
        config = self.config
        if config.model.attention == "cudnn":  # its products are hidden in a kernel, and equal in number
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="xla"))
        size, channels = config.model.image_size, config.model.in_channels
        images = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
        model, stats = eqx.filter_eval_shape(lambda: build_model(config, self.num_classes))
        return count(model, images, stats).macs

    def teacher(self, mesh: Mesh) -> Teacher | None:
        return load_teacher(self.config, mesh)

    def stream(self, start_step: int) -> Iterator[ClassificationBatch]:
        return training_stream(self.config, self.source, start_step)

    def counts(self, batch: ClassificationBatch) -> Float[Array, ""]:
        """The sum of the weights."""
        return jnp.sum(batch.weights)

    def loss(
        self,
        model: Classifier,
        stats: eqx.nn.State,
        batch: ClassificationBatch,
        keys: StepKeys,
        counts: Float[Array, ""],
        teacher: Teacher | None,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]], eqx.nn.State]:
        key = keys.own
        images, labels = self._augmented(batch, key)
        images = jnp.asarray(images, jnp.dtype(self.config.loop.compute_dtype))
        features, new = model.features(images, stats, train=True, key=key)
        outputs, new = model.head(features, new, train=True, key=jax.random.fold_in(key, 2))
        values, weights = self.task.loss(outputs, batch._replace(labels=labels))
        if teacher is not None:
            values = _distilled(values, outputs, features, images, teacher, self.config.distill)
        return weighted_sums(values, weights, axis_names=())[0] / jnp.where(counts == 0, 1.0, counts), {}, new

    def _augmented(self, batch: ClassificationBatch, key: Key[Array, ""]) -> tuple[Array, Array]:
        images = jnp.asarray(normalize(batch.images, self.config.data.mean, self.config.data.std))
        mixing = self.config.augment
        if not (mixing.mixup or mixing.cutmix or mixing.random_erasing):
            return images, batch.labels
        mixed = augment_batch(
            images, batch.labels, batch.weights, augment_key(key), config=mixing, num_classes=self.num_classes
        )
        return cast(tuple[Array, Array], mixed)

    def evaluator(self, mesh: Mesh) -> Evaluator:
        return Evaluator(self.config, self.task, self.test_source, mesh)

    @property
    def late_metrics(self) -> bool:
        return bool(self.config.eval.evaluators)

    def more_metrics(
        self, model: Classifier, stats: eqx.nn.State, number: int, last: bool, folder: RunFolder, mesh: Mesh
    ) -> dict[str, float]:
        """Of frozen features."""
        every, names = self.config.eval.every, self.config.eval.evaluators
        if not names or not (last or (every and number % every == 0)):
            return {}
        return run_evaluators(names, model, stats, self.config, folder, number, mesh)

    def report(self, folder: RunFolder, rows: list[Row], evaluation: Evaluation) -> None:
        write_report(folder, rows, evaluation, self.source.class_names, self.task)


def training_stream(config: TrainConfig, source: Source, start_step: int) -> Iterator[ClassificationBatch]:
    """This process's rows of every training batch from ``start_step`` on, as the configuration asks for them."""
    data = config.data
    return train_stream(
        source,
        batch_size=config.loop.batch_size,
        seed=config.seed,
        transform=encoded_train_transform(
            data.transform,
            config.model.image_size,
            data.interpolation,
            config.augment,
            mean_fill(data.mean),
            decoder=data.decoder,
            in_channels=config.model.in_channels,
            crop_scale=data.crop_scale,
        ),
        repeats=config.augment.repeats,
        num_threads=data.num_threads,
        num_workers=data.num_workers,
        start_step=start_step,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def classification_problem(config: TrainConfig) -> Classification:
    """Read the data and check that everything fits together, before anything is computed or written."""
    task = make_task(config.task.kind, config.task.loss, config.task.label_smoothing)
    source = load_source(config, config.data.train_split, train=True)
    test_source = load_source(config, config.data.test_split)
    num_classes = num_outputs(config, source)
    for each in (source, test_source):
        check_targets(config, each, num_classes)
    check_augment(config.augment)
    check_evaluators(config.eval.evaluators, config)
    return Classification(config, task, source, test_source, num_classes)


def _distilled(values, outputs, features, images: Array, teacher: Teacher, config: DistillConfig) -> Float[Array, " b"]:
    taught, _ = teacher.model.features(images, teacher.stats)
    if config.kind == "token":
        for name, given in (("student", features), ("teacher", taught)):
            if not isinstance(given, TokenFeatures):
                raise ValueError(
                    f"--distill.kind token needs two transformers, but the {name} has no tokens; use logit"
                )
        extra = token_distillation(cast(TokenFeatures, features).patches, cast(TokenFeatures, taught).patches)
    else:
        wanted, _ = teacher.model.head(taught, teacher.stats)
        extra = logit_distillation(outputs, wanted, temperature=config.temperature)
    return (1 - config.weight) * values + config.weight * extra
