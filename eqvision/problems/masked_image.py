"""Pre-training without labels: a masked autoencoder predicts the patches that it does not see."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key, UInt8

from eqvision.classifiers import Classifier
from eqvision.counting import count
from eqvision.data import Source, normalize
from eqvision.evaluate import evaluation_stream
from eqvision.evaluators import check_evaluators, run_evaluators
from eqvision.heads import TokenHead
from eqvision.keys import StepKeys, image_keys
from eqvision.losses import masked_pixel_loss, weighted_sums
from eqvision.metrics import Mean, all_reduce
from eqvision.names import nearest
from eqvision.ops import patch_pixels
from eqvision.pretraining import MAE, MAES, MAEOutputs, draw_noise
from eqvision.problems.classification import training_stream
from eqvision.problems.masked_image_evaluator import MaskedEvaluation, MaskedEvaluator
from eqvision.recipes import EvalConfig, MaskedConfig, ModelConfig, TrainConfig
from eqvision.run_folder import Row, RunFolder
from eqvision.setup import load_source
from eqvision.types import ClassificationBatch, MaskedImages


@dataclass(frozen=True)
class MaskedImage:
    """A ``Problem``: the pixels of masked patches. Labels are of use to the evaluators on the frozen encoder alone.

    Which patches are masked is drawn from the seed, the step and the image: the same on one device and on many.
    """

    config: MaskedConfig
    source: Source
    test_source: Source
    num_classes: int
    headline: str = "loss"

    def build(self) -> tuple[MAE, eqx.nn.State]:
        return build_masked(self.config)

    def forward_macs(self) -> int:
        side = self.config.model.image_size
        model, stats = eqx.filter_eval_shape(self.build)
        images: Any = jax.ShapeDtypeStruct((1, side, side, self.config.model.in_channels), jnp.float32)
        noise: Any = jax.ShapeDtypeStruct((1, (side // model.patch_size) ** 2), jnp.float32)
        return count(model, MaskedImages(images, noise), stats).macs

    def teacher(self, mesh: Mesh) -> None:
        return None

    def stream(self, start_step: int) -> Iterator[ClassificationBatch]:
        return training_stream(as_classification(self.config), self.source, start_step)

    def evaluation_stream(self) -> Iterator[ClassificationBatch]:
        return evaluation_stream(as_classification(self.config), self.test_source)

    def counts(self, batch: ClassificationBatch) -> Float[Array, ""]:
        """The sum of the weights: as many patches are masked in every image."""
        return jnp.sum(batch.weights)

    def loss(
        self,
        model: MAE,
        stats: eqx.nn.State,
        batch: ClassificationBatch,
        keys: StepKeys,
        counts: Float[Array, ""],
        teacher: None,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]], eqx.nn.State]:
        drawn = image_keys(keys.common, batch.indices)
        images = self._images(batch.images)
        outputs, new = self._predicted(model, stats, images, drawn, train=True, key=keys.own)
        total, _ = weighted_sums(self._errors(model, images, outputs), batch.weights, axis_names=())
        return total / jnp.where(counts == 0, 1.0, counts), {}, new

    def _images(self, images: UInt8[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return jnp.asarray(normalize(images, self.config.data.mean, self.config.data.std))

    def _predicted(
        self,
        model: MAE,
        stats: eqx.nn.State,
        images: Float[Array, "b h w c"],
        keys: Key[Array, " b"],
        *,
        train: bool = False,
        key: Key[Array, ""] | None = None,
    ) -> tuple[MAEOutputs, eqx.nn.State]:
        rows, columns = model.grid((images.shape[1], images.shape[2]))
        noise = draw_noise(keys, rows * columns)
        inputs = MaskedImages(images.astype(jnp.dtype(self.config.loop.compute_dtype)), noise)
        return model(inputs, stats, train=train, key=key)

    def _errors(self, model: MAE, images: Float[Array, "b h w c"], outputs: MAEOutputs) -> Float[Array, " b"]:
        targets = patch_pixels(images, model.patch_size)
        normalise = self.config.task.normalise_pixels
        return masked_pixel_loss(outputs.pixels, targets, outputs.mask, normalise=normalise)

    def evaluate_batch(
        self, model: MAE, batch: ClassificationBatch, stats: eqx.nn.State
    ) -> tuple[dict[str, Mean], MAEOutputs]:
        """The loss over the global batch, and what was predicted. Each image has the same mask in every evaluation."""
        drawn = image_keys(jax.random.fold_in(jax.random.key(self.config.seed), 2), batch.indices)
        images = self._images(batch.images)
        outputs, _ = self._predicted(model, stats, images, drawn)
        return all_reduce({"loss": Mean.of(self._errors(model, images, outputs), batch.weights)}), outputs

    def evaluator(self, mesh: Mesh) -> MaskedEvaluator:
        return MaskedEvaluator(self, mesh)

    @property
    def late_metrics(self) -> bool:
        return bool(self.config.eval.evaluators)

    def more_metrics(
        self, model: MAE, stats: eqx.nn.State, number: int, last: bool, folder: RunFolder, mesh: Mesh
    ) -> dict[str, float]:
        """Of the frozen encoder, which sees whole images."""
        every, names = self.config.eval.every, self.config.eval.evaluators
        if not names or not (last or (every and number % every == 0)):
            return {}
        encoder, config = encoder_of(model, self.config.eval.pool), as_classification(self.config)
        return run_evaluators(names, encoder, stats, config, folder, number, mesh)

    def report(self, folder: RunFolder, rows: list[Row], evaluation: MaskedEvaluation) -> None:
        from eqvision.problems.masked_image_report import write_masked_report

        write_masked_report(folder, rows, evaluation, self.config)


def build_masked(config: MaskedConfig) -> tuple[MAE, eqx.nn.State]:
    """The model of a run as it is before step 0. Raises UnknownNameError, ValueError for a size that does not fit."""
    model = config.model
    if model.name not in MAES:
        raise nearest(model.name, list(MAES), "--model.name: masked autoencoder")
    return eqx.nn.make_with_state(MAES[model.name])(
        image_size=model.image_size,
        in_channels=model.in_channels,
        mask_ratio=model.mask_ratio,
        remat=model.remat,
        unroll=model.unroll,
        attention=model.attention,
        key=jax.random.fold_in(jax.random.key(config.seed), 0),
    )


def as_classification(config: MaskedConfig) -> TrainConfig:
    """What a run of a classifier would be called that has the same data: for streams and evaluators, which ask that."""
    model = config.model
    return TrainConfig(
        out=config.out,
        seed=config.seed,
        model=ModelConfig(f"{model.name} ({config.eval.pool})", model.image_size, model.in_channels),
        data=config.data,
        loop=config.loop,
        eval=EvalConfig(config.eval.evaluators, config.eval.every),
    )


def encoder_of(model: MAE, pool: str) -> Classifier:
    """The encoder with a head that pools: ``pooled`` gives the features of images. Its linear layer means nothing."""
    head = TokenHead(model.backbone.channels[0], 1, pool="token" if pool == "token" else "mean", key=jax.random.key(0))
    return Classifier(model.backbone, None, head)


def masked_problem(config: MaskedConfig) -> MaskedImage:
    """Find the images and check that everything fits together, before anything is computed or written."""
    eqx.filter_eval_shape(lambda: build_masked(config))
    given = as_classification(config)
    source = load_source(given, config.data.train_split, train=True)
    test_source = load_source(given, config.data.test_split)
    check_evaluators(config.eval.evaluators, given)
    return MaskedImage(config, source, test_source, len(source.class_names))
