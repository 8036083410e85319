"""Region proposals: order of outputs, and which boxes are chosen, by hand."""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

from eqvision.detectors import (
    DETECTRON2,
    MMDET,
    RCNN_DIALECTS,
    TORCHVISION,
    rcnn_anchors,
    rcnn_dialect,
    select_proposals,
)
from eqvision.detectors.rcnn_proposals import boxes_at_least
from eqvision.heads import RPNHead, RPNOutputs
from eqvision.names import UnknownNameError

RULE = dataclasses.replace(DETECTRON2.test_proposals, per_level=4, kept=3)
SIZE = jnp.array([[40, 60]])
FINE = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [20, 20, 30, 30], [50, 30, 70, 50], [5, 5, 5, 9]], np.float32)
COARSE = np.array([[0, 0, 10, 10], [0, 0, 40, 40]], np.float32)


def chosen(logits, rule=RULE, size=SIZE, inside=None, deltas=None):
    """Proposals of one image from anchors as they are: boxes and logits of the valid rows."""
    logits = tuple(jnp.array([level], jnp.float32) for level in logits)
    deltas = deltas or tuple(jnp.zeros((*level.shape, 4)) for level in logits)
    inside = inside or tuple(jnp.ones(level.shape, bool) for level in logits)
    found = select(RPNOutputs(logits, deltas), inside, size, rule)
    assert found.boxes.shape == (1, rule.kept, 4)
    rows = np.asarray(found.valid[0])
    assert (np.asarray(found.boxes[0])[~rows] == 0).all()
    return np.asarray(found.boxes[0])[rows].tolist(), np.asarray(found.logits[0])[rows].tolist()


@eqx.filter_jit
def select(outputs, inside, size, rule):
    return select_proposals(outputs, (FINE, COARSE), inside, size, rule=rule)


def test_the_best_of_all_levels_each_thinned_out_for_itself():
    """The second box overlaps the first (IoU 0.82); the same box on another level stays; the last is cut off."""
    boxes, logits = chosen(([5.0, 4.0, 1.0, 3.0, 9.0], [2.0, -1.0]))
    assert boxes == [[0, 0, 10, 10], [50, 30, 60, 40], [0, 0, 10, 10]]
    assert logits == [5.0, 3.0, 2.0]


def test_empty_and_padded_and_broken_boxes_take_no_place():
    inside = (jnp.array([[True, True, True, False, True]]), jnp.array([[True, True]]))
    deltas = (jnp.zeros((1, 5, 4)).at[0, 2, 0].set(jnp.nan), jnp.zeros((1, 2, 4)))
    boxes, logits = chosen(([5.0, 4.0, 8.0, 7.0, 9.0], [jnp.nan, -1.0]), inside=inside, deltas=deltas)
    assert boxes == [[0, 0, 10, 10], [0, 0, 40, 40]]
    assert logits == [5.0, -1.0]


def test_sides_of_exactly_the_least_size_stay_in_torchvision_only():
    boxes = jnp.array([[0.0, 0, 10, 10], [0, 0, 9, 20], [0, 0, 11, 11]])
    assert boxes_at_least(boxes, 10.0, strict=False).tolist() == [True, False, True]
    assert boxes_at_least(boxes, 10.0, strict=True).tolist() == [False, False, True]
    strict = {name: rule.test_proposals.strict for name, rule in RCNN_DIALECTS.items()}
    assert strict == {"torchvision": False, "detectron2": True, "mmdet": True}


def test_probabilities_tie_where_logits_do_not():
    """The sigmoid of 20 and of 30 is 1 in float32: of equals the first stays, as in torchvision."""
    logits = ([20.0, -9, -9, -9, -9], [30.0, -9])
    assert chosen(logits)[1][:2] == [30.0, 20.0]
    assert chosen(logits, rule=dataclasses.replace(RULE, by_probability=True))[1][:2] == [20.0, 30.0]


def test_outputs_run_over_rows_columns_and_anchors(key):
    head, state = eqx.nn.make_with_state(RPNHead)(2, depth=2, key=key)
    head = eqx.tree_at(lambda h: (h.logits.bias, h.deltas.bias), head, (jnp.arange(3.0), jnp.arange(12.0)))
    maps = (jnp.zeros((2, 2, 3, 2)), jnp.zeros((2, 1, 2, 2), jnp.bfloat16))
    outputs, _ = eqx.filter_jit(head)(maps, state)
    assert [level.shape for level in outputs.deltas] == [(2, 18, 4), (2, 6, 4)]
    assert outputs.logits[0][1].tolist() == [0, 1, 2] * 6
    assert outputs.deltas[0][1, 4].tolist() == [4, 5, 6, 7]
    assert {level.dtype.name for level in (*outputs.logits, *outputs.deltas)} == {"float32"}
    with pytest.raises(ValueError, match="depth 0; expected at least 1 convolution"):
        RPNHead(2, depth=0, key=key)


def test_anchors_of_the_dialects():
    """torchvision measures how far apart they are on the padded image and rounds corners; the others do neither."""
    maps = tuple(jnp.zeros((2, h, w, 1)) for h, w in ((25, 38), (13, 19)))
    given = {"strides": (32, 64), "sizes": ((32.0,), (512.0,))}
    size = jnp.array([[800, 1216], [640, 64]])

    def levels(dialect):
        return rcnn_anchors(maps, (800, 1216), size, dialect=dialect, **given)

    (fine, coarse), (inside, _) = levels(TORCHVISION)
    assert fine[0].tolist() == [-23, -11, 23, 11]
    assert coarse[3 * 19 + 1, 1::2].mean() == 800 // 13 == 61
    assert inside.shape == (2, 25 * 38 * 3)
    assert inside.sum(axis=1).tolist() == [25 * 38 * 3, 20 * 2 * 3]
    for dialect in (DETECTRON2, MMDET):
        (fine, coarse), _ = levels(dialect)
        assert coarse[3 * 19 + 1, 1::2].mean() == 64
        assert fine[0, 2] == pytest.approx(16 * 2**0.5)


def test_dialects_by_name():
    assert [rcnn_dialect(name).background for name in RCNN_DIALECTS] == ["first", "last", "last"]
    with pytest.raises(UnknownNameError, match="detectron2"):
        rcnn_dialect("detectron")
