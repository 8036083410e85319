"""Open-vocabulary detection: objects of each image by the names that they are asked for with (OWL-ViT)."""

from dataclasses import dataclass
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from eqvision.counting import count
from eqvision.data import normalize
from eqvision.data.detection import (
    DetectionStream,
    QueriedStream,
    Questions,
    detection_eval_stream,
    detection_train_stream,
    image_area,
)
from eqvision.data.text import Tokenizer
from eqvision.detectors import OwlViT, batch_extent, decode_queried
from eqvision.keys import StepKeys
from eqvision.losses.open_vocabulary import open_vocabulary_loss
from eqvision.metrics import Mean, all_reduce
from eqvision.names import nearest
from eqvision.ops.collectives import global_sum
from eqvision.ops.unit_length import unit_length
from eqvision.problems.contrastive_data import KEPT
from eqvision.problems.detection_data import check_splits, train_plan
from eqvision.problems.detection_evaluator import DetectionEvaluation, DetectionEvaluator
from eqvision.problems.open_vocabulary_data import (
    class_texts,
    detection_data,
    evaluation_plan,
    evaluation_templates,
    load_named,
    questions,
    run_tokenizer,
    train_mosaic,
)
from eqvision.recipes.open_vocabulary_config import OpenVocabularyConfig, OpenVocabularyDataConfig
from eqvision.run_folder import Row, RunFolder
from eqvision.types import DetectionBatch, Detections, QueriedBatch, QueriedImages, QueriedTargets, TextTokens
from eqvision.zoo_language import LANGUAGE, language_builder, open_vocabulary_names


@dataclass(frozen=True)
class OpenVocabulary:
    """A ``Problem``: objects by name. Training asks each image for some names, evaluation for all."""

    config: OpenVocabularyConfig
    source: Any
    test_source: Any
    tokenizer: Tokenizer
    questions: Questions
    class_queries: TextTokens
    """Sentences for each class of the test data, (k * t, n)."""
    headline: str = "AP"
    paste: None = None

    @property
    def num_classes(self) -> int:
        """Of the data; the model does not depend on it."""
        return len(self.source.class_names)

    def build(self) -> tuple[OwlViT, eqx.nn.State]:
        return build_open_vocabulary(self.config, self.tokenizer)

    def forward_macs(self) -> int:
        """Of one image with one query."""
        model, stats = eqx.filter_eval_shape(self.build)
        side, length = self.config.data.size, self.config.model.length
        images = jax.ShapeDtypeStruct((1, side, side, self.config.model.in_channels), jnp.float32)
        ids, mask = (jax.ShapeDtypeStruct((1, 1, length), dtype) for dtype in (jnp.int32, jnp.bool_))
        size = jax.ShapeDtypeStruct((1, 2), jnp.int32)
        inputs = QueriedImages(cast(Array, images), cast(Array, size), TextTokens(cast(Array, ids), cast(Array, mask)))
        return count(model, inputs, stats).macs

    def teacher(self, mesh: Mesh) -> None:
        return None

    def stream(self, start_step: int) -> QueriedStream:
        data = self.config.data
        stream = detection_train_stream(
            self.source,
            batch_size=self.config.loop.batch_size,
            seed=self.config.seed,
            transform=train_mosaic(data, self.source),
            buckets=train_plan(detection_data(data)).buckets,
            max_objects=data.max_objects,
            num_threads=data.num_threads,
            start_step=start_step,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        return QueriedStream(stream, self.questions, start_step)

    def evaluation_stream(self) -> DetectionStream:
        data, plan = self.config.data, evaluation_plan(self.config.data)
        return detection_eval_stream(
            self.test_source,
            batch_size=self.config.loop.eval_batch_size,
            transform=plan.transform,
            buckets=plan.buckets,
            max_objects=data.max_objects,
            num_threads=data.num_threads,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def counts(self, batch: QueriedBatch) -> Float[Array, ""]:
        """Images, by which the loss is divided."""
        return batch.weights.astype(jnp.float32).sum()

    def loss(
        self,
        model: OwlViT,
        stats: eqx.nn.State,
        batch: QueriedBatch,
        keys: StepKeys,
        counts: Float[Array, ""],
        teacher: None,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]], eqx.nn.State]:
        inputs = QueriedImages(self._images(batch.images, batch.size), batch.size, batch.queries)
        predictions, new = model(inputs, stats, train=True, key=keys.own)
        asked = jnp.any(batch.queries.mask, axis=-1)
        canvas = _canvas(batch.images)
        shares = open_vocabulary_loss(
            predictions, batch.targets, asked, canvas, batch.weights, counts, self.config.task
        )
        return (*shares, new)

    def _images(self, images: UInt8[Array, "b h w c"], size: Int[Array, "b 2"]) -> Float[Array, "b h w c"]:
        return normalize_filled(images, size, self.config.data).astype(jnp.dtype(self.config.loop.compute_dtype))

    def evaluate_batch(
        self, model: OwlViT, batch: DetectionBatch, stats: eqx.nn.State
    ) -> tuple[dict[str, Mean], Detections]:
        """Sums of the loss over the global batch, with all classes asked for, and what is found in these rows."""
        patches, _ = model.encode_images(self._images(batch.images, batch.size), stats)
        b, k = len(batch.images), len(self.test_source.class_names)
        queries = jnp.broadcast_to(self.class_embeddings(model), (b, k, model.head.classes.embed.weight.shape[1]))
        asked = jnp.ones((b, k), bool)
        predictions = model.predict(patches, queries, asked)
        targets = batch.targets
        answers = (targets.labels[..., None] == jnp.arange(k)) & targets.valid[..., None]
        wanted = QueriedTargets(targets.boxes, answers, targets.valid)
        mine, canvas = batch.weights.astype(jnp.float32).sum(), _canvas(batch.images)
        images = global_sum(mine)
        loss, _ = open_vocabulary_loss(predictions, wanted, asked, canvas, batch.weights, images, self.config.task)
        extent = batch_extent(batch.images.shape[1:3], batch.size, batch.original_size)
        found = decode_queried(predictions, extent, count=self.config.data.count)
        return all_reduce({"loss": Mean(loss * jnp.maximum(images, 1.0), mine)}), found

    def class_embeddings(self, model: OwlViT) -> Float[Array, "k e"]:
        """Of each class of the test data: the mean over its sentences, each of length one."""
        text = TextTokens(jnp.asarray(self.class_queries.ids), jnp.asarray(self.class_queries.mask))
        dtype = jnp.dtype(self.config.loop.compute_dtype)
        embeddings = unit_length(model.encode_queries(text, dtype=dtype))
        return embeddings.reshape(-1, len(evaluation_templates(self.config.data)), embeddings.shape[-1]).mean(axis=1)

    def evaluator(self, mesh: Mesh) -> DetectionEvaluator:
        return DetectionEvaluator(self, mesh)

    @property
    def late_metrics(self) -> bool:
        return False

    def more_metrics(
        self, model: Any, stats: eqx.nn.State, number: int, last: bool, folder: RunFolder, mesh: Mesh
    ) -> dict:
        """None, but the run folder gets the vocabulary before it gets its first checkpoint."""
        self._keep_tokenizer(folder)
        return {}

    def report(self, folder: RunFolder, rows: list[Row], evaluation: DetectionEvaluation) -> None:
        from eqvision.problems.detection_report import write_detection_report

        self._keep_tokenizer(folder)
        write_detection_report(folder, rows, evaluation, self.test_source)

    def _keep_tokenizer(self, folder: RunFolder) -> None:
        kept = folder.path / KEPT
        if jax.process_index() == 0 and not kept.exists():
            self.tokenizer.save(kept)


def normalize_filled(
    images: UInt8[Array, "b h w c"], size: Int[Array, "b 2"], data: OpenVocabularyDataConfig
) -> Float[Array, "b h w c"]:
    """As ``normalize_padded``, but the padding is of the grey that the model was trained with."""
    inside = image_area(size, images.shape[1], images.shape[2])[..., None]
    grey = (data.padding - np.asarray(data.mean, np.float32)) / np.asarray(data.std, np.float32)
    return jnp.where(inside, normalize(images, data.mean, data.std), grey.astype(np.float32))


def _canvas(images: UInt8[Array, "b h w c"]) -> Int[Array, "b 2"]:
    """What boxes are relative to: the whole image of the batch."""
    b, height, width, _ = images.shape
    return jnp.broadcast_to(jnp.array([height, width], jnp.int32), (b, 2))


def build_open_vocabulary(config: OpenVocabularyConfig, tokenizer: Tokenizer) -> tuple[OwlViT, eqx.nn.State]:
    """The model of a run as it is before step 0, for the vocabulary of ``tokenizer``."""
    model = config.model
    names = ("drop_path", "text_drop_path", "remat", "unroll", "attention")
    options = {name: getattr(model, name) for name in names if getattr(model, name) is not None}
    options |= {"vocab_size": tokenizer.vocab_size, "length": model.length, "end_id": tokenizer.special.end}
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    build = language_builder(model.name, options)
    return eqx.nn.make_with_state(build)(image_size=config.data.size, in_channels=model.in_channels, key=key)


def require_open_vocabulary(name: str) -> None:
    """Raise UnknownNameError for a name that no model has, ValueError for what is no open-vocabulary detector."""
    known = open_vocabulary_names()
    if name in known:
        return
    from eqvision.zoo import row_of

    try:
        _ = LANGUAGE[name] if name in LANGUAGE else row_of(name)
    except ValueError:
        raise nearest(name, known, "--model.name: open-vocabulary detector") from None
    raise ValueError(
        f"--model.name {name} is no open-vocabulary detector, and this recipe trains those: {', '.join(known)}"
    )


def open_vocabulary_problem(config: OpenVocabularyConfig) -> OpenVocabulary:
    """Find images, annotations and vocabulary, and check that everything fits together, before anything is computed."""
    require_open_vocabulary(config.model.name)
    _check_places(config)
    data, channels = config.data, config.model.in_channels
    check_splits(detection_data(data))
    source = load_named(data, channels, data.train_split)
    categories = None if data.kind == "digits" else source.categories
    test_source = load_named(data, channels, data.test_split, categories)
    tokenizer = run_tokenizer(config, tuple(source.class_names))
    asked = tokenizer.encode_batch(class_texts(data, tuple(test_source.class_names)), config.model.length)
    train_mosaic(data, source)
    return OpenVocabulary(config, source, test_source, tokenizer, questions(config, source, tokenizer), asked)


def _check_places(config: OpenVocabularyConfig) -> None:
    """Raise ValueError for a size that is no multiple of the patch, and for more objects than the grid has places,
    which find one object each."""
    row, size = LANGUAGE[config.model.name], config.data.size
    patch = eqx.filter_eval_shape(lambda: row(key=jax.random.key(0))).backbone.strides[-1]
    if size % patch:
        raise ValueError(f"--data.size {size} is no multiple of {patch}, the patch of {config.model.name}")
    if config.data.max_objects > (size // patch) ** 2:
        raise ValueError(
            f"--data.max-objects {config.data.max_objects} is more than the {(size // patch) ** 2} places of "
            f"{config.model.name} in images of {size} pixels, which find one object each"
        )
