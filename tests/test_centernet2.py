"""CenterNet2: what its cells are to say and what is read from them, by plain loops; losses; the whole model."""

import dataclasses
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvision.detectors import CENTERNET2, CenterNet2, CenterRule, ProposalRule, centernet2_r50_fpn, centernet2_resnet
from eqvision.detectors.centernet2 import centernet2_vitdet_b
from eqvision.detectors.centernet2_cells import center_proposals, center_sample, level_cells
from eqvision.detectors.rcnn_targets import objects_on_image
from eqvision.heads import CenterOutputs, CenterProposalHead
from eqvision.losses import CENTERNET2_LOSS, rcnn_counts, rcnn_loss
from eqvision.losses.rcnn import divisors
from eqvision.types import BoxSample, CenterSample, DetectionTargets, PaddedImages, RCNNSamples

STRIDES, RULE = (8, 16), CenterRule(ranges=((0.0, 14.0), (10.0, 100.0)))
GRIDS = ((8, 10), (4, 5))
MAPS = tuple(jnp.zeros((2, *grid, 1)) for grid in GRIDS)
SIZE = jnp.array([[64, 80], [40, 52]])
CELLS = sum(h * w for h, w in GRIDS)
# Small; large; in the range of both levels; two of which the cells overlap; thin; outside in part.
BOXES = [[10, 12, 21, 22], [5, 6, 70, 60], [40, 30, 56, 46], [44, 32, 60, 50], [30, 8, 31.5, 30], [-9, 50, 12, 90]]
SMALL = {"depth": 18, "num_classes": 3, "backbone_width": 8, "width": 32, "head_width": 16, "norm": "batch"}


def scene(boxes=BOXES, count=7):
    rows = np.full((2, count, 4), np.nan, np.float32)
    rows[0, : len(boxes)], valid = np.array(boxes).reshape(-1, 4), np.zeros((2, count), bool)
    valid[0, : len(boxes)] = True
    return DetectionTargets(jnp.asarray(rows), jnp.ones((2, count), int), jnp.asarray(valid))


@jax.jit
def sampled(outputs, targets):
    cells, on_image = level_cells(MAPS, SIZE, strides=STRIDES, rule=RULE)
    return center_sample(outputs, cells, on_image, objects_on_image(targets, SIZE), rule=RULE)


@jax.jit
def proposed(outputs):
    cells, on_image = level_cells(MAPS, SIZE, strides=STRIDES, rule=RULE)
    return center_proposals(outputs, cells, on_image, SIZE, rule=ProposalRule(50, 3))


def outputs_of(logits, distances):
    cut = [GRIDS[0][0] * GRIDS[0][1]]
    return CenterOutputs(*(tuple(jnp.split(jnp.asarray(x, jnp.float32), cut, axis=1)) for x in (logits, distances)))


def nothing():
    return outputs_of(np.zeros((2, CELLS)), np.zeros((2, CELLS, 4)))


def places():
    for (height, width), stride, (least, most) in zip(GRIDS, STRIDES, RULE.ranges, strict=True):
        for row in range(height):
            for column in range(width):
                yield row, column, stride, least, most


def by_loops(boxes):
    """Heatmap, distances and which cells have an object, for the first image."""
    heatmap, goals, positive = np.zeros(CELLS), np.zeros((CELLS, 4)), np.zeros(CELLS, bool)
    for n, (row, column, stride, least, most) in enumerate(places()):
        x, y, best = column * stride + stride // 2, row * stride + stride // 2, math.inf
        for left, top, right, bottom in np.clip(boxes, 0, [80, 64, 80, 64]):
            centre = (left + right) / 2, (top + bottom) / 2
            cell = int(centre[0] // stride), int(centre[1] // stride)
            level = least <= math.hypot(right - left, bottom - top) / 2 <= most
            radius = max(2 * (0.2 / 1.8) ** 2 * (right - left) * (bottom - top), 16)
            away = max(((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / radius, 1e-6)
            away = 0 if level and cell == (column, row) else away
            heatmap[n] = max(heatmap[n], math.exp(-away))
            sides = x - left, y - top, right - x, bottom - y
            near = abs(cell[0] - column) <= 1 and abs(cell[1] - row) <= 1
            if level and near and min(sides) > 0 and away < best:
                best, goals[n], positive[n] = away, np.array(sides) / stride, True
    return heatmap, goals, positive


def test_targets_as_by_loops(assert_close):
    sample = sampled(nothing(), scene())
    heatmap, goals, positive = by_loops(np.array(BOXES, float))
    assert_close(sample.heatmap[0], heatmap, 1e-5)
    assert sample.positive[0].tolist() == positive.tolist()
    assert_close(sample.targets[0], goals, 1e-5)
    assert ((heatmap == 1).sum(), positive.sum()) == (8, 17)
    inside = [column * s < 52 and row * s < 40 for row, column, s, _, _ in places()]
    assert sample.valid.tolist() == [[True] * CELLS, inside]


def test_targets_without_objects():
    for targets in (scene(boxes=[]), scene(boxes=[], count=0), scene(boxes=[[20, 20, 20, 40], [90, 9, 99, 20]])):
        sample = sampled(nothing(), targets)
        assert not sample.heatmap.any()
        assert not sample.positive.any()
        assert np.isfinite(sample.targets).all()


def test_planted_objects_are_proposed(assert_close):
    """Of targets as predictions the objects come back, each on its levels; cells without an object give no box."""
    planted = [BOXES[0], BOXES[1], BOXES[2]]
    sample = sampled(nothing(), scene(planted))
    logits = jnp.where(sample.heatmap == 1, 3.0, -3.0) + 0.01 * sample.heatmap
    found = proposed(outputs_of(logits, sample.targets))
    assert found.valid.tolist() == [[True] * 3, [False] * 3]
    assert_close(np.array(sorted(found.boxes[0].tolist())), np.array(sorted(planted), np.float32), 1e-6)
    assert_close(found.logits[0], np.full(3, 3.01), 1e-6)
    assert not found.boxes[1].any()


def test_the_best_cells_of_all_levels_suppress_each_other(assert_close):
    """The third cell of the fine level and the first of the coarse one see the same box, cut off at the image."""
    logits, distances = np.full((2, CELLS), -9.0), np.zeros((2, CELLS, 4))
    logits[:, 2], distances[:, 2] = 1.0, [3, 1, 10, 2]
    logits[:, 80], distances[:, 80] = 2.0, [0.75, 0.75, 5.75, 0.75]
    logits[:, 5], distances[:, 5] = 0.5, 0.25
    logits[:, 6], distances[:, 6] = 0.0, 0.25
    logits[1, 7], distances[1, 7] = 9.0, 0.25  # of the padding: it begins at 56
    found = proposed(outputs_of(logits, distances))
    assert found.logits.tolist() == [[2.0, 0.5, 0.0]] * 2
    assert found.boxes.tolist() == [
        [[0, 0, 80, 20], [42, 2, 46, 6], [50, 2, 54, 6]],
        [[0, 0, 52, 20], [42, 2, 46, 6], [50, 2, 52, 6]],
    ]


def test_the_head_starts_as_published(key):
    head = CenterProposalHead(32, levels=2, depth=1, key=key)
    outputs = eqx.filter_jit(head)(tuple(jnp.zeros((1, 2, 3, 32)) for _ in range(2)))
    assert [level.shape for level in outputs.distances] == [(1, 6, 4)] * 2
    assert (outputs.distances[1] == 8).all()
    assert outputs.logits[0].tolist() == [[pytest.approx(-4.6)] * 6]


# Losses


def random_sample(seed=0):
    rng = np.random.default_rng(seed)
    heatmap = rng.random((2, 12)).astype(np.float32)
    heatmap[0, [1, 4]], positive = 1, rng.random((2, 12)) > 0.5
    positive[1] = False
    distances, targets = (rng.random((2, 12, 4)).astype(np.float32) * 4 for _ in range(2))
    arrays = rng.normal(size=(2, 12)).astype(np.float32), heatmap, distances, targets, positive
    first = CenterSample(*(jnp.asarray(x) for x in (*arrays, rng.random((2, 12)) > 0.2)))
    none = jnp.zeros((2, 3, 4))
    box = BoxSample(none, none, jnp.zeros((2, 3), int), none, jnp.zeros((2, 3), bool), jnp.zeros((2, 3), bool))
    return RCNNSamples(first, (box,))


@jax.jit
def losses(samples, weights):
    def value(first):
        each = samples._replace(anchors=first)
        return rcnn_loss(each, weights, rcnn_counts(each, weights), CENTERNET2_LOSS)

    grads, (total, terms) = jax.grad(lambda x: (value(x)[0], value(x)), has_aux=True, allow_int=True)(samples.anchors)
    return total, terms, grads


def test_losses_as_by_loops(assert_close):
    samples = random_sample()
    first = CenterSample(*(np.asarray(x) for x in samples.anchors))
    heat, overlap = 0.0, 0.0
    for i, n in zip(*np.nonzero(first.valid), strict=True):
        p, h = 1 / (1 + math.exp(-first.logits[i, n])), float(first.heatmap[i, n])
        heat -= 0.25 * (1 - p) ** 2 * math.log(p) if h == 1 else 0.75 * (1 - h) ** 4 * p**2 * math.log(1 - p)
        if first.positive[i, n]:
            (a, b, c, d), (e, f, g, k) = first.distances[i, n].tolist(), first.targets[i, n].tolist()
            both = (min(a, e) + min(c, g)) * (min(b, f) + min(d, k))
            union = (a + c) * (b + d) + (e + g) * (f + k) - both
            hull = (max(a, e) + max(c, g)) * (max(b, f) + max(d, k))
            overlap += 1 - both / union + (hull - union) / hull
    total, terms, _ = losses(samples, jnp.ones(2))
    centres = int(((first.heatmap[0] == 1) & first.valid[0]).sum()) + 1  # the second image counts as one
    cells = int((first.positive[0] & first.valid[0]).sum()) + 1
    assert_close(terms["objectness"], heat / centres, 1e-5)
    assert_close(terms["proposal"], overlap / cells, 1e-5)
    assert_close(total, 0.5 * heat / centres + overlap / cells, 1e-5)
    whole = divisors(terms, rcnn_counts(samples, jnp.ones(2)), CENTERNET2_LOSS)
    assert (float(whole["objectness"]), float(whole["proposal"])) == (centres, cells)


def test_padding_and_images_of_weight_0_are_not_read(assert_close):
    samples, weights = random_sample(), jnp.array([1.0, 0.0])
    total, terms, grads = losses(samples, weights)
    first = samples.anchors
    used = first.valid & (weights != 0)[:, None]
    junk = {
        name: jnp.where(used.reshape(2, 12, *(1,) * (x.ndim - 2)), x, jnp.nan)
        for name, x in zip(("logits", "heatmap", "distances", "targets"), first[:4], strict=True)
    }
    other = losses(samples._replace(anchors=first._replace(**junk)), weights)
    assert_close(other[:2], (total, terms), 0)
    assert all(np.isfinite(x).all() for x in (*other[2][:1], other[2].distances))
    assert (grads.logits[1] == 0).all()
    assert np.any(grads.distances[0])


# The whole model


def test_parts_that_do_not_fit_are_named(key):
    model, state = eqx.filter_eval_shape(eqx.nn.make_with_state(centernet2_resnet), **SMALL, key=key)
    heads = {"num_classes": 3, "dialect": CENTERNET2}
    with pytest.raises(ValueError, match=r"the neck gives 5 maps, the head is for 5 and the rule has 2 ranges"):
        CenterNet2(model.backbone, model.neck, model.head, model.box_heads, rule=RULE, **heads)
    with pytest.raises(ValueError, match="CenterNet2: 2 box heads and 3 stages"):
        CenterNet2(model.backbone, model.neck, model.head, model.box_heads[:2], **heads)
    with pytest.raises(ValueError, match=r"a CenterNet2 is trained on boxes .* call train_outputs"):
        model(PaddedImages(jnp.zeros((1, 64, 64, 3)), jnp.full((1, 2), 64)), state, train=True)


def test_published_builders():
    for build, strides in ((centernet2_r50_fpn, (8, 16, 32, 64, 128)), (centernet2_vitdet_b, (8, 16, 32, 64, 128))):
        model, _ = eqx.filter_eval_shape(eqx.nn.make_with_state(build), key=jax.random.key(0))
        assert model.neck.strides == strides
        assert [stage.overlap for stage in model.stages] == [0.6, 0.7, 0.8]
        assert model.dialect.box_sample.match.high == 0.6


@pytest.mark.slow
def test_whole_model_on_small_images():
    """Finds objects, and all its parameters learn; the loss without objects is finite. Two stages save time."""
    build = eqx.nn.make_with_state(centernet2_resnet)
    model, state = build(overlaps=(0.6, 0.7), count=20, **SMALL, key=jax.random.key(0))
    rules = {"train_proposals": ProposalRule(60, 30, overlap=0.9), "test_proposals": ProposalRule(60, 30, overlap=0.9)}
    sample = dataclasses.replace(model.dialect.box_sample, count=32)
    model = with_dialect(model, dataclasses.replace(model.dialect, box_sample=sample, **rules))
    inputs = PaddedImages(jax.random.normal(jax.random.key(1), (2, 128, 160, 3)), jnp.array([[128, 160], [100, 120]]))
    boxes = jnp.array([[[10.0, 20, 60, 80], [40, 30, 150, 120]], [[-9, 5, 70, 66], [30, 30, 30, 40]]])
    targets = DetectionTargets(boxes, jnp.array([[0, 2], [1, 1]]), jnp.ones((2, 2), bool))

    @jax.jit
    def run(model, state, targets):
        def loss(model):
            keys = jax.random.split(jax.random.key(0))
            samples, new = model.train_outputs(inputs, targets, state, keys=keys)
            return rcnn_loss(samples, jnp.ones(2), rcnn_counts(samples, jnp.ones(2)), CENTERNET2_LOSS)[0], new

        found, _ = model(inputs, state)
        return *jax.value_and_grad(loss, has_aux=True)(model), found

    (value, new), grads, found = run(model, state, targets)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((grads, new)))
    silent = [jax.tree_util.keystr(path) for path, g in jax.tree_util.tree_leaves_with_path(grads) if not np.any(g)]
    assert silent == []
    assert found.boxes.shape == (2, 20, 4)
    assert found.valid.any()
    assert 0 < found.scores.max() < 0.4  # the root of about 0.01 times a class's share
    (value, _), grads, _ = run(model, state, targets._replace(valid=jnp.zeros((2, 2), bool)))
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def with_dialect(model, dialect):
    return CenterNet2(
        model.backbone,
        model.neck,
        model.head,
        model.box_heads,
        model.mask_head,
        num_classes=model.num_classes,
        dialect=dialect,
        stages=model.stages,
        count=model.count,
    )
