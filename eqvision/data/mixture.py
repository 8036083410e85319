"""Several sources in one stream, each with its share of the examples."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from eqvision.data.encoded import EncodedSource
from eqvision.data.listing import some_names
from eqvision.data.sources import Example, Source

if TYPE_CHECKING:
    import grain

_SCALE = 2**40  # shares become whole numbers, for exact arithmetic at any position


class Mixture:
    """Sources with the same classes, one behind the other; in training each gives its share of every stretch of steps.

    As a source it is plainly all examples in order, so evaluation sees each once. ``train_stream`` takes ``weights``
    (positive, any sum) into account: see ``shuffled_indices``. Raises ValueError for weights and classes that do not
    fit.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float | int]):
        if not sources or len(sources) != len(weights):
            raise ValueError(f"{len(sources)} sources and {len(weights)} weights; expected one weight for each source")
        if not all(weight > 0 and np.isfinite(weight) for weight in weights):
            raise ValueError(f"weights={tuple(weights)}; expected positive numbers (leave a source out for zero)")
        for source in sources:
            _check_part(source, sources[0])
        self.sources = tuple(sources)
        self.weights = tuple(float(weight) / sum(weights) for weight in weights)
        self.class_names = sources[0].class_names
        self.labels = np.concatenate([source.labels for source in sources])
        self._ends = np.cumsum([len(source) for source in sources])
        if all(isinstance(source, EncodedSource) for source in sources):
            self.encoded = self._encoded  # only then: a mixture of arrays must not look like encoded images

    @property
    def num_skipped(self) -> int:
        """Corrupt images met so far in all sources."""
        return sum(source.num_skipped for source in self.sources)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        index = range(len(self))[index]
        number, inside = self._place(index)
        return self.sources[number][inside]._replace(index=index)

    def _encoded(self, index: int) -> bytes:
        """As stored."""
        number, inside = self._place(index)
        return cast(EncodedSource, self.sources[number]).encoded(inside)

    def describe(self, index: int) -> str:
        """As the source with that example says."""
        number, inside = self._place(index)
        return self.sources[number].describe(inside)

    def _place(self, index: int) -> tuple[int, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, int(index - (self._ends[number - 1] if number else 0))


def shuffled_indices(source: Source, seed: int) -> "grain.MapDataset":
    """The endless training order of indices: a pure function of (seed, position), found at once for any position.

    A source is reshuffled each time it is used up, a mixture's sources each on their own. Which source gives position
    p depends on the weights alone; after any number of positions each has given its share to within one example for
    each source in the mixture.
    """
    import grain

    if not isinstance(source, Mixture):
        return grain.MapDataset.range(len(source)).shuffle(seed=seed).repeat()
    seeds = np.random.SeedSequence([seed, 1]).generate_state(len(source.sources))
    stops = [0, *np.cumsum([len(part) for part in source.sources]).tolist()]
    parts = [
        grain.MapDataset.range(start, stop).shuffle(seed=int(own)).repeat()
        for start, stop, own in zip(stops, stops[1:], seeds, strict=False)
    ]
    return grain.MapDataset.select_from_datasets(parts, cast(Any, _Selection(source.weights)))


class _Selection:
    """Position -> (source, position in its own endless order).

    The first source takes its share of the positions, evenly spread; the second its share of those that are left; and
    so on. How many a source took of the first p is ``p * share // left``, which needs no history.
    """

    def __init__(self, weights: Sequence[float | int]):
        self._shares = [max(1, round(weight * _SCALE)) for weight in weights]

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, position: int) -> tuple[int, int]:
        left = sum(self._shares)
        for number, share in enumerate(self._shares):
            before = position * share // left
            if (position + 1) * share // left > before:
                return number, before
            position, left = position - before, left - share
        raise AssertionError("the last source takes every position that is left")


def _check_part(source: Source, first: Source) -> None:
    if len(source) == 0:
        raise ValueError("a source of the mixture is empty; leave it out")
    if source.labels.shape[1:] != first.labels.shape[1:]:
        raise ValueError(
            f"{source.describe(0)} has labels of shape {source.labels.shape[1:]}, {first.describe(0)} of "
            f"{first.labels.shape[1:]}; a mixture needs the same kind of labels"
        )
    if source.class_names == first.class_names:
        return
    mine, theirs = set(source.class_names), set(first.class_names)
    raise ValueError(
        f"classes differ: only with {first.describe(0)}: {some_names(theirs - mine)}; only with {source.describe(0)}: "
        f"{some_names(mine - theirs)}"
        + ("; the order differs" if mine == theirs else "")
        + ". A mixture needs the same class_names in the same order: pass class_names=(...) to each source"
    )
