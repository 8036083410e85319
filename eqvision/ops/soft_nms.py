"""Suppression that lowers scores instead of removing rows: soft-NMS and matrix NMS, for boxes."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from eqvision.names import nearest
from eqvision.ops.assignment_problems import first_index
from eqvision.ops.boxes import pairwise_iou
from eqvision.ops.collectives import vary_like
from eqvision.ops.nms import usable_rows

METHODS = ("linear", "gaussian")


def soft_nms(
    boxes: Float[Array, "*batch n 4"],
    scores: Float[Array, "*batch n"],
    *,
    method: str = "gaussian",
    threshold: float = 0.3,
    sigma: float = 0.5,
    smallest_score: float = 1e-3,
    labels: Int[Array, "*batch n"] | None = None,
    valid: Bool[Array, "*batch n"] | None = None,
    max_kept: int | None = None,
) -> Float[Array, "*batch n"]:
    """Scores after soft-NMS (Bodla et al. 2017, figure 2); 0 for rows that fall out.

    The best row is taken; the scores of the others are multiplied by 1 - IoU where the IoU is above ``threshold``
    ("linear"), or by exp(-IoU^2 / ``sigma``) ("gaussian"); and so on with what is left. Rows fall out once their score
    is below ``smallest_score``, and after ``max_kept`` rows were taken. Scores are probabilities. ``labels``, ``valid``
    and rows that are not finite: see ``nms``. As many steps one after the other as rows are taken.
    """
    _require_method(method)
    usable, boxes, scores = usable_rows(boxes, scores, valid)
    if scores.shape[-1] == 0:
        return scores
    groups = jnp.zeros(scores.shape, jnp.int32) if labels is None else labels.astype(jnp.int32)
    factor = functools.partial(_linear, threshold) if method == "linear" else functools.partial(_gaussian, 1 / sigma)
    n = scores.shape[-1]
    one = functools.partial(_soften, factor=factor, smallest=smallest_score, steps=min(max_kept or n, n))
    return _on_each(one, boxes, jnp.where(usable, scores, -1.0), groups)


def matrix_nms(
    boxes: Float[Array, "*batch n 4"],
    scores: Float[Array, "*batch n"],
    *,
    method: str = "gaussian",
    sigma: float = 2.0,
    labels: Int[Array, "*batch n"] | None = None,
    valid: Bool[Array, "*batch n"] | None = None,
    tile: int = 256,
) -> Float[Array, "*batch n"]:
    """Scores after matrix NMS (Wang et al. 2020, SOLOv2, equations 4 and 5, there for masks); 0 for rows not usable.

    Every row j is lowered by the least of f(IoU of i and j) / f(largest IoU of i with a better row) over all better
    rows i, with f(x) = 1 - x ("linear") or exp(-sigma x^2) ("gaussian"): no loop over rows. ``tile`` rows at a time
    are compared with all. ``labels``, ``valid`` and rows that are not finite: see ``nms``.
    """
    _require_method(method)
    usable, boxes, scores = usable_rows(boxes, scores, valid)
    groups = jnp.zeros(scores.shape, jnp.int32) if labels is None else labels.astype(jnp.int32)
    if scores.shape[-1] == 0:
        return scores
    factor = _complement if method == "linear" else functools.partial(_gaussian, sigma)
    decayed = _on_each(functools.partial(_decay, factor=factor, tile=tile), boxes, scores, groups)
    return jnp.where(usable, decayed, 0.0)


def _require_method(method: str) -> None:
    if method not in METHODS:
        raise nearest(method, list(METHODS), "method of suppression")


def _linear(threshold: float, iou: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.where(iou > threshold, 1 - iou, 1.0)


def _complement(iou: Float[Array, "..."]) -> Float[Array, "..."]:
    return 1 - iou


def _gaussian(rate: float, iou: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.exp(-rate * iou**2)


def _on_each(one: Callable, boxes, scores, groups) -> Float[Array, "*batch n"]:
    """``one`` on every problem of the leading axes."""
    n = scores.shape[-1]
    problems = math.prod(scores.shape[:-1])
    arrays = boxes.reshape(problems, n, 4), scores.reshape(problems, n), groups.reshape(problems, n)
    return jax.vmap(one)(*arrays).reshape(scores.shape)


class _Rest(NamedTuple):
    """Scores so far, which rows were taken, and which may still be."""

    scores: Float[Array, " n"]
    taken: Bool[Array, " n"]
    left: Bool[Array, " n"]


def _soften(
    boxes: Float[Array, "n 4"], scores: Float[Array, " n"], groups: Int[Array, " n"], *, factor, smallest, steps
):
    """One problem of ``soft_nms``."""
    none = jnp.zeros_like(scores, bool)
    start = vary_like((jnp.int32(0), _Rest(scores, none, scores >= smallest)), boxes)

    def unfinished(state):
        return (state[0] < steps) & jnp.any(state[1].left)

    def step(state):
        rest = state[1]
        open_scores = jnp.where(rest.left, rest.scores, -jnp.inf)
        best = first_index(open_scores == jnp.max(open_scores))
        here = jnp.arange(len(scores)) == best
        left = rest.left & ~here
        lowered = factor(pairwise_iou(boxes[best][None], boxes)[0])
        after = jnp.where(left & (groups == groups[best]), rest.scores * lowered, rest.scores)
        return state[0] + 1, _Rest(after, rest.taken | here, left & (after >= smallest))

    rest = lax.while_loop(unfinished, step, start)[1]
    return jnp.where(rest.taken, rest.scores, 0.0)


def _decay(boxes: Float[Array, "n 4"], scores: Float[Array, " n"], groups: Int[Array, " n"], *, factor, tile: int):
    """One problem of ``matrix_nms``: largest overlaps with better rows first, then the least factor, tile by tile."""
    n = len(scores)
    order = jnp.argsort(-scores, stable=True)
    boxes, groups = boxes[order], groups[order]
    columns = jnp.arange(-(-n // tile) * tile).reshape(-1, tile)

    def overlaps(column):
        column = jnp.minimum(column, n - 1)
        better = (jnp.arange(n)[:, None] < column) & (groups[:, None] == groups[column])
        return jnp.where(better, pairwise_iou(boxes, boxes[column]), 0.0), better

    def least(column):
        iou, better = overlaps(column)
        # A row equal to a better one has nothing to add to what the better one does.
        share = jnp.where(before > 0, factor(iou) / jnp.where(before > 0, before, 1.0), 1.0)
        return jnp.min(jnp.where(better, share, 1.0), axis=0)

    before = factor(lax.map(lambda column: jnp.max(overlaps(column)[0], axis=0), columns).reshape(-1)[:n])[:, None]
    lowered = lax.map(least, columns).reshape(-1)[:n]
    return jnp.zeros_like(scores).at[order].set(scores[order] * lowered)
