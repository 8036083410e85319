"""Sources -> batches on the host. The order is a pure function of (seed, position), so a step number is all the state.

Training positions are counted over the endless, epoch by epoch reshuffled sequence: row r of step s is position
``s * batch_size + r``, epoch ``position // len(source)``. Nothing is dropped: each example comes exactly once per
epoch, and a batch may hold the end of one epoch and the start of the next.
"""

import functools
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from eqvision.data.sources import Example, Source
from eqvision.data.transforms import EvalTransform, TrainTransform
from eqvision.types import ClassificationBatch

if TYPE_CHECKING:
    import grain

DEFAULT_THREADS = min(16, os.cpu_count() or 1)


def steps_per_epoch(source: Source, batch_size: int) -> int:
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
) -> Iterator[ClassificationBatch]:
    """Endless shuffled batches from ``start_step`` on, equal for any number of threads (0: none) and hosts.

    ``batch_size`` is global; each host gets its contiguous rows of every batch. ``transform(image, rng)`` gets a
    generator that depends on (seed, position) alone. The iterator has ``close()``. Raises ValueError for values that
    do not fit, and what the source raises (CorruptImageError).
    """
    import grain

    local_size = _local_batch_size(source, batch_size, num_threads, process_index, process_count)
    if start_step < 0 or not 0 <= seed < 2**32:
        raise ValueError(f"start_step={start_step}, seed={seed}; expected start_step >= 0 and 0 <= seed < 2**32")
    # Seeds of our own: grain's defaults depend on the shape of its pipeline, and shuffle uses seed + epoch.
    shuffle_seed, transform_seed = map(int, np.random.SeedSequence(seed).generate_state(2))
    examples = grain.MapDataset.source(source).shuffle(seed=shuffle_seed).repeat()
    if transform is not None:
        examples = examples.random_map(_TransformTrain(source, transform), seed=transform_seed)
    batches = examples.batch(local_size, batch_fn=list).map(_Collate(source))
    mine = batches[start_step * process_count + process_index :: process_count]
    return iter(mine.to_iter_dataset(_read_options(num_threads)))


def eval_stream(
    source: Source,
    *,
    batch_size: int,
    transform: EvalTransform | None = None,
    num_threads: int = DEFAULT_THREADS,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[ClassificationBatch]:
    """Each example once and in order; the last batch is filled with rows of weight 0 and index -1.

    ``batch_size`` is global; every host sees the same number of batches. Raises as ``train_stream`` does.
    """
    import grain

    local_size = _local_batch_size(source, batch_size, num_threads, process_index, process_count)
    num_batches = -(-len(source) // batch_size)
    examples = grain.MapDataset.range(num_batches * batch_size).map(_EvalRow(source, transform))
    batches = examples.batch(local_size, batch_fn=list).map(_Collate(source))
    return iter(batches[process_index::process_count].to_iter_dataset(_read_options(num_threads)))


def _local_batch_size(source: Source, batch_size: int, num_threads: int, process_index: int, process_count: int) -> int:
    if len(source) == 0:
        raise ValueError("the source is empty: nothing to stream")
    if num_threads < 0:
        raise ValueError(f"num_threads={num_threads}; expected 0 (read in the calling thread) or more")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} is not in 0..{process_count - 1} (process_count)")
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size={batch_size} is global; expected a positive multiple of process_count={process_count}"
        )
    return batch_size // process_count


def _read_options(num_threads: int) -> "grain.ReadOptions":
    import grain

    # One batch per thread in work and two ready: enough to hide a slow batch, without filling the memory.
    return grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_threads + 2 if num_threads else 0)


class _TransformTrain:
    """Example -> transformed example; an error carries the example's name."""

    def __init__(self, source: Source, transform: TrainTransform):
        self._source, self._transform = source, transform

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        try:
            return example._replace(image=self._transform(example.image, rng))
        except Exception as error:
            error.add_note(f"while transforming {self._source.describe(example.index)}")
            raise


class _EvalRow:
    """Position -> transformed example, and behind the last example a black row of weight 0."""

    def __init__(self, source: Source, transform: EvalTransform | None):
        self._source, self._transform = source, transform

    def __call__(self, position: int) -> Example:
        if position < len(self._source):
            return self._transformed(position)
        return self._padding

    def _transformed(self, index: int) -> Example:
        example = self._source[index]
        try:
            return example if self._transform is None else example._replace(image=self._transform(example.image))
        except Exception as error:
            error.add_note(f"while transforming {self._source.describe(index)}")
            raise

    @functools.cached_property
    def _padding(self) -> Example:
        last = self._transformed(len(self._source) - 1)
        return Example(np.zeros_like(last.image), np.zeros_like(last.label), index=-1, weight=0.0)


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
