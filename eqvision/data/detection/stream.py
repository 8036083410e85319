"""Detection sources -> padded batches on the host: pure functions of (seed, step), as in ``eqvision/data/stream.py``.

Which examples a training batch holds, and its shape, is told in ``buckets.py``. Crowd regions are no targets: a source
leaves them out of its examples (``CocoDetection`` does), and evaluation reads them from the annotations.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sized
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from eqvision.data.detection.annotations import DetectionExample
from eqvision.data.detection.buckets import (
    Buckets,
    Rows,
    TrainingOrder,
    check_buckets,
    evaluation_rows,
    exact_rows,
)
from eqvision.data.detection.collate import Collate
from eqvision.data.detection.sizes import Size
from eqvision.data.detection.source import DetectionSource
from eqvision.data.detection.transforms import DetectionTransform, PlannedTransform, Transform
from eqvision.data.stream import DEFAULT_THREADS
from eqvision.types import DetectionBatch

if TYPE_CHECKING:
    import grain


AS_IT_IS = DetectionTransform()


class DetectionStream:
    """Iterator over batches; ``num_dropped`` objects had no room in them so far (in batches read ahead, too)."""

    def __init__(self, batches: "grain.MapDataset", collate: Collate, num_threads: int):
        import grain

        # One batch per thread in work and two ready, as for classification.
        ahead = num_threads + 2 if num_threads else 0
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=ahead)
        self._iterator, self._collate = iter(batches.to_iter_dataset(options)), collate

    @property
    def num_dropped(self) -> int:
        return self._collate.num_dropped

    def __iter__(self) -> "DetectionStream":
        return self

    def __next__(self) -> DetectionBatch:
        return next(self._iterator)

    def close(self) -> None:
        """End the threads. Closing twice is fine."""
        cast(Any, self._iterator).close()


def detection_train_stream(
    source: DetectionSource,
    *,
    batch_size: int,
    seed: int,
    transform: Transform = AS_IT_IS,
    buckets: Buckets,
    max_objects: int = 100,
    masks: bool = False,
    mask_crop: int | None = None,
    num_threads: int = DEFAULT_THREADS,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> DetectionStream:
    """Endless shuffled batches from ``start_step`` on, equal for any number of threads (0: none) and hosts.

    ``batch_size`` is global; each host gets its contiguous rows of every batch, of the same shape on all. The
    generator that ``transform`` gets depends on (seed, position) alone. Several buckets need a transform with
    ``output_size``. ``masks``: targets carry masks at the size of the batch (``batch_size * max_objects`` of them: much
    memory for large images), which the source must give; ``mask_crop`` makes them squares of that side, of what lies
    in the ``frames`` of the targets, which are the boxes. Cropped to a grid for training again, 112 lose little.
    Raises ValueError for values that do not fit and for images that no bucket holds, and what the source raises.
    """
    local_size = local_batch_size(source, batch_size, process_index, process_count, num_threads)
    if start_step < 0 or not 0 <= seed < 2**32:
        raise ValueError(f"start_step={start_step}, seed={seed}; expected start_step >= 0 and 0 <= seed < 2**32")
    shuffle_seed, transform_seed, window_seed = map(int, np.random.SeedSequence(seed).generate_state(3))
    order = TrainingOrder(
        shuffled_order(source, shuffle_seed),
        num_examples=len(source),
        batch_size=batch_size,
        seed=window_seed,
        buckets=buckets,
        output_size=_Sizes(source, transform, transform_seed, buckets),
        describe=source.describe,
    )
    collate = Collate(max_objects=max_objects, masks=masks, mask_crop=mask_crop, describe=source.describe)
    make = _Batch(source, transform, transform_seed, collate, local_size)
    mine = slice(process_index * local_size, (process_index + 1) * local_size)
    return _stream(lambda step: make(_part(order.rows(step), mine)), start_step, sys.maxsize, collate, num_threads)


def detection_eval_stream(
    source: DetectionSource,
    *,
    batch_size: int,
    transform: Transform = AS_IT_IS,
    buckets: Buckets | None,
    max_objects: int = 100,
    masks: bool = False,
    mask_crop: int | None = None,
    num_threads: int = DEFAULT_THREADS,
    process_index: int = 0,
    process_count: int = 1,
) -> DetectionStream:
    """Each example once: in order with one bucket, else bucket by bucket and in order within each.

    Incomplete batches are filled with rows of weight 0 and index -1. ``buckets`` None gives every batch the size of
    its largest image: with ``batch_size`` 1 the exact shapes that published figures were measured with, at one
    compilation for each shape. That, and several buckets, need a transform with ``output_size``. The generator that
    ``transform`` gets depends on the example alone. Every host sees the same number of batches and the same shapes.
    Raises as ``detection_train_stream`` does, for an image that no bucket holds before the first batch.
    """
    local_size = local_batch_size(source, batch_size, process_index, process_count, num_threads)
    steps = _evaluation_steps(source, batch_size, transform, buckets)
    collate = Collate(max_objects=max_objects, masks=masks, mask_crop=mask_crop, describe=source.describe)
    make = _Batch(source, transform, 0, collate, local_size)
    mine = slice(process_index * local_size, (process_index + 1) * local_size)
    return _stream(lambda step: make(_part(steps[step], mine)), 0, len(steps), collate, num_threads)


def _stream(
    make: Callable[[int], DetectionBatch], first: int, last: int, collate: Collate, num_threads: int
) -> DetectionStream:
    import grain

    return DetectionStream(grain.MapDataset.range(first, last).map(make), collate, num_threads)


def _evaluation_steps(
    source: DetectionSource, batch_size: int, transform: Transform, buckets: Buckets | None
) -> list[Rows]:
    if buckets is not None:
        check_buckets(buckets)
    if buckets is not None and len(buckets.sizes) == 1:
        sizes = [buckets.sizes[0]] * len(source)  # whether the images fit is seen as they come
    else:
        foretold = _Sizes(source, transform, 0, buckets)
        sizes = [foretold(index, index) for index in range(len(source))]
    if buckets is None:
        groups = exact_rows(sizes, batch_size)
    else:
        groups = evaluation_rows(sizes, batch_size, buckets, source.describe)
    return [Rows(rows, rows, size) for rows, size in groups]


def _part(rows: Rows, mine: slice) -> Rows:
    return rows._replace(positions=rows.positions[mine], indices=rows.indices[mine])


def shuffled_order(source: Sized, seed: int) -> Callable[[int], int]:
    """Position -> index in the endless sequence that is reshuffled epoch by epoch."""
    import grain

    indices = grain.MapDataset.range(len(source)).shuffle(seed=seed).repeat()
    return lambda position: cast(int, indices[position])


def row_generator(seed: int, position: int) -> np.random.Generator:
    """What a transform draws from."""
    return np.random.default_rng([seed, position])


class _Sizes:
    """(position, index) -> the size that the image there will have."""

    def __init__(self, source: DetectionSource, transform: Transform, seed: int, buckets: Buckets | None):
        self._transform, self._seed = transform, seed
        if buckets is not None and len(buckets.sizes) == 1:
            return  # nobody asks
        if not isinstance(transform, PlannedTransform):
            raise ValueError(
                f"{'exact shapes' if buckets is None else f'the {len(buckets.sizes)} buckets'} need a transform that "
                f"tells the size of its result beforehand (output_size(size, rng), as DetectionTransform has), and "
                f"{transform} does not; use one_canvas(height, width) with it"
            )
        self._sizes = np.asarray(source.sizes).tolist()

    def __call__(self, position: int, index: int) -> Size:
        height, width = self._sizes[index]
        return cast(PlannedTransform, self._transform).output_size((height, width), row_generator(self._seed, position))


class _Batch:
    """Rows -> batch: read, transformed and padded."""

    def __init__(self, source: DetectionSource, transform: Transform, seed: int, collate: Collate, num_rows: int):
        self._source, self._transform, self._seed = source, transform, seed
        self._collate, self._num_rows = collate, num_rows

    def __call__(self, rows: Rows) -> DetectionBatch:
        places = zip(rows.positions, rows.indices, strict=True)
        examples = [self._example(position, index) for position, index in places]
        channels = examples[0].image.shape[2] if examples else self._channels
        return self._collate(examples, self._num_rows, rows.size, channels)

    def _example(self, position: int, index: int) -> DetectionExample:
        example = self._source[index]
        with naming(self._source.describe, index):
            return self._transform(example, row_generator(self._seed, position))

    @functools.cached_property
    def _channels(self) -> int:
        """For a batch of which this host has no example; its shape must be that of the others all the same."""
        return self._example(0, 0).image.shape[2]


@contextlib.contextmanager
def naming(describe: Callable[[int], str], index: int) -> Iterator[None]:
    """An error inside gets a note that names the example."""
    try:
        yield
    except Exception as error:
        error.add_note(f"while transforming {describe(index)}")
        raise


def local_batch_size(source: Sized, batch_size: int, process_index: int, process_count: int, num_threads: int) -> int:
    """The rows of one host. Raises ValueError for values that do not fit and for a source without examples."""
    if len(source) == 0:
        raise ValueError("the source is empty: nothing to stream")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} is not in 0..{process_count - 1} (process_count)")
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size={batch_size} is global; expected a positive multiple of process_count={process_count}"
        )
    if num_threads < 0:
        raise ValueError(f"num_threads={num_threads}; expected 0 (read in the calling thread) or more")
    return batch_size // process_count
