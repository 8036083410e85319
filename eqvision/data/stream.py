"""Sources -> batches on the host. The order is a pure function of (seed, position), so a step number is all the state.

Training positions are counted over the endless, epoch by epoch reshuffled sequence: row r of step s is position
``s * batch_size + r``, epoch ``position // len(source)``. Nothing is dropped: each example comes exactly once per
epoch, and a batch may hold the end of one epoch and the start of the next.

With ``repeats`` r a batch shows ``batch_size / r`` neighbours of that sequence, all of them r times over: row j of
step s is the image at ``s * batch_size / r + j % (batch_size / r)``, each row augmented on its own. Steps per epoch
stay what they are, so an epoch sees a share 1 / r of the images, as in timm; here r epochs together see each once.
"""

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Iterator, Sequence, Sized
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from eqvision.data.decode import CorruptImageError
from eqvision.data.encoded import EncodedSource
from eqvision.data.encoded_transform import EncodedTransform
from eqvision.data.mixture import shuffled_indices
from eqvision.data.sources import Example, Source
from eqvision.data.transforms import EvalTransform, TrainTransform
from eqvision.data.workers import WorkerBatches, note_example
from eqvision.types import ClassificationBatch

if TYPE_CHECKING:
    import grain

log = logging.getLogger(__name__)

DEFAULT_THREADS = min(16, os.cpu_count() or 1)


def steps_per_epoch(source: Sized, batch_size: int) -> int:
    """Whole batches in one pass over the source; 1 for a source smaller than a batch."""
    return max(1, len(source) // batch_size)


def train_stream(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    transform: TrainTransform | None = None,
    num_threads: int = DEFAULT_THREADS,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    repeats: int = 1,
    num_workers: int = 0,
) -> Iterator[ClassificationBatch]:
    """Endless shuffled batches from ``start_step`` on, equal for any number of threads (0: none), workers and hosts.

    ``batch_size`` is global; each host gets its contiguous rows of every batch. ``transform(image, rng)`` gets a
    generator that depends on (seed, position) alone. Each image comes ``repeats`` times in a batch (repeated
    augmentation, Hoffer et al. 2020; see the top of this file). With ``num_workers`` so many processes make the
    batches instead of the threads; see ``workers.py``. The iterator has ``close()``. Raises ValueError for values
    that do not fit, what the source raises (CorruptImageError), and WorkerDiedError.
    """
    import grain

    local_size = _local_batch_size(source, batch_size, process_index, process_count)
    _check_readers(num_threads, num_workers)
    _check_repeats(repeats, batch_size)
    if start_step < 0 or not 0 <= seed < 2**32:
        raise ValueError(f"start_step={start_step}, seed={seed}; expected start_step >= 0 and 0 <= seed < 2**32")
    # Seeds of our own: grain's defaults depend on the shape of its pipeline, and shuffle uses seed + epoch.
    shuffle_seed, transform_seed = map(int, np.random.SeedSequence(seed).generate_state(2))
    indices = shuffled_indices(source, shuffle_seed)
    if repeats > 1:
        indices = grain.MapDataset.range(sys.maxsize).map(_Repeated(indices, batch_size, repeats))
    examples = indices.random_map(_TrainRow(source, transform), seed=transform_seed)
    batches = examples.batch(local_size, batch_fn=list).map(_Collate(source))
    first = start_step * process_count + process_index
    if num_workers:
        return _by_workers(batches[first::process_count], examples[first * local_size], source, local_size, num_workers)
    return _by_threads(batches[first::process_count], num_threads)


def eval_stream(
    source: Source,
    *,
    batch_size: int,
    transform: EvalTransform | None = None,
    num_threads: int = DEFAULT_THREADS,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
) -> Iterator[ClassificationBatch]:
    """Each example once and in order; the last batch is filled with rows of weight 0 and index -1.

    ``batch_size`` is global; every host sees the same number of batches. Raises as ``train_stream`` does.
    """
    import grain

    local_size = _local_batch_size(source, batch_size, process_index, process_count)
    _check_readers(num_threads, num_workers)
    num_batches = -(-len(source) // batch_size)
    examples = grain.MapDataset.range(num_batches * batch_size).map(_EvalRow(source, transform))
    batches = examples.batch(local_size, batch_fn=list).map(_Collate(source))
    mine = batches[process_index::process_count]
    if num_workers:
        return _by_workers(mine, examples[0], source, local_size, num_workers)
    return _by_threads(mine, num_threads)


def _local_batch_size(source: Source, batch_size: int, process_index: int, process_count: int) -> int:
    if len(source) == 0:
        raise ValueError("the source is empty: nothing to stream")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} is not in 0..{process_count - 1} (process_count)")
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size={batch_size} is global; expected a positive multiple of process_count={process_count}"
        )
    return batch_size // process_count


def _check_repeats(repeats: int, batch_size: int) -> None:
    if repeats < 1 or batch_size % repeats:
        raise ValueError(
            f"repeats={repeats} does not divide batch_size={batch_size} (global); every image of a batch appears "
            f"repeats times in it: choose batch_size as a multiple of repeats, and repeats from 1 up"
        )


def _check_readers(num_threads: int, num_workers: int) -> None:
    if num_threads < 0:
        raise ValueError(f"num_threads={num_threads}; expected 0 (read in the calling thread) or more")
    if num_workers < 0:
        raise ValueError(f"num_workers={num_workers}; expected 0 (threads read) or the number of processes")


def _by_threads(batches: "grain.MapDataset", num_threads: int) -> Iterator[ClassificationBatch]:
    import grain

    # One batch per thread in work and two ready: enough to hide a slow batch, without filling the memory.
    ahead = num_threads + 2 if num_threads else 0
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=ahead)))


def _by_workers(
    batches: "grain.MapDataset", example: Any, source: Source, local_size: int, num_workers: int
) -> Iterator[ClassificationBatch]:
    """Any transformed example tells how much memory a batch takes; what is beside the pixels is small."""
    slot_bytes = local_size * (example.image.nbytes + np.asarray(example.label).nbytes + 64) + 1024
    return WorkerBatches(cast(Any, batches), source, num_workers=num_workers, slot_bytes=slot_bytes)


class _Repeated:
    """Position -> index of an example, where each batch shows its images several times.

    The copies lie ``batch_size / repeats`` rows apart, not side by side: a device with fewer rows than that sees
    different images only, and mixup within it has something to mix.
    """

    def __init__(self, indices: "grain.MapDataset", batch_size: int, repeats: int):
        self._indices, self._batch_size, self._distinct = indices, batch_size, batch_size // repeats

    def __call__(self, position: int) -> int:
        step, row = divmod(position, self._batch_size)
        return cast(int, self._indices[step * self._distinct + row % self._distinct])


class _TrainRow:
    """Index -> transformed example; an error of the transform carries the example's name."""

    def __init__(self, source: Source, transform: TrainTransform | None):
        self._source, self._transform = source, transform
        self._by_file = isinstance(transform, EncodedTransform) and isinstance(source, EncodedSource)
        if isinstance(transform, EncodedTransform) and transform.decoder == "fast" and not self._by_file:
            log.warning("data.decoder 'fast' changes nothing: %s does not give encoded images", type(source).__name__)

    def __call__(self, index: int, rng: np.random.Generator) -> Example:
        note_example(index)
        if not self._by_file:
            return self._from_pixels(index, rng)
        try:
            return self._from_encoded(index, rng)
        except CorruptImageError:  # the source raises the same, or gives its stand-in and counts it
            return self._from_pixels(index, rng)

    def _from_encoded(self, index: int, rng: np.random.Generator) -> Example:
        source, transform = cast(EncodedSource, self._source), cast(EncodedTransform, self._transform)
        with _naming(source, index):
            image = transform.from_encoded(source.encoded(index), source.describe(index), rng)
        return Example(image, source.labels[index], index)

    def _from_pixels(self, index: int, rng: np.random.Generator) -> Example:
        example = self._source[index]
        with _naming(self._source, index):
            return example if self._transform is None else example._replace(image=self._transform(example.image, rng))


class _EvalRow:
    """Position -> transformed example, and behind the last example a black row of weight 0."""

    def __init__(self, source: Source, transform: EvalTransform | None):
        self._source, self._transform = source, transform

    def __call__(self, position: int) -> Example:
        if position < len(self._source):
            return self._transformed(position)
        return self._padding

    def _transformed(self, index: int) -> Example:
        note_example(index)
        example = self._source[index]
        with _naming(self._source, index):
            return example if self._transform is None else example._replace(image=self._transform(example.image))

    @functools.cached_property
    def _padding(self) -> Example:
        last = self._transformed(len(self._source) - 1)
        return Example(np.zeros_like(last.image), np.zeros_like(last.label), index=-1, weight=0.0)


@contextlib.contextmanager
def _naming(source: Source, index: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(f"while transforming {source.describe(index)}")
        raise


class _Collate:
    """Examples -> batch. Raises ValueError, naming two examples, where the images differ in shape."""

    def __init__(self, source: Source):
        self._source = source

    def __call__(self, examples: Sequence[Example]) -> ClassificationBatch:
        first = examples[0]
        for example in examples:
            if example.image.shape != first.image.shape:
                raise ValueError(
                    f"images of one batch differ in shape: {self._name(first)} is {first.image.shape}, "
                    f"{self._name(example)} is {example.image.shape} (after the transform). Use a transform that "
                    "gives every image the same size, such as eval_transform('none', size=...)"
                )
        columns: tuple[Any, ...] = (
            np.stack([e.image for e in examples]),
            np.array([e.label for e in examples]),
            np.array([e.weight for e in examples], np.float32),
            np.array([e.index for e in examples], np.int32),
        )
        return ClassificationBatch(*columns)

    def _name(self, example: Example) -> str:
        return "padding" if example.index < 0 else self._source.describe(example.index)
