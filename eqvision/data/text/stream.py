"""Examples of texts -> batches on the host: pure functions of (seed, step), as in ``data/stream.py``.

Row r of training step s is position ``s * batch_size + r`` of the endless sequence, reshuffled epoch by epoch. What is
hidden in it depends on (seed, position): another part of the text each time that it comes.
"""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from eqvision.data.detection.stream import local_batch_size, naming, row_generator, shuffled_order
from eqvision.data.stream import DEFAULT_THREADS
from eqvision.data.text.examples import TextExamples
from eqvision.types import LanguageBatch

if TYPE_CHECKING:
    import grain


class TextStream:
    """Iterator over batches."""

    def __init__(self, batches: "grain.MapDataset", num_threads: int):
        import grain

        # One batch per thread in work and two ready, as for classification.
        ahead = num_threads + 2 if num_threads else 0
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=ahead)
        self._iterator = iter(batches.to_iter_dataset(options))

    def __iter__(self) -> "TextStream":
        return self

    def __next__(self) -> LanguageBatch:
        return next(self._iterator)

    def close(self) -> None:
        """End the threads. Closing twice is fine."""
        cast(Any, self._iterator).close()


def text_train_stream(
    source: TextExamples,
    *,
    batch_size: int,
    seed: int,
    num_threads: int = DEFAULT_THREADS,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> TextStream:
    """Endless shuffled batches from ``start_step`` on, equal for any number of threads (0: none) and hosts.

    ``batch_size`` is global; each host gets its contiguous rows of every batch. Raises ValueError for values that do
    not fit.
    """
    rows = local_batch_size(source, batch_size, process_index, process_count, num_threads)
    if start_step < 0 or not 0 <= seed < 2**32:
        raise ValueError(f"start_step={start_step}, seed={seed}; expected start_step >= 0 and 0 <= seed < 2**32")
    shuffle_seed, example_seed = map(int, np.random.SeedSequence(seed).generate_state(2))
    index_of = shuffled_order(source, shuffle_seed)

    def batch(step: int) -> LanguageBatch:
        first = step * batch_size + process_index * rows
        places = [(position, index_of(position)) for position in range(first, first + rows)]
        return _made(source, places, example_seed, rows)

    return _stream(batch, start_step, sys.maxsize, num_threads)


def text_eval_stream(
    source: TextExamples,
    *,
    batch_size: int,
    num_threads: int = DEFAULT_THREADS,
    process_index: int = 0,
    process_count: int = 1,
) -> TextStream:
    """Each example once and in order, the same at every call; the last batch is filled with rows of weight 0 and index
    -1. Every host sees the same number of batches. Raises as ``text_train_stream`` does."""
    rows = local_batch_size(source, batch_size, process_index, process_count, num_threads)

    def batch(step: int) -> LanguageBatch:
        first = step * batch_size + process_index * rows
        places = [(index, index) for index in range(first, min(first + rows, len(source)))]
        return _made(source, places, 0, rows)

    return _stream(batch, 0, -(-len(source) // batch_size), num_threads)


def _made(source: TextExamples, places: list[tuple[int, int]], seed: int, num_rows: int) -> LanguageBatch:
    examples = []
    for position, index in places:
        with naming(source.describe, index):
            examples.append(source.example(index, row_generator(seed, position)))
    return source.collate(examples, [index for _, index in places], num_rows)


def _stream(make: Callable[[int], LanguageBatch], first: int, last: int, num_threads: int) -> TextStream:
    import grain

    return TextStream(grain.MapDataset.range(first, last).map(make), num_threads)
