"""Segmentation sources -> padded batches on the host: pure functions of (seed, step), as in ``data/stream.py``.

Row r of training step s is position ``s * batch_size + r`` of the endless sequence, reshuffled epoch by epoch.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from eqvision.data.detection.sizes import Size
from eqvision.data.detection.stream import local_batch_size, naming, row_generator, shuffled_order
from eqvision.data.segmentation.source import SegmentationExample, SegmentationSource
from eqvision.data.segmentation.transforms import LabelTransform, SegmentationTransform
from eqvision.data.stream import DEFAULT_THREADS
from eqvision.types import IGNORE_LABEL, SegmentationBatch

if TYPE_CHECKING:
    import grain

AS_IT_IS = SegmentationTransform()


class SegmentationStream:
    """Iterator over batches."""

    def __init__(self, batches: "grain.MapDataset", num_threads: int):
        import grain

        # One batch per thread in work and two ready, as for classification.
        ahead = num_threads + 2 if num_threads else 0
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=ahead)
        self._iterator = iter(batches.to_iter_dataset(options))

    def __iter__(self) -> "SegmentationStream":
        return self

    def __next__(self) -> SegmentationBatch:
        return next(self._iterator)

    def close(self) -> None:
        """End the threads. Closing twice is fine."""
        cast(Any, self._iterator).close()


def segmentation_train_stream(
    source: SegmentationSource,
    *,
    batch_size: int,
    seed: int,
    canvas: Size,
    transform: LabelTransform = AS_IT_IS,
    num_threads: int = DEFAULT_THREADS,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> SegmentationStream:
    """Endless shuffled batches from ``start_step`` on, equal for any number of threads (0: none) and hosts.

    ``batch_size`` is global; each host gets its contiguous rows of every batch. Images come at the top left of
    ``canvas`` (height, width). The generator that ``transform`` gets depends on (seed, position) alone. Raises
    ValueError for values that do not fit and, naming it, for an image larger than the canvas, and what the source
    raises.
    """
    rows = local_batch_size(source, batch_size, process_index, process_count, num_threads)
    if start_step < 0 or not 0 <= seed < 2**32:
        raise ValueError(f"start_step={start_step}, seed={seed}; expected start_step >= 0 and 0 <= seed < 2**32")
    _check_canvas(canvas)
    shuffle_seed, transform_seed = map(int, np.random.SeedSequence(seed).generate_state(2))
    make = _Batch(source, transform, transform_seed, rows)
    index_of = shuffled_order(source, shuffle_seed)

    def batch(step: int) -> SegmentationBatch:
        first = step * batch_size + process_index * rows
        places = [_Place(position, index_of(position)) for position in range(first, first + rows)]
        return make(places, canvas)

    return _stream(batch, start_step, sys.maxsize, num_threads)


def segmentation_eval_stream(
    source: SegmentationSource,
    *,
    batch_size: int,
    canvas: Size | None,
    transform: LabelTransform = AS_IT_IS,
    multiple: int = 1,
    num_threads: int = DEFAULT_THREADS,
    process_index: int = 0,
    process_count: int = 1,
) -> SegmentationStream:
    """Each example once and in order; the last batch is filled with rows of weight 0 and index -1.

    ``canvas`` None gives every batch the size of its largest image after the transform, rounded up to ``multiple``
    (the stride of the model): one compilation for each shape. Every host sees the same number of batches and the same
    shapes. The generator that ``transform`` gets depends on the example alone. Raises as
    ``segmentation_train_stream`` does.
    """
    rows = local_batch_size(source, batch_size, process_index, process_count, num_threads)
    if multiple < 1:
        raise ValueError(f"multiple={multiple}; expected what sides are rounded up to, 1 or more")
    shapes = _shapes(source, batch_size, canvas, transform, multiple)
    make = _Batch(source, transform, 0, rows)

    def batch(step: int) -> SegmentationBatch:
        first = step * batch_size + process_index * rows
        last = min(first + rows, len(source))
        return make([_Place(index, index) for index in range(first, last)], shapes[step])

    return _stream(batch, 0, len(shapes), num_threads)


def _shapes(
    source: SegmentationSource, batch_size: int, canvas: Size | None, transform: LabelTransform, multiple: int
) -> list[Size]:
    """Of each batch."""
    firsts = range(0, len(source), batch_size)
    if canvas is not None:
        _check_canvas(canvas)
        return [canvas] * len(firsts)
    sizes = np.asarray(source.sizes).tolist()
    after = [transform.output_size((h, w), row_generator(0, index)) for index, (h, w) in enumerate(sizes)]
    largest = [np.max(after[first : first + batch_size], axis=0) for first in firsts]
    return [(_rounded_up(int(h), multiple), _rounded_up(int(w), multiple)) for h, w in largest]


def _rounded_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _check_canvas(canvas: Size) -> None:
    if min(canvas) < 1:
        raise ValueError(f"canvas={canvas}; expected height and width of batches, 1 or more")


def _stream(make: Callable[[int], SegmentationBatch], first: int, last: int, num_threads: int) -> SegmentationStream:
    import grain

    return SegmentationStream(grain.MapDataset.range(first, last).map(make), num_threads)


class _Place(NamedTuple):
    """A row of a batch: what its random numbers come from, and its example."""

    position: int
    index: int


class _Batch:
    """Rows -> batch: read, transformed and padded."""

    def __init__(self, source: SegmentationSource, transform: LabelTransform, seed: int, num_rows: int):
        self._source, self._transform = source, transform
        self._seed, self._num_rows = seed, num_rows

    def __call__(self, places: Sequence[_Place], size: Size) -> Any:
        examples = [self._example(place) for place in places]
        channels = examples[0].image.shape[2] if examples else self._channels
        batch = _empty_batch(self._num_rows, size, channels)
        for row, example in enumerate(examples):
            self._check(example, size, channels)
            _write(batch, row, example)
        return batch

    def _example(self, place: _Place) -> SegmentationExample:
        example = self._source[place.index]
        with naming(self._source.describe, place.index):
            return self._transform(example, row_generator(self._seed, place.position))

    @functools.cached_property
    def _channels(self) -> int:
        """For a batch of which this host has no example; its shape must be that of the others all the same."""
        return self._example(_Place(0, 0)).image.shape[2]

    def _check(self, example: SegmentationExample, size: Size, channels: int) -> None:
        height, width = example.image.shape[:2]
        if height > size[0] or width > size[1]:
            raise ValueError(
                f"{self._source.describe(example.index)} is {height}x{width} (height x width) after the transform and "
                f"does not fit into its batch of {size[0]}x{size[1]}: use a larger canvas, or resize to less"
            )
        if example.image.shape[2] != channels:
            raise ValueError(
                f"{self._source.describe(example.index)} has {example.image.shape[2]} channels and others have "
                f"{channels}; a batch needs the same for all: let the source convert them"
            )


def _empty_batch(num_rows: int, size: Size, channels: int) -> SegmentationBatch:
    """Rows that only pad the batch: black, void, of the full size."""
    full = np.tile(np.array(size, np.int32), (num_rows, 1))  # not 0: models divide by it, and NaN would spread
    columns: tuple[Any, ...] = (
        np.zeros((num_rows, *size, channels), np.uint8),
        np.full((num_rows, *size), IGNORE_LABEL, np.int32),
        full,
        full.copy(),
        np.zeros(num_rows, np.float32),
        np.full(num_rows, -1, np.int32),
    )
    return SegmentationBatch(*columns)


def _write(batch: Any, row: int, example: SegmentationExample) -> None:
    height, width = example.image.shape[:2]
    batch.images[row, :height, :width] = example.image
    batch.labels[row, :height, :width] = example.labels
    batch.size[row], batch.original_size[row] = (height, width), example.original_size
    batch.weights[row], batch.indices[row] = example.weight, example.index
