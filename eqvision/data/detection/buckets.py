"""Buckets: the few static shapes that batches of images of many sizes may have, and the order of examples they imply.

XLA compiles a program for each shape, so a batch takes the smallest of some given shapes that holds all of its images.
The training order is that of the endless shuffled sequence, cut into windows of ``window`` batches. Within a window
the sizes that the transform will give are known beforehand; its examples are sorted by the bucket they need, cut into
batches, and the batches shuffled. So every position of the sequence comes exactly once, nothing is dropped or
repeated, and where an image stands depends on (seed, step) alone: a window can be made without those before it. The
price: where the examples of one bucket end within a batch, the rest of it are of the next (buckets lie in the order
of their shape, from upright to wide, so that neighbours are alike), and the batch takes a bucket that holds both: at
most one such batch for each bucket but the first, in every window. And where an epoch ends within a window, an
example may come up to a window early or late.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from eqvision.data.detection.sizes import Size


class Buckets(NamedTuple):
    """Shapes (height, width) that batches may have, and how many batches of a training stream are sorted together."""

    sizes: tuple[Size, ...]
    window: int = 32


class Rows(NamedTuple):
    """One training batch: positions in the endless sequence, the examples there, and the shape that holds them."""

    positions: tuple[int, ...]
    indices: tuple[int, ...]
    size: Size


def one_canvas(height: int, width: int | None = None) -> Buckets:
    """A single shape, square without ``width``: one program, the order of ``train_stream``, and the most padding."""
    return Buckets(((height, height if width is None else width),), window=1)


def coco_buckets(window: int = 32) -> Buckets:
    """Shapes for shorter sides up to 800 and longer ones up to 1333, on multiples of 32; the last holds every other.

    Sides of 640 x 480 pixels, the usual ones in COCO, become 800 x 1067: padded to 1088 that is 2 % of padding.
    """
    return Buckets(((800, 800), (800, 1088), (1088, 800), (800, 1344), (1344, 800), (1344, 1344)), window)


def smallest_bucket(buckets: Buckets, size: Size) -> Size | None:
    """The bucket of the least area that holds an image of ``size``; None where none does."""
    fitting = [(h * w, (h, w)) for h, w in buckets.sizes if h >= size[0] and w >= size[1]]
    return min(fitting)[1] if fitting else None


def bucket_for(buckets: Buckets, size: Size, describe: Callable[[], str]) -> Size:
    """``smallest_bucket``. Raises ValueError, naming the example, for an image that fits into none."""
    found = smallest_bucket(buckets, size)
    if found is None:
        raise ValueError(
            f"{describe()} is {size[0]}x{size[1]} (height x width) after the transform and fits into none of the "
            f"buckets {list(buckets.sizes)}; add a larger bucket, or resize to less in the transform"
        )
    return found


def check_buckets(buckets: Buckets) -> None:
    """Raises ValueError for sizes below 1 or given twice, and for several of which none holds all others."""
    sizes = buckets.sizes
    if not sizes or any(min(size) < 1 for size in sizes) or len(set(sizes)) < len(sizes):
        raise ValueError(f"buckets={list(sizes)}; expected (height, width) of 1 or more, each once")
    if buckets.window < 1:
        raise ValueError(f"window={buckets.window}; expected the number of batches sorted together, 1 or more")
    largest = (max(h for h, _ in sizes), max(w for _, w in sizes))
    if largest not in sizes:
        raise ValueError(
            f"none of the buckets {list(sizes)} holds all others, and a batch of images of several of them must fit "
            f"somewhere: add {largest}"
        )


class TrainingOrder:
    """Step -> rows of the batch, as described at the top of this file.

    ``indices`` gives the example at any position of the endless sequence; ``output_size(position, index)`` the size
    that its image will have, which is asked for only where there are several buckets. Raises ValueError as
    ``check_buckets`` does, and from ``rows`` for an image that fits into no bucket.
    """

    def __init__(
        self,
        indices: Callable[[int], int],
        *,
        num_examples: int,
        batch_size: int,
        seed: int,
        buckets: Buckets,
        output_size: Callable[[int, int], Size],
        describe: Callable[[int], str],
    ):
        check_buckets(buckets)
        self._indices, self._batch_size, self._seed, self._buckets = indices, batch_size, seed, buckets
        self._output_size, self._describe = output_size, describe
        # No more than an epoch: an example that were twice in a window could be twice in a batch.
        self._window = 1 if len(buckets.sizes) == 1 else min(buckets.window, max(1, num_examples // batch_size))
        self._kept: OrderedDict[int, list[Rows]] = OrderedDict()
        self._lock = threading.Lock()

    def rows(self, step: int) -> Rows:
        """What the batch of this step (from 0) holds."""
        if len(self._buckets.sizes) == 1:
            positions = range(step * self._batch_size, (step + 1) * self._batch_size)
            return Rows(tuple(positions), tuple(map(self._indices, positions)), self._buckets.sizes[0])
        number, batch = divmod(step, self._window)
        with self._lock:  # threads ask for neighbouring steps: one of them makes the window, the others wait for it
            if number not in self._kept:
                self._kept[number] = self._make_window(number)
                if len(self._kept) > 3:
                    self._kept.popitem(last=False)
            return self._kept[number][batch]

    def _make_window(self, number: int) -> list[Rows]:
        count = self._window * self._batch_size
        positions = range(number * count, (number + 1) * count)
        indices = [self._indices(position) for position in positions]
        sizes = [self._output_size(*place) for place in zip(positions, indices, strict=True)]
        shapes = _from_upright_to_wide(self._buckets.sizes)
        needed = [shapes.index(self._bucket(size, index)) for size, index in zip(sizes, indices, strict=True)]
        chunks = np.argsort(needed, kind="stable").reshape(self._window, self._batch_size)
        order = np.random.default_rng([self._seed, number]).permutation(self._window)
        return [self._batch_of(chunks[place].tolist(), positions, indices, sizes) for place in order]

    def _batch_of(
        self, chunk: list[int], positions: Sequence[int], indices: Sequence[int], sizes: Sequence[Size]
    ) -> Rows:
        height, width = (max(sizes[row][side] for row in chunk) for side in (0, 1))
        size = self._bucket((height, width), indices[chunk[0]])
        return Rows(tuple(positions[row] for row in chunk), tuple(indices[row] for row in chunk), size)

    def _bucket(self, size: Size, index: int) -> Size:
        return bucket_for(self._buckets, size, lambda: self._describe(index))


def evaluation_rows(
    sizes: Sequence[Size], batch_size: int, buckets: Buckets, describe: Callable[[int], str]
) -> list[tuple[tuple[int, ...], Size]]:
    """The examples of each batch and its shape: every example once, bucket by bucket, in order within each.

    The last batch of a bucket may hold fewer than ``batch_size``. Raises ValueError, naming the example, for an image
    that fits into no bucket.
    """
    groups: dict[Size, list[int]] = {size: [] for size in _from_upright_to_wide(buckets.sizes)}
    for index, size in enumerate(sizes):
        groups[bucket_for(buckets, size, lambda index=index: describe(index))].append(index)
    return [
        (tuple(group[start : start + batch_size]), size)
        for size, group in groups.items()
        for start in range(0, len(group), batch_size)
    ]


def exact_rows(sizes: Sequence[Size], batch_size: int) -> list[tuple[tuple[int, ...], Size]]:
    """Batches in order, each as large as its largest height and width: with ``batch_size`` 1 nothing is padded."""
    starts = range(0, len(sizes), batch_size)
    groups = [tuple(range(start, min(start + batch_size, len(sizes)))) for start in starts]
    return [(group, (max(sizes[i][0] for i in group), max(sizes[i][1] for i in group))) for group in groups]


def _from_upright_to_wide(sizes: Sequence[Size]) -> list[Size]:
    return sorted(sizes, key=lambda size: (size[1] / size[0], size))
