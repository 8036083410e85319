"""Texts with labels -> batches on the host: pure functions of (seed, step), as in ``stream.py``."""

import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import numpy as np

from eqvision.data.detection.stream import local_batch_size, shuffled_order
from eqvision.data.stream import DEFAULT_THREADS
from eqvision.data.text.glue import GlueTexts
from eqvision.data.text.tokenizer import Tokenizer
from eqvision.types import LabelledTextBatch, TextTokens


class LabelledText(NamedTuple):
    """A text, or a pair, with its class or value."""

    first: str
    second: str | None
    label: Any  # a scalar of numpy


class LabelledTexts:
    """A table of GLUE as rows of ``length`` tokens; longer texts lose their end, the longer of a pair first.

    Raises ValueError for a table without labels and a length that holds no text.
    """

    num_skipped = 0

    def __init__(self, texts: GlueTexts, class_names: tuple[str, ...], tokenizer: Tokenizer, *, length: int):
        if texts.labels is None:
            raise ValueError(f"{texts.file} has no labels; GLUE keeps those of its test splits to itself")
        self.texts, self.labels, self.class_names = texts, texts.labels, class_names
        self._tokenizer, self._length = tokenizer, length
        self._encoded([])  # a length without room is refused here

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> LabelledText:
        texts = self.texts
        return LabelledText(
            texts.first[index], None if texts.second is None else texts.second[index], self.labels[index]
        )

    def describe(self, index: int) -> str:
        return f"example {index} of {self.texts.file}: {self.texts.first[index][:60]!r}"

    def collate(self, indices: list[int], num_rows: int) -> LabelledTextBatch:
        """Arrays of ``num_rows``; rows behind the examples are empty and have weight 0 and index -1."""
        text = self._encoded(indices)
        empty = num_rows - len(indices)
        kind = np.int32 if self.class_names else np.float32
        arrays: list[Any] = [np.pad(np.asarray(x), ((0, empty), (0, 0))) for x in text if x is not None]
        columns: list[Any] = [
            TextTokens(*arrays),
            np.pad(self.labels[indices].astype(kind), (0, empty)),
            np.pad(np.ones(len(indices), np.float32), (0, empty)),
            np.pad(np.array(indices, np.int32), (0, empty), constant_values=-1),
        ]
        return LabelledTextBatch(*columns)

    def _encoded(self, indices: list[int]) -> TextTokens:
        second = self.texts.second
        pairs = None if second is None else [second[index] for index in indices]
        return self._tokenizer.encode_batch([self.texts.first[index] for index in indices], self._length, pairs=pairs)


class LabelledStream:
    """Iterator over batches."""

    def __init__(self, make: Callable[[int], LabelledTextBatch], steps: range, num_threads: int):
        import grain

        # One batch per thread in work and two ready, as for classification.
        ahead = num_threads + 2 if num_threads else 0
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=ahead)
        batches: Any = grain.MapDataset.range(steps.start, steps.stop).map(make)
        self._iterator = iter(batches.to_iter_dataset(options))

    def __iter__(self) -> "LabelledStream":
        return self

    def __next__(self) -> LabelledTextBatch:
        return next(self._iterator)

    def close(self) -> None:
        """End the threads. Closing twice is fine."""
        cast(Any, self._iterator).close()


def labelled_train_stream(
    source: LabelledTexts,
    *,
    batch_size: int,
    seed: int,
    num_threads: int = DEFAULT_THREADS,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> LabelledStream:
    """Endless shuffled batches from ``start_step`` on, equal for any number of threads (0: none) and hosts.

    ``batch_size`` is global; each host gets its contiguous rows of every batch. Raises ValueError for values that do
    not fit.
    """
    rows = local_batch_size(source, batch_size, process_index, process_count, num_threads)
    if start_step < 0 or not 0 <= seed < 2**32:
        raise ValueError(f"start_step={start_step}, seed={seed}; expected start_step >= 0 and 0 <= seed < 2**32")
    index_of = shuffled_order(source, int(np.random.SeedSequence(seed).generate_state(1)[0]))

    def batch(step: int) -> LabelledTextBatch:
        first = step * batch_size + process_index * rows
        return _made(source, map(index_of, range(first, first + rows)), rows)

    return LabelledStream(batch, range(start_step, sys.maxsize), num_threads)


def labelled_eval_stream(
    source: LabelledTexts,
    *,
    batch_size: int,
    num_threads: int = DEFAULT_THREADS,
    process_index: int = 0,
    process_count: int = 1,
) -> LabelledStream:
    """Each example once and in order; the last batch is filled with rows of weight 0 and index -1. Every host sees the
    same number of batches. Raises as ``labelled_train_stream`` does."""
    rows = local_batch_size(source, batch_size, process_index, process_count, num_threads)

    def batch(step: int) -> LabelledTextBatch:
        first = step * batch_size + process_index * rows
        return _made(source, range(first, min(first + rows, len(source))), rows)

    return LabelledStream(batch, range(-(-len(source) // batch_size)), num_threads)


def _made(source: LabelledTexts, indices: Iterable[int], num_rows: int) -> LabelledTextBatch:
    return source.collate([int(index) for index in indices], num_rows)
