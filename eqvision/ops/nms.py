"""Non-maximum suppression: greedy and exact, inside ``jit``, in blocks, so that no table of all pairs is ever held."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from eqvision.names import nearest
from eqvision.ops.boxes import pairwise_iou
from eqvision.ops.collectives import vary_like

# How many boxes the references still tell apart by class through shifting them in float32; they compare the classes
# themselves above that. Ours: never shifted. torchvision counts coordinates (4000 on a processor, 100 000 on a GPU
# since its pull request 8925, 20 000 before); detectron2 calls it, on the GPU; mmcv shifts below 10 000 boxes.
CLASS_RULES: dict[str, int] = {
    "exact": 0,
    "coordinate_trick": 2**31 - 1,
    "torchvision": 1_000,
    "torchvision_gpu": 25_000,
    "detectron2": 25_000,
    "mmdet": 9_999,
}


class Selection(NamedTuple):
    """Rows of an array, best first; ``indices`` are 0 where ``valid`` is False."""

    indices: Int[Array, "*batch k"]
    valid: Bool[Array, "*batch k"]


def nms(
    boxes: Float[Array, "*batch n 4"],
    scores: Float[Array, "*batch n"],
    *,
    threshold: float,
    labels: Int[Array, "*batch n"] | None = None,
    valid: Bool[Array, "*batch n"] | None = None,
    max_kept: int | None = None,
    class_rule: str = "exact",
    tile: int = 256,
) -> Bool[Array, "*batch n"]:
    """Which rows greedy non-maximum suppression keeps.

    The row with the highest score is kept, every other whose IoU with it is above ``threshold`` (strictly, in float32)
    falls out, and so on with what is left. Of equal scores the earlier row comes first. Boxes are xyxy, of any sign;
    empty ones overlap nothing. Leading axes are separate problems.

    With ``labels``, rows of different classes do not touch each other. The references get there by shifting boxes by
    label * (largest coordinate + 1), which rounds coordinates and lets boxes left of or above 0 meet another class;
    ``class_rule`` names one to do as it does (``CLASS_RULES``), for parity.

    Rows that are not ``valid``, and rows with a score or coordinate that is not finite, are not kept and suppress
    nothing. With ``max_kept`` only that many best rows stay, and the search ends once they are found.

    Rows are sorted and cut into tiles of ``tile``. A tile is compared with each earlier one, then with itself until
    nothing changes any more, which is where the greedy order ends; temporaries are some tile * tile flags a problem.
    """
    _check(threshold, max_kept, tile, class_rule)
    if scores.shape[-1] == 0:
        return jnp.zeros(scores.shape, bool)
    usable, boxes, scores = usable_rows(boxes, scores, valid)
    labels = None if labels is None else labels.astype(jnp.int32)
    most = jnp.int32(scores.shape[-1] if max_kept is None else max_kept)
    limits = jnp.float32(threshold), most, jnp.int32(CLASS_RULES[class_rule])
    return _greedy(boxes, scores, labels, usable, *limits, tile=tile)


def select_best(keep: Bool[Array, "*batch n"], scores: Float[Array, "*batch n"], count: int) -> Selection:
    """The ``count`` best of the rows to keep, best first, the earlier of equal scores first.

    The result has ``count`` rows even where there are not that many; ``valid`` tells them apart.
    """
    n = scores.shape[-1]
    if n == 0:
        nothing = jnp.zeros((*scores.shape[:-1], count), jnp.int32)
        return Selection(nothing, nothing.astype(bool))
    best, indices = lax.top_k(jnp.where(keep, scores.astype(jnp.float32), -jnp.inf), min(count, n))
    valid = jnp.take_along_axis(keep, indices, axis=-1) & (best > -jnp.inf)
    padding = [(0, 0)] * (scores.ndim - 1) + [(0, count - min(count, n))]
    return Selection(jnp.pad(jnp.where(valid, indices, 0), padding), jnp.pad(valid, padding))


def usable_rows(
    boxes: Float[Array, "*batch n 4"], scores: Float[Array, "*batch n"], valid: Bool[Array, "*batch n"] | None
) -> tuple[Bool[Array, "*batch n"], Float[Array, "*batch n 4"], Float[Array, "*batch n"]]:
    """Valid rows of finite numbers, then boxes (0 elsewhere) and scores (-inf elsewhere) in float32, no gradient."""
    boxes, scores = (lax.stop_gradient(x).astype(jnp.float32) for x in (boxes, scores))
    usable = jnp.isfinite(scores) & jnp.all(jnp.isfinite(boxes), axis=-1)
    usable = usable if valid is None else usable & valid
    return usable, jnp.where(usable[..., None], boxes, 0.0), jnp.where(usable, scores, -jnp.inf)


def _check(threshold: float, max_kept: int | None, tile: int, class_rule: str) -> None:
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold {threshold}: expected an overlap between 0 and 1")
    if max_kept is not None and max_kept < 1:
        raise ValueError(f"max_kept {max_kept}: expected at least 1, or None for all")
    if tile < 1:
        raise ValueError(f"tile {tile}: expected at least 1 row")
    if class_rule not in CLASS_RULES:
        raise nearest(class_rule, list(CLASS_RULES), "class rule")


class _Tiles(NamedTuple):
    """Rows in order of their scores; where there are ``labels``, only rows of the same one suppress each other."""

    boxes: Float[Array, "tiles b size 4"]
    labels: Int[Array, "tiles b size"] | None
    usable: Bool[Array, "tiles b size"]


@functools.partial(jax.jit, static_argnames="tile")
def _greedy(boxes, scores, labels, usable, threshold, max_kept, shifted, *, tile: int):
    """``nms`` on checked arguments; compiled once for all thresholds and rules."""
    batch, n = scores.shape[:-1], scores.shape[-1]
    arrays = _all_varying((boxes, scores, labels, usable))
    boxes, scores, labels, usable = jax.tree.map(lambda x: x.reshape(-1, n, *x.shape[len(batch) + 1 :]), arrays)
    boxes, labels = (boxes, None) if labels is None else _shift(boxes, labels, usable, shifted)
    order = jnp.argsort(-scores, axis=-1, stable=True)
    kept = _walk(_cut(boxes, labels, usable, order, tile), threshold, max_kept)
    kept = jnp.moveaxis(kept, 0, 1).reshape(len(order), -1)[:, :n]
    rows = jnp.arange(len(order))[:, None]
    return jnp.zeros(kept.shape, bool).at[rows, order].set(kept).reshape(*batch, n)


def _all_varying(tree):
    """Under ``shard_map`` each varies over the mesh axes of any of them, as the loops here ask for."""
    leaves = jax.tree.leaves(tree)
    return functools.reduce(vary_like, leaves, tree)


def _shift(boxes: Float[Array, "b n 4"], labels: Int[Array, "b n"], usable: Bool[Array, "b n"], limit: Int[Array, ""]):
    """What the references do in problems of at most ``limit`` usable boxes: classes apart in space, labels all 0.

    With a limit of 0 nothing moves, not even by rounding.
    """
    far = jnp.max(jnp.where(usable[..., None], boxes, -jnp.inf), axis=(1, 2)) + 1
    few = (jnp.sum(usable, axis=-1) <= limit)[:, None]
    move = jnp.where(few & usable, labels * jnp.where(jnp.isfinite(far), far, 0.0)[:, None], 0.0)
    return boxes + move[..., None], jnp.where(few, 0, labels)


def _cut(boxes, labels, usable, order: Int[Array, "b n"], size: int) -> _Tiles:
    """Rows in ``order``, padded to whole tiles; the axis of tiles in front, so that one of them lies together."""
    b, n = order.shape
    tiles = -(-n // size)

    def cut(x):
        x = jnp.take_along_axis(x, order.reshape(b, n, *(1,) * (x.ndim - 2)), axis=1)
        x = jnp.pad(x, ((0, 0), (0, tiles * size - n)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(b, tiles, size, *x.shape[2:]), 1, 0)

    return _Tiles(cut(boxes), None if labels is None else cut(labels), cut(usable))


def _walk(tiles: _Tiles, threshold: Float[Array, ""], max_kept: Int[Array, ""]) -> Bool[Array, "tiles b size"]:
    """Tile after tile, until the last with usable rows, or until every problem has ``max_kept`` rows."""
    size = tiles.usable.shape[-1]
    last = jnp.max(-(-jnp.sum(tiles.usable, axis=(0, 2)) // size))

    def unfinished(state):
        i, _, count = state
        return (i < last) & jnp.any(count < max_kept)

    def step(state):
        i, kept, count = state
        settled = _settle(tiles, kept, i, threshold)
        return i + 1, kept.at[i].set(settled), count + jnp.sum(settled, axis=-1)

    start = vary_like((jnp.int32(0), jnp.zeros(tiles.usable.shape[1], jnp.int32)), last)
    _, kept, _ = lax.while_loop(unfinished, step, (start[0], jnp.zeros_like(tiles.usable), start[1]))
    place = jnp.cumsum(jnp.moveaxis(kept, 0, 1).reshape(kept.shape[1], -1), axis=-1)
    return kept & (jnp.moveaxis(place.reshape(kept.shape[1], -1, size), 0, 1) <= max_kept)


def _settle(tiles: _Tiles, kept: Bool[Array, "tiles b size"], i, threshold) -> Bool[Array, "b size"]:
    """Which rows of tile ``i`` are kept, all earlier tiles being settled."""

    def strike(j, alive):
        return alive & ~_struck(_clash(tiles, j, i, threshold), kept[j])

    candidates = lax.fori_loop(0, i, strike, tiles.usable[i])
    size = candidates.shape[-1]
    clash = _clash(tiles, i, i, threshold) & (jnp.arange(size)[:, None] < jnp.arange(size))

    # The first row is right from the start, and each round makes right at least one more: the greedy result is the
    # only one that a round leaves as it is.
    def again(state):
        alive = candidates & ~_struck(clash, state[0])
        return alive, jnp.any(alive != state[0])

    changed = vary_like(jnp.array(True), candidates)
    return lax.while_loop(lambda state: state[1], again, (candidates, changed))[0]


def _clash(tiles: _Tiles, j, i, threshold) -> Bool[Array, "b size size"]:
    """Whether a row of tile ``j`` and one of tile ``i`` cannot both stay."""
    clash = pairwise_iou(tiles.boxes[j], tiles.boxes[i]) > threshold
    if tiles.labels is None:
        return clash
    return clash & (tiles.labels[j][..., :, None] == tiles.labels[i][..., None, :])


def _struck(clash: Bool[Array, "b size size"], kept: Bool[Array, "b size"]) -> Bool[Array, "b size"]:
    return jnp.any(clash & kept[..., :, None], axis=-2)
