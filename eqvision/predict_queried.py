"""Open-vocabulary detectors, used on image files: objects by the names that they are asked for with."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eqvision.data import decode_image
from eqvision.data.detection import DetectionExample, canonical
from eqvision.data.detection.collate import Collate
from eqvision.data.text import Tokenizer, clip_bpe
from eqvision.detectors import OwlViT, batch_extent, decode_queried
from eqvision.evaluators.console import progress_bar
from eqvision.predict import newest_state, require_file
from eqvision.predict_objects import FoundObjects
from eqvision.pretrained.assemble import Sizes
from eqvision.pretrained.load import read_model
from eqvision.problems.open_vocabulary import build_open_vocabulary, normalize_filled
from eqvision.problems.open_vocabulary_data import evaluation_plan, run_tokenizer
from eqvision.recipes import OpenVocabularyConfig, OpenVocabularyDataConfig, OpenVocabularyModelConfig
from eqvision.run_folder import RunFolder
from eqvision.types import DetectionBatch, Detections, TextTokens

BATCH_SIZE = 8
THRESHOLD = 0.2


class OpenVocabularyRun(NamedTuple):
    """An open-vocabulary detector with all that is needed to use it; ``class_names`` are those it was trained on."""

    config: OpenVocabularyConfig
    class_names: tuple[str, ...]
    model: OwlViT
    stats: eqx.nn.State
    tokenizer: Tokenizer
    step: int


def load_open_vocabulary_run(path: str | Path) -> OpenVocabularyRun:
    """The newest good checkpoint of a run; the average of the parameters, where the run keeps one.

    Raises RunFolderError where the folder is none, of another kind or holds no checkpoint yet, and CheckpointError.
    """
    folder = RunFolder(path)
    config = folder.open_vocabulary()
    names = folder.class_names()
    tokenizer = run_tokenizer(config, names, kept_in=folder.path)
    restored = newest_state(folder, config, lambda: build_open_vocabulary(config, tokenizer))
    state = restored.state
    return OpenVocabularyRun(config, names, state.evaluated, state.stats, tokenizer, restored.record.step)


def load_published_open_vocabulary(
    name: str, source: str | Path | None = None, *, layout: str | None = None
) -> OpenVocabularyRun:
    """A model of the zoo with published weights, and CLIP's vocabulary, which lies in the same folder.

    Images are padded to a square as in training, with grey, or black for the second version. Raises what
    ``eqvision.load`` raises, and FileNotFoundError where there is no vocabulary.
    """
    loaded = read_model(name, source, Sizes(), layout=layout)
    model = loaded.model
    tokenizer = clip_bpe(loaded.path if loaded.path.is_dir() else loaded.path.parent)
    tokenizer.require_fits(len(model.text_tower.token_embedding.weight), name)
    side = model.backbone.position.weight.shape[0] * model.backbone.strides[-1]
    data = OpenVocabularyDataConfig(size=side, padding=0.5 if model.head.objectness is None else 0.0)
    options = OpenVocabularyModelConfig(name, model.backbone.in_channels, len(model.text_tower.position.weight))
    config = OpenVocabularyConfig(model=options, data=data)
    return OpenVocabularyRun(config, (), model, loaded.state, tokenizer, 0)


def find_named(
    run: OpenVocabularyRun,
    paths: Sequence[Path],
    queries: Sequence[str] = (),
    *,
    threshold: float | int = THRESHOLD,
    top: int | None = None,
    batch_size: int = BATCH_SIZE,
) -> list[FoundObjects]:
    """What is found in each image with a score of ``threshold`` or more, at most ``top`` objects of each; labels are
    numbers of ``queries``, by default the names of the run's classes.

    Queries are read as in training: lower case, and without punctuation. Raises ValueError for a threshold outside
    0..1 and for a query of nothing, FileNotFoundError before anything is computed, CorruptImageError.
    """
    if not 0 <= threshold <= 1 or (top is not None and top < 1):
        raise ValueError(f"threshold={threshold}, top={top}; expected a score of 0 to 1, and 1 object or more")
    names = tuple(queries) or run.class_names
    if not names:
        raise ValueError(
            "published weights know no classes: say what to look for, as --queries 'a photo of a cat' 'a hat'"
        )
    texts = [canonical(name) for name in names]
    if not all(texts):
        raise ValueError(f"query {texts.index('') + 1} of {len(texts)} is {names[texts.index('')]!r}: it has no word")
    for path in paths:
        require_file(path)
    tokens = run.tokenizer.encode_batch(texts, run.config.model.length)
    rows, found = min(batch_size, len(paths)), []
    with progress_bar(len(paths), "finding objects", "image") as bar:
        for start in range(0, len(paths), rows):
            some = paths[start : start + rows]
            found += _find(run, some, tokens, names, rows, (threshold, top))
            bar.update(len(some))
    return found


def _find(
    run: OpenVocabularyRun,
    paths: Sequence[Path],
    tokens: TextTokens,
    names: tuple[str, ...],
    rows: int,
    limits: tuple[float | int, int | None],
) -> list[FoundObjects]:
    data, channels = run.config.data, run.config.model.in_channels
    shape = evaluation_plan(data).buckets.sizes[0]
    examples = [_prepared(run, path, index) for index, path in enumerate(paths)]
    collate = Collate(max_objects=1, masks=False, describe=lambda index: str(paths[index]))
    batch: DetectionBatch = collate(examples, rows, shape, channels)
    host = jax.tree.map(
        np.asarray, _detections(run.model, run.stats, batch, tokens, data=data, dtype=run.config.loop.compute_dtype)
    )
    each = [jax.tree.map(lambda column, row=row: column[row], host) for row in range(len(paths))]
    return [
        _chosen(path, example.original_size, one, names, limits)
        for path, example, one in zip(paths, examples, each, strict=True)
    ]


def _prepared(run: OpenVocabularyRun, path: Path, index: int) -> DetectionExample:
    """An image as the run's evaluation sees it, without objects."""
    image = decode_image(path, run.config.model.in_channels)
    size = (image.shape[0], image.shape[1])
    example = DetectionExample(image, np.zeros((0, 4), np.float32), np.zeros(0, np.int32), None, index, index, size)
    return evaluation_plan(run.config.data).transform(example, np.random.default_rng(0))  # which draws nothing


@functools.partial(jax.jit, static_argnames=("data", "dtype"))
def _detections(
    model: OwlViT, stats: eqx.nn.State, batch: DetectionBatch, tokens: TextTokens, *, data: Any, dtype: str
) -> Detections:
    """In pixels of the original images."""
    images = normalize_filled(batch.images, batch.size, data).astype(jnp.dtype(dtype))
    patches, _ = model.encode_images(images, stats)
    queries = model.encode_queries(TextTokens(tokens.ids, tokens.mask), dtype=images.dtype)
    queries = jnp.broadcast_to(queries, (len(batch.images), *queries.shape))
    predictions = model.predict(patches, queries, jnp.ones(queries.shape[:2], bool))
    extent = batch_extent(batch.images.shape[1:3], batch.size, batch.original_size)
    return decode_queried(predictions, extent, count=data.count)


def _chosen(
    path: Path,
    size: tuple[int, int],
    one: Detections,
    names: tuple[str, ...],
    limits: tuple[float | int, int | None],
) -> FoundObjects:
    """The objects of one image that are wanted."""
    boxes, scores, labels = np.asarray(one.boxes), np.asarray(one.scores), np.asarray(one.labels)
    threshold, top = limits
    kept = np.flatnonzero(np.asarray(one.valid) & (scores >= threshold))[:top]
    said = tuple(names[int(label)] for label in labels[kept])
    return FoundObjects(path, size, boxes[kept], scores[kept], labels[kept], said, float(scores.max()))
