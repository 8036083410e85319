"""Evaluation of a model of images and text: loss, zero-shot accuracy, retrieval both ways, samples for pictures."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from eqvision.data import ImageFolder, eval_stream
from eqvision.data.pairs import PairSource, TextGallery, text_gallery
from eqvision.data.text import Tokenizer
from eqvision.evaluators.embeddings import Embedder, ImageVectors
from eqvision.evaluators.retrieval import retrieval
from eqvision.evaluators.zero_shot import class_vectors, zero_shot
from eqvision.multimodal import Clip
from eqvision.problems.contrastive_data import image_plan, templates_of
from eqvision.recipes.contrastive_config import ContrastiveConfig, ContrastiveLossConfig
from eqvision.tasks.contrastive import pair_loss
from eqvision.types import ClipOutputs

NUM_SAMPLES = 8
SHOWN = 3  # texts or classes beside each sample


class PairSampleFound(NamedTuple):
    """A test image with one of its captions, and what the model says it is: names with their scores, best first."""

    index: int
    image: UInt8[np.ndarray, "h w c"]
    caption: str
    truth: tuple[str, ...]
    found: tuple[str, ...]
    scores: tuple[float, ...]


class ContrastiveEvaluation(NamedTuple):
    """The figures by name, samples, and the cosines of their images (rows) and captions (columns)."""

    metrics: dict[str, float]
    samples: tuple[PairSampleFound, ...]
    similarities: Float[np.ndarray, "n n"]


@runtime_checkable
class Evaluated(Protocol):
    """What the evaluator needs of a problem."""

    @property
    def config(self) -> ContrastiveConfig: ...

    @property
    def test_source(self) -> PairSource: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def zero_shot(self) -> ImageFolder | None: ...

    def evaluation_stream(self) -> Any: ...


class ContrastiveEvaluator:
    """``evaluator(model, stats)`` runs the split; compiled once."""

    def __init__(self, problem: Evaluated, mesh: Mesh):
        config = problem.config
        self._problem = problem
        self._embedder = Embedder(mesh, config.data.mean, config.data.std, config.loop.compute_dtype)

    @functools.cached_property
    def _gallery(self) -> TextGallery:
        return text_gallery(self._problem.test_source)

    def __call__(
        self, model: Clip, stats: eqx.nn.State, *, stop: Callable[[], bool] = lambda: False
    ) -> ContrastiveEvaluation:
        """Raises StoppedEvaluation as soon as ``stop()`` says so."""
        images = self._embedder.images(model, stats, self._problem.evaluation_stream(), stop=stop)
        texts = self._texts(model, self._gallery.texts, stop)
        named = self._named(model, stats, images, stop)
        metrics = {"loss": self._loss(model, images, texts)}
        metrics |= {} if named is None else named.metrics
        metrics |= retrieval(images, texts, self._gallery)
        return self._with_samples(metrics, images, texts, named)

    def _texts(self, model: Clip, texts: tuple[str, ...], stop: Callable[[], bool]) -> Float[np.ndarray, "m d"]:
        config = self._problem.config
        tokens = self._problem.tokenizer.encode_batch(texts, config.model.length)
        return self._embedder.texts(model, tokens, config.loop.eval_batch_size, stop=stop)

    def _named(
        self, model: Clip, stats: eqx.nn.State, images: ImageVectors, stop: Callable[[], bool]
    ) -> "_Named | None":
        """Zero-shot classification: of the images named for it, else of the test images, if they have classes."""
        problem, other = self._problem, self._problem.zero_shot
        source = problem.test_source if other is None else other
        if not source.class_names:
            return None
        names = tuple(name.replace("_", " ") for name in source.class_names)
        embed = functools.partial(self._texts, model, stop=stop)
        classes = class_vectors(embed, names, templates_of(problem.config.data))
        vectors = images if other is None else self._embedder.images(model, stats, _plain(problem, other), stop=stop)
        metrics = zero_shot(vectors.values, source.labels[vectors.indices], classes)
        return _Named(metrics, names, classes, None if other is not None else source.labels)

    def _loss(self, model: Clip, images: ImageVectors, texts: Float[np.ndarray, "m d"]) -> float:
        """The mean over batches of the size of training, in the order of the source, each image with its first caption:
        so it depends neither on the evaluation's batches nor on devices."""
        config, source = self._problem.config, self._problem.test_source
        rows = {text: row for row, text in enumerate(self._gallery.texts)}
        partners = texts[[rows[source.captions(int(index))[0]] for index in images.indices]]
        size = min(config.loop.batch_size, len(partners))
        step, total = _loss_step(config.task), 0.0
        for first in range(0, len(partners), size):
            image, text = (_filled(each[first : first + size], size) for each in (images.values, partners))
            count = min(size, len(partners) - first)
            scale, bias = _host(model.scale()), None if model.logit_bias is None else _host(model.logit_bias)
            total += count * float(step(ClipOutputs(image, text, scale, bias), jnp.arange(size) < count))
        return total / len(partners)

    def _with_samples(
        self, metrics: dict[str, float], images: ImageVectors, texts: Float[np.ndarray, "m d"], named: "_Named | None"
    ) -> ContrastiveEvaluation:
        source, rows = self._problem.test_source, {text: row for row, text in enumerate(self._gallery.texts)}
        chosen = _different(source, images.indices)
        captions = [source.captions(int(images.indices[row]))[0] for row in chosen]
        similarities = images.values[chosen] @ texts[[rows[caption] for caption in captions]].T
        samples = tuple(
            self._sample(images, row, caption, texts, named) for row, caption in zip(chosen, captions, strict=True)
        )
        return ContrastiveEvaluation(metrics, samples, similarities)

    def _sample(
        self, images: ImageVectors, row: int, caption: str, texts: Float[np.ndarray, "m d"], named: "_Named | None"
    ) -> PairSampleFound:
        """With its class where the test images have one, else with the texts that are nearest."""
        source, index = self._problem.test_source, int(images.indices[row])
        if named is not None and named.labels is not None:
            names, vectors = named.names, named.vectors
            truth: tuple[str, ...] = (names[int(named.labels[index])],)
        else:
            names, vectors, truth = self._gallery.texts, texts, source.captions(index)
        scores = vectors @ images.values[row]
        best = np.argsort(-scores, kind="stable")[:SHOWN]
        found, values = tuple(names[k] for k in best), tuple(float(scores[k]) for k in best)
        return PairSampleFound(index, source[index].image, caption, truth, found, values)


class _Named(NamedTuple):
    """Figures of zero-shot classification, the classes with their vectors, and the labels of the test images."""

    metrics: dict[str, float]
    names: tuple[str, ...]
    vectors: Float[np.ndarray, "k d"]
    labels: Int[np.ndarray, " n"] | None


def _plain(problem: Evaluated, source: ImageFolder) -> Any:
    config = problem.config
    return eval_stream(
        source,
        batch_size=config.loop.eval_batch_size,
        transform=image_plan(config).evaluate,
        num_threads=config.data.num_threads,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


@functools.lru_cache(maxsize=8)  # compiled once in a run, however often it is evaluated
def _loss_step(task: ContrastiveLossConfig) -> Callable[[ClipOutputs, Array], Array]:
    @jax.jit
    def step(outputs: ClipOutputs, used: Array) -> Array:
        weights = used.astype(jnp.float32)
        return pair_loss(outputs, weights, weights.sum(), loss=task.loss, chunk=task.chunk)

    return step


def _filled(rows: Float[np.ndarray, "n d"], size: int) -> Float[Array, "{size} d"]:
    return jnp.asarray(np.pad(rows, ((0, size - len(rows)), (0, 0))))


def _host(value: Array) -> Array:
    """Of this host alone: the loss of the split is computed on one device."""
    return jnp.asarray(np.asarray(value))


def _different(source: PairSource, indices: Int[np.ndarray, " n"]) -> list[int]:
    """Rows of up to ``NUM_SAMPLES`` images, spread over the split, whose first captions differ where possible."""
    spread = np.linspace(0, len(indices) - 1, min(len(indices), 16 * NUM_SAMPLES)).round().astype(int).tolist()
    first: dict[str, int] = {}
    for row in spread:
        first.setdefault(source.captions(int(indices[row]))[0], row)
    return sorted(list(first.values())[:NUM_SAMPLES])
