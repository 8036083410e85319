"""Renaming rules: which tensors of a published file are which leaves of a model, readable in both directions.

A layout is an ordered table of rules. Read forwards they turn a file's tensors into our leaves, backwards our leaves
into the file's tensors. Our leaves go by the names of ``leaf_names.py``: ``backbone.encoder.blocks.norm1.weight``,
``stats.backbone.stem.norm.mean``.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

Arrays = tuple[np.ndarray, ...]
Tensors = Mapping[str, np.ndarray]


class Op(NamedTuple):
    """How the tensors of a rule change: ``load`` from theirs to ours, ``save`` back. Each takes and gives tuples."""

    load: Callable[[Arrays], Arrays]
    save: Callable[[Arrays], Arrays]


def elementwise(load: Callable[[np.ndarray], np.ndarray], save: Callable[[np.ndarray], np.ndarray]) -> Op:
    """One tensor becomes one leaf."""
    return Op(lambda theirs: tuple(map(load, theirs)), lambda ours: tuple(map(save, ours)))


SAME = elementwise(lambda x: x, lambda x: x)
# torch's (out, in), which is ours transposed
LINEAR = elementwise(np.transpose, np.transpose)
# torch's (out, in per group, height, width), against ours (height, width, in per group, out)
CONV = elementwise(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))


def split(count: int, each: Op = SAME) -> Op:
    """One tensor holds ``count`` of our leaves along its first axis, as a fused query, key and value do in torch."""
    return Op(
        lambda theirs: each.load(tuple(np.split(theirs[0], count))),
        lambda ours: (np.concatenate(each.save(ours)),),
    )


def reshaped(theirs: tuple[int, ...], ours: tuple[int, ...]) -> Op:
    """The same numbers in the same order; both shapes are given so that neither has to be guessed."""
    return elementwise(lambda x: _reshape(x, theirs, ours), lambda x: _reshape(x, ours, theirs))


def _reshape(x: np.ndarray, old: tuple[int, ...], new: tuple[int, ...]) -> np.ndarray:
    if x.shape != old:
        raise ShapeError(x.shape, old)
    return x.reshape(new)


def chain(first: Op, second: Op) -> Op:
    """Load by ``first`` and then by ``second``; save the other way round."""
    return Op(lambda theirs: second.load(first.load(theirs)), lambda ours: first.save(second.save(ours)))


class ShapeError(ValueError):
    """A tensor of the file does not have the shape that its rule needs."""

    def __init__(self, given: tuple[int, ...], expected: tuple[int, ...]):
        super().__init__(f"shape {given}, expected {expected}")
        self.given, self.expected = given, expected


class Rule(NamedTuple):
    """``ours`` are leaves and ``theirs`` tensors, one or several of each; ``op`` says how they differ.

    ``each`` names the places of a stack: our leaves have a leading axis of that length, and their names have ``{}``
    where the place stands: its number, or text where files pad numbers with zeros. Names without ``{}`` are stacks
    themselves, and the op is done place by place.
    """

    ours: str | tuple[str, ...]
    theirs: str | tuple[str, ...]
    op: Op = SAME
    each: tuple[int | str, ...] | None = None

    @property
    def our_names(self) -> tuple[str, ...]:
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    @property
    def their_names(self) -> tuple[str, ...]:
        """All tensors that the rule reads, place after place."""
        names = (self.theirs,) if isinstance(self.theirs, str) else self.theirs
        if self.each is None or "{}" not in names[0]:
            return names
        return tuple(name.format(place) for place in self.each for name in names)


def load_rule(rule: Rule, tensors: Tensors) -> dict[str, np.ndarray]:
    """Our leaves of one rule. Raises ShapeError, and ValueError where numpy cannot do what the op says."""
    theirs = tuple(tensors[name] for name in rule.their_names)
    if rule.each is None:
        return dict(zip(rule.our_names, rule.op.load(theirs), strict=True))
    places = [rule.op.load(place) for place in _places(rule, theirs)]
    return {name: np.stack(leaves) for name, leaves in zip(rule.our_names, zip(*places, strict=True), strict=True)}


def save_rule(rule: Rule, leaves: Tensors) -> dict[str, np.ndarray]:
    """The file's tensors of one rule."""
    ours = tuple(leaves[name] for name in rule.our_names)
    if rule.each is None:
        return dict(zip(rule.their_names, rule.op.save(ours), strict=True))
    places = [rule.op.save(place) for place in zip(*ours, strict=True)]
    if len(rule.their_names) == len(places[0]) * len(places):
        flat = [array for place in places for array in place]
        return dict(zip(rule.their_names, flat, strict=True))
    return {name: np.stack(arrays) for name, arrays in zip(rule.their_names, zip(*places, strict=True), strict=True)}


def _places(rule: Rule, theirs: Arrays) -> list[Arrays]:
    assert rule.each is not None
    count = len(rule.each)
    if "{}" in (rule.theirs if isinstance(rule.theirs, str) else rule.theirs[0]):
        width = len(theirs) // count
        return [theirs[i * width : (i + 1) * width] for i in range(count)]
    for array in theirs:
        if array.shape[:1] != (count,):
            raise ShapeError(array.shape, (count, *array.shape[1:]))
    return list(zip(*theirs, strict=True))
