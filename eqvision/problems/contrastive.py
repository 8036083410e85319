"""Contrastive training: images and texts that belong together, told from all others of a batch (CLIP, SigLIP)."""

import inspect
from dataclasses import dataclass
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from eqvision.counting import count
from eqvision.data import ImageFolder, normalize
from eqvision.data.pairs import PairSource, PairsStream, pairs_eval_stream, pairs_train_stream
from eqvision.data.text import Tokenizer
from eqvision.distributed import check_same
from eqvision.keys import StepKeys
from eqvision.multimodal import Clip
from eqvision.names import nearest
from eqvision.problems.contrastive_data import (
    KEPT,
    check_splits,
    image_plan,
    load_pairs,
    load_run_tokenizer,
    load_zero_shot,
    templates_of,
)
from eqvision.problems.contrastive_evaluator import ContrastiveEvaluation, ContrastiveEvaluator
from eqvision.recipes.contrastive_config import ContrastiveConfig
from eqvision.run_folder import Row, RunFolder
from eqvision.tasks.contrastive import pair_loss
from eqvision.types import PairsBatch, TextTokens
from eqvision.zoo_language import LANGUAGE, clip_names, language_builder


@dataclass(frozen=True)
class Contrastive:
    """A ``Problem``: which text is about which image."""

    config: ContrastiveConfig
    source: PairSource
    test_source: PairSource
    tokenizer: Tokenizer
    zero_shot: ImageFolder | None = None
    """Images of classes to be told by name, where the test images have none or others are wanted."""

    @property
    def num_classes(self) -> int:
        """Of the images, 0 where they have no class; the model does not depend on it."""
        return len(self.source.class_names)

    @property
    def headline(self) -> str:
        named = self.zero_shot is not None or self.test_source.class_names
        return "zero_shot_accuracy" if named else "image_to_text/recall_at_1"

    def build(self) -> tuple[Clip, eqx.nn.State]:
        return build_clip(self.config, self.tokenizer)

    def forward_macs(self) -> int:
        """Of one image and one text."""
        model, stats = eqx.filter_eval_shape(self.build)
        size, length = self.config.model.image_size, self.config.model.length
        images = jax.ShapeDtypeStruct((1, size, size, self.config.model.in_channels), jnp.float32)
        ids, mask = (jax.ShapeDtypeStruct((1, length), dtype) for dtype in (jnp.int32, jnp.bool_))
        text: Any = TextTokens(cast(Any, ids), cast(Any, mask))
        return count(model, images, text, stats).macs

    def teacher(self, mesh: Mesh) -> None:
        return None

    def stream(self, start_step: int) -> PairsStream:
        """The run folder gets the vocabulary before the first step."""
        self._keep_tokenizer()
        return pairs_train_stream(
            self.source,
            self.tokenizer,
            length=self.config.model.length,
            batch_size=self.config.loop.batch_size,
            seed=self.config.seed,
            transform=image_plan(self.config).train,
            num_threads=self.config.data.num_threads,
            start_step=start_step,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def _keep_tokenizer(self) -> None:
        folder = RunFolder(self.config.out)
        kept = folder.path / KEPT
        if self.config.out and jax.process_index() == 0 and folder.config_file.exists() and not kept.exists():
            self.tokenizer.save(kept)

    def evaluation_stream(self) -> PairsStream:
        return pairs_eval_stream(
            self.test_source,
            self.tokenizer,
            length=self.config.model.length,
            batch_size=self.config.loop.eval_batch_size,
            transform=image_plan(self.config).evaluate,
            num_threads=self.config.data.num_threads,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def counts(self, batch: PairsBatch) -> Float[Array, ""]:
        """Pairs, by which the loss is divided."""
        return batch.weights.sum()

    def loss(
        self,
        model: Clip,
        stats: eqx.nn.State,
        batch: PairsBatch,
        keys: StepKeys,
        counts: Float[Array, ""],
        teacher: None,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]], eqx.nn.State]:
        """Every image is compared with every text of the global batch. The scale is logged as this device's share."""
        outputs, new = model(self._images(batch.images), batch.text, stats, train=True, key=keys.own)
        task = self.config.task
        loss = pair_loss(outputs, batch.weights, counts, loss=task.loss, chunk=task.chunk)
        share = batch.weights.sum() / jnp.where(counts == 0, 1.0, counts)
        return loss, {"scale": outputs.scale * share}, new

    def _images(self, images: UInt8[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        data = self.config.data
        return jnp.asarray(normalize(images, data.mean, data.std), jnp.dtype(self.config.loop.compute_dtype))

    def evaluator(self, mesh: Mesh) -> ContrastiveEvaluator:
        return ContrastiveEvaluator(self, mesh)

    @property
    def late_metrics(self) -> bool:
        return False

    def more_metrics(
        self, model: Any, stats: eqx.nn.State, number: int, last: bool, folder: RunFolder, mesh: Mesh
    ) -> dict:
        return {}

    def report(self, folder: RunFolder, rows: list[Row], evaluation: ContrastiveEvaluation) -> None:
        from eqvision.problems.contrastive_report import write_contrastive_report

        write_contrastive_report(folder, rows, evaluation, self.test_source, self.headline)


def build_clip(config: ContrastiveConfig, tokenizer: Tokenizer) -> tuple[Clip, eqx.nn.State]:
    """The model of a run as it is before step 0, for the vocabulary of ``tokenizer``."""
    model = config.model
    build = language_builder(model.name, _options(config, tokenizer))
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    return eqx.nn.make_with_state(build)(image_size=model.image_size, in_channels=model.in_channels, key=key)


def _options(config: ContrastiveConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """What is set, and what the vocabulary decides. Raises ValueError for an option that the model does not have."""
    model, accepted = config.model, inspect.signature(LANGUAGE[config.model.name]).parameters
    chosen = {
        "dropout": model.dropout,
        "drop_path": model.drop_path,
        "remat": model.remat,
        "unroll": model.unroll,
        "attention": model.attention,
    }
    given = {name: value for name, value in chosen.items() if value is not None}
    sizes = {"vocab_size": tokenizer.vocab_size, "length": model.length}
    return given | sizes | ({"end_id": tokenizer.special.end} if "end_id" in accepted else {})


def require_clip(name: str) -> None:
    """Raise UnknownNameError for a name that no model has, ValueError for what is no CLIP or SigLIP."""
    known = clip_names()
    if name in known:
        return
    from eqvision.zoo import TABLES

    if any(name in table for table in TABLES.values()):
        raise ValueError(
            f"--model.name {name} is no model of images and text, and this recipe trains those: {', '.join(known)}"
        )
    raise nearest(name, known, "--model.name: model of images and text")


def contrastive_problem(config: ContrastiveConfig) -> Contrastive:
    """Find images, captions and vocabulary, and check that everything fits together, before anything is computed.

    Raises ValueError and UnknownNameError for a model and options that do not fit, and what sources and tokenizers
    raise.
    """
    require_clip(config.model.name)
    _check(config)
    check_splits(config.data)
    image_plan(config)
    templates_of(config.data)
    channels = config.model.in_channels
    source = load_pairs(config.data, channels, config.data.train_split)
    test_source = load_pairs(config.data, channels, config.data.test_split)
    zero_shot = load_zero_shot(config.data, channels)
    tokenizer = load_run_tokenizer(config, source)
    check_same("the vocabulary", tokenizer.to_json())
    problem = Contrastive(config, source, test_source, tokenizer, zero_shot)
    _check_model(problem)
    return problem


def _check_model(problem: Contrastive) -> None:
    """Raise ValueError for a model without a bias under the sigmoid loss, and what the model's builder raises."""
    model, _ = eqx.filter_eval_shape(problem.build)
    if problem.config.task.loss == "sigmoid" and model.logit_bias is None:
        raise ValueError(
            f"--task.loss sigmoid needs a model with a bias, as SigLIP has, and {problem.config.model.name} has none; "
            "use --task.loss softmax"
        )


def _check(config: ContrastiveConfig) -> None:
    if config.loop.accumulate != 1:
        raise ValueError(
            f"--loop.accumulate {config.loop.accumulate}: a contrastive loss compares every image with every text of "
            "the batch, and parts of it would see only their own; use a smaller --loop.batch-size, or --model.remat "
            "full to save memory"
        )
    if config.task.chunk < 1 or config.model.length < 1:
        raise ValueError(
            f"--task.chunk {config.task.chunk}, --model.length {config.model.length}; expected 1 or more of each"
        )
