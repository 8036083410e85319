"""A model of images and text, used: restore that of a run, and tell images by the names of classes.

What other runs are used by is in ``predict.py``; a run is evaluated again by ``evaluate_problem.py``.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from eqvision.data import decode_image, normalize
from eqvision.data.text import Tokenizer, load_tokenizer
from eqvision.evaluators.zero_shot import check_prompts, class_vectors
from eqvision.multimodal import Clip
from eqvision.predict import Prediction, newest_state, require_file
from eqvision.problems.contrastive import build_clip
from eqvision.problems.contrastive_data import KEPT, image_plan, templates_of
from eqvision.recipes import ContrastiveConfig
from eqvision.run_folder import RunFolder, RunFolderError
from eqvision.types import TextTokens


class ContrastiveRun(NamedTuple):
    """A model of images and text with all that is needed to use it; the data of a run may have no classes."""

    config: ContrastiveConfig
    class_names: tuple[str, ...]
    tokenizer: Tokenizer
    model: Clip
    stats: eqx.nn.State
    step: int
    evaluate: Callable[[UInt8[np.ndarray, "_ _ _"]], UInt8[np.ndarray, "_ _ _"]]
    """Images to those of the model, before they are normalised."""
    clean: Callable[[str], str] = str
    """What is done to texts before they become numbers."""


def load_contrastive_run(path: str | Path) -> ContrastiveRun:
    """The newest good checkpoint of a run; the average of the parameters, where the run keeps one.

    Raises RunFolderError where the folder is none, is of another kind, holds no checkpoint yet or has lost its
    vocabulary, and CheckpointError.
    """
    folder = RunFolder(path)
    config, vocabulary = folder.contrastive(), folder.path / KEPT
    if not vocabulary.exists():
        raise RunFolderError(f"{folder.path} has no {KEPT}, which its texts were encoded with")
    tokenizer = load_tokenizer(vocabulary, pad=config.tokenizer.pad or None)
    restored = newest_state(folder, config, lambda: build_clip(config, tokenizer))
    state = restored.state
    evaluate, step = image_plan(config).evaluate, restored.record.step
    return ContrastiveRun(config, folder.class_names(), tokenizer, state.evaluated, state.stats, step, evaluate)


def tell_by_name(
    run: ContrastiveRun,
    paths: Sequence[Path],
    *,
    names: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    top: int = 3,
    batch_size: int = 32,
) -> list[Prediction]:
    """The ``top`` classes of each image, told by their ``names`` alone; default are those of the run's data.

    Scores are probabilities: over all names (softmax), or of each by itself for a run of the sigmoid loss. Raises
    ValueError where there are no names, for names that come twice and templates without ``{}``, FileNotFoundError
    before anything is computed, CorruptImageError.
    """
    names = tuple(name.replace("_", " ") for name in (run.class_names if names is None else names))
    if not names:
        raise ValueError(
            "no classes are known, where data have only captions, and of published weights: say what may be in the "
            "images (names=...), such as 'cat' 'dog'"
        )
    templates = templates_of(run.config.data) if templates is None else tuple(templates)
    check_prompts(names, templates)
    for path in paths:
        require_file(path)
    classes = class_vectors(functools.partial(_texts, run), names, templates)
    rows = [row for start in range(0, len(paths), batch_size) for row in _told(run, paths, start, batch_size, classes)]
    return [_named(path, scores, names, top) for path, scores in zip(paths, rows, strict=True)]


def _told(
    run: ContrastiveRun, paths: Sequence[Path], start: int, batch_size: int, classes: Float[np.ndarray, "k d"]
) -> Float[np.ndarray, "b k"]:
    prepared = np.stack([_prepared(run, path) for path in paths[start : start + batch_size]])
    missing = min(batch_size, len(paths)) - len(prepared)
    images = np.pad(prepared, ((0, missing), (0, 0), (0, 0), (0, 0)))
    data = run.config.data
    normalised = jnp.asarray(normalize(images, data.mean, data.std), jnp.dtype(run.config.loop.compute_dtype))
    sigmoid = run.config.task.loss == "sigmoid"
    return np.asarray(_probabilities(run.model, run.stats, normalised, classes, sigmoid=sigmoid))[: len(prepared)]


def _prepared(run: ContrastiveRun, path: Path) -> UInt8[np.ndarray, "h w c"]:
    """An image as the run's evaluation sees it."""
    return run.evaluate(decode_image(path, run.config.model.in_channels))


@functools.partial(jax.jit, static_argnames="sigmoid")
def _probabilities(
    model: Clip, stats: eqx.nn.State, images: Float[Array, "b h w c"], classes: Float[Array, "k d"], *, sigmoid: bool
) -> Float[Array, "b k"]:
    logits = model.scale() * model.encode_images(images, stats)[0] @ classes.T
    if sigmoid:
        return jax.nn.sigmoid(logits + (0.0 if model.logit_bias is None else model.logit_bias))
    return jax.nn.softmax(logits)


def _texts(run: ContrastiveRun, texts: tuple[str, ...]) -> Float[np.ndarray, "m d"]:
    """A few hundred: all at once."""
    tokens = run.tokenizer.encode_batch([run.clean(text) for text in texts], run.config.model.length)
    return np.asarray(_text_vectors(run.model, tokens, dtype=run.config.loop.compute_dtype))


@functools.partial(jax.jit, static_argnames="dtype")
def _text_vectors(model: Clip, text: TextTokens, *, dtype: str) -> Float[Array, "m d"]:
    return model.encode_text(text, dtype=jnp.dtype(dtype))


def _named(path: Path, scores: Float[np.ndarray, " k"], names: tuple[str, ...], top: int) -> Prediction:
    order = np.argsort(-scores, kind="stable")[:top]
    return Prediction(path, tuple(names[i] for i in order), tuple(float(scores[i]) for i in order))
