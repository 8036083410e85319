"""Images with captions -> batches on the host: pure functions of (seed, step), as in ``data/stream.py``.

Row r of training step s is position ``s * batch_size + r`` of the endless sequence, reshuffled epoch by epoch. Which of
an image's captions it comes with is drawn from (seed, epoch, index) alone, whatever the batch size.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from eqvision.data.detection.stream import local_batch_size, naming, row_generator, shuffled_order
from eqvision.data.pairs.source import PairExample, PairSource
from eqvision.data.stream import DEFAULT_THREADS
from eqvision.data.transforms import EvalTransform, TrainTransform
from eqvision.types import PairsBatch, TextTokens

if TYPE_CHECKING:
    import grain


@runtime_checkable
class TextEncoder(Protocol):
    """What streams need of a tokenizer; they call it from several threads."""

    def encode_batch(self, texts: Sequence[str], length: int) -> TextTokens:
        """One row of ``length`` numbers for each text; longer ones are cut."""
        ...


class PairsStream:
    """Iterator over batches."""

    def __init__(self, batches: "grain.MapDataset", num_threads: int):
        import grain

        # One batch per thread in work and two ready, as for classification.
        ahead = num_threads + 2 if num_threads else 0
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=ahead)
        self._iterator = iter(batches.to_iter_dataset(options))

    def __iter__(self) -> "PairsStream":
        return self

    def __next__(self) -> PairsBatch:
        return next(self._iterator)

    def close(self) -> None:
        """End the threads. Closing twice is fine."""
        cast(Any, self._iterator).close()


def pairs_train_stream(
    source: PairSource,
    tokenizer: TextEncoder,
    *,
    length: int,
    batch_size: int,
    seed: int,
    transform: TrainTransform | None = None,
    num_threads: int = DEFAULT_THREADS,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> PairsStream:
    """Endless shuffled batches from ``start_step`` on, equal for any number of threads (0: none) and hosts.

    ``batch_size`` is global; each host gets its contiguous rows of every batch. Texts have ``length`` tokens. The
    generator that ``transform(image, rng)`` gets depends on (seed, position) alone. Raises ValueError for values that
    do not fit and, naming two examples, for images of different shapes, and what the source raises.
    """
    rows = local_batch_size(source, batch_size, process_index, process_count, num_threads)
    _check_length(length)
    if start_step < 0 or not 0 <= seed < 2**32:
        raise ValueError(f"start_step={start_step}, seed={seed}; expected start_step >= 0 and 0 <= seed < 2**32")
    shuffle_seed, transform_seed, caption_seed = map(int, np.random.SeedSequence(seed).generate_state(3))
    make = _Batch(source, tokenizer, _Changes(transform, transform_seed, caption_seed), rows, length)
    index_of = shuffled_order(source, shuffle_seed)

    def batch(step: int) -> PairsBatch:
        first = step * batch_size + process_index * rows
        return make([_Place(position, index_of(position)) for position in range(first, first + rows)])

    return _stream(batch, start_step, sys.maxsize, num_threads)


def pairs_eval_stream(
    source: PairSource,
    tokenizer: TextEncoder,
    *,
    length: int,
    batch_size: int,
    transform: EvalTransform | None = None,
    num_threads: int = DEFAULT_THREADS,
    process_index: int = 0,
    process_count: int = 1,
) -> PairsStream:
    """Each image once and in order, with its first caption; rows behind the last have weight 0 and index -1.

    Every host sees the same number of batches. Raises as ``pairs_train_stream`` does.
    """
    rows = local_batch_size(source, batch_size, process_index, process_count, num_threads)
    _check_length(length)
    changed = None if transform is None else (lambda image, rng: transform(image))
    make = _Batch(source, tokenizer, _Changes(changed, 0, None), rows, length)

    def batch(step: int) -> PairsBatch:
        first = step * batch_size + process_index * rows
        return make([_Place(index, index) for index in range(first, min(first + rows, len(source)))])

    return _stream(batch, 0, -(-len(source) // batch_size), num_threads)


def drawn_caption(captions: Sequence[str], seed: int, epoch: int, index: int) -> str:
    """The caption that an image comes with in an epoch: a pure function of these numbers."""
    return captions[int(np.random.default_rng([seed, epoch, index]).integers(len(captions)))]


def count_cut(texts: Sequence[str], tokenizer: TextEncoder, length: int) -> int:
    """How many texts have more than ``length`` tokens, and lose their end."""
    if not texts:
        return 0
    return int(np.asarray(tokenizer.encode_batch(texts, length + 1).mask)[:, -1].sum())


def _check_length(length: int) -> None:
    if length < 1:
        raise ValueError(f"length={length}; expected the tokens of a text, 1 or more")


def _stream(make: Callable[[int], PairsBatch], first: int, last: int, num_threads: int) -> PairsStream:
    import grain

    return PairsStream(grain.MapDataset.range(first, last).map(make), num_threads)


class _Place(NamedTuple):
    """A row of a batch: what its random numbers come from, and its example."""

    position: int
    index: int


class _Changes(NamedTuple):
    """What happens to images, and the seeds of that and of the choice of captions; None takes the first caption."""

    transform: TrainTransform | None
    seed: int
    caption_seed: int | None


class _Batch:
    """Rows -> batch: read, transformed, tokenized, filled up."""

    def __init__(self, source: PairSource, tokenizer: TextEncoder, changes: _Changes, num_rows: int, length: int):
        self._source, self._tokenizer, self._changes = source, tokenizer, changes
        self._num_rows, self._length = num_rows, length

    def __call__(self, places: Sequence[_Place]) -> Any:
        examples = [self._example(place) for place in places]
        shape = examples[0].image.shape if examples else self._shape
        self._check(examples, shape)
        missing = self._num_rows - len(examples)
        black = np.zeros((missing, *shape), np.uint8)
        # Of a real text: attention over no token at all would be NaN, which weight 0 does not undo.
        texts = [*(example.captions[0] for example in examples), *self._source.captions(0)[:1] * missing]
        columns: tuple[Any, ...] = (
            np.stack([*(example.image for example in examples), *black]),
            self._tokenizer.encode_batch(texts, self._length),
            np.array([example.weight for example in examples] + [0.0] * missing, np.float32),
            np.array([example.index for example in examples] + [-1] * missing, np.int32),
        )
        return PairsBatch(*columns)

    def _example(self, place: _Place) -> PairExample:
        """With a single caption."""
        example, changes = self._source[place.index], self._changes
        captions = example.captions
        if changes.caption_seed is not None:
            epoch = place.position // len(self._source)
            captions = (drawn_caption(captions, changes.caption_seed, epoch, example.index),)
        if changes.transform is None:
            return example._replace(captions=captions)
        with naming(self._source.describe, place.index):
            image = changes.transform(example.image, row_generator(changes.seed, place.position))
        return example._replace(image=image, captions=captions)

    @functools.cached_property
    def _shape(self) -> tuple[int, ...]:
        """For a batch of which this host has no example; its shape must be that of the others all the same."""
        return self._example(_Place(0, 0)).image.shape

    def _check(self, examples: Sequence[PairExample], shape: tuple[int, ...]) -> None:
        for example in examples:
            if example.image.shape != shape:
                raise ValueError(
                    f"images of one batch differ in shape: {self._name(examples[0].image, examples[0].index)}, "
                    f"{self._name(example.image, example.index)} (after the transform). Use a transform that gives "
                    "every image the same size, such as eval_transform('none', size=...)"
                )

    def _name(self, image: UInt8[np.ndarray, "h w c"], index: int) -> str:
        return f"{self._source.describe(index)} is {image.shape}"
