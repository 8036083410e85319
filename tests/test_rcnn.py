"""R-CNNs by themselves: sizes, what is trained on, what is found, and what may change nothing."""

import dataclasses
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from rcnn_references import ANCHORS, CHANNELS, CLASSES, SIZE, GivenMaps, dialect, head_model, random_maps

from eqvision import detectors
from eqvision.detectors import (
    DETECTRON2,
    RCNN,
    TORCHVISION,
    ProposalRule,
    decode_rcnn,
    mask_rcnn_r50_fpn,
    mask_rcnn_r50_fpn_v2,
    rcnn_resnet_fpn,
    scale_detections,
)
from eqvision.detectors.rcnn_models import CASCADE
from eqvision.detectors.rcnn_targets import box_targets, boxes_with_masks, draw_boxes, mask_targets, match_boxes
from eqvision.heads import RoIBoxHead, RoIMaskHead, RPNHead
from eqvision.layers import FrozenBatchNorm
from eqvision.losses import rcnn_counts, rcnn_loss
from eqvision.names import UnknownNameError
from eqvision.ops import IouRule, global_sum
from eqvision.types import Detections, DetectionTargets, PaddedImages, Proposals

KEY = jax.eval_shape(jax.random.key, 0)
TINY = {"depth": 18, "num_classes": CLASSES, "backbone_width": 8, "width": 16, "head_width": 24}


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def frozen_norms(model):
    norms = jax.tree.leaves(model, is_leaf=lambda x: isinstance(x, FrozenBatchNorm))
    return [norm for norm in norms if isinstance(norm, FrozenBatchNorm)]


def abstract(build, **options):
    return eqx.filter_eval_shape(lambda key: eqx.nn.make_with_state(build)(**options, key=key), KEY)


# Sizes and options


@pytest.mark.parametrize(
    ("build", "faster", "mask"),
    [(mask_rcnn_r50_fpn, 41_755_286, 44_401_393), (mask_rcnn_r50_fpn_v2, 43_712_278, 46_359_409)],
)
def test_published_parameters(build, faster, mask):
    """As torchvision counts: nothing of frozen norms (v1), scale and shift of others (v2)."""
    model, _ = abstract(build)
    norms = frozen_norms(model)
    assert count(model) - count(norms) == mask
    assert count(model) - count(norms) - count(model.mask_head) == faster
    assert len(norms) == (53 if build is mask_rcnn_r50_fpn else 0)
    assert {norm.eps for norm in norms} <= {0.0}


def test_detectron2_has_its_stride_in_the_first_convolution():
    options = {"dialect": "detectron2", "num_classes": 80, "backbone_width": 8, "width": 16, "head_width": 8}
    model, _ = abstract(rcnn_resnet_fpn, masks=True, **options)
    strides = [tuple(c.conv.stride for c in stage[0].convs) for stage in model.backbone.stages]
    assert strides == [(1, 1, 1), (2, 1, 1), (2, 1, 1), (2, 1, 1)]
    assert model.neck.dialect == "detectron2"
    assert {norm.eps for norm in frozen_norms(model)} == {1e-5}
    box = model.box_heads[0]
    assert (box.logits.weight.shape[1], box.deltas.weight.shape[1]) == (81, 320)
    assert model.mask_head.logits.weight.shape[3] == 80
    with pytest.raises(ValueError, match="the stride moves in bottlenecks only; choose a ResNet of depth 50"):
        abstract(rcnn_resnet_fpn, depth=18, dialect="detectron2")
    with pytest.raises(UnknownNameError, match="detectron2"):
        abstract(rcnn_resnet_fpn, dialect="detectron")


def test_mask_rcnn_of_mmdet_trains_on_the_best_boxes_of_objects_too():
    options = {"dialect": "mmdet", "num_classes": 80, "backbone_width": 8, "width": 16, "head_width": 8}
    rules = [abstract(rcnn_resnet_fpn, masks=masks, **options)[0].dialect.box_sample.match for masks in (False, True)]
    assert [rule.low_quality for rule in rules] == [False, True]


def test_every_public_name_is_there():
    assert all(hasattr(detectors, name) for name in detectors.__all__)
    assert sorted(set(detectors.__all__)) == sorted(detectors.__all__)


def test_parts_that_do_not_fit_are_named(key):
    model, state = eqx.filter_eval_shape(head_model, dialect())
    box = model.box_heads[0]
    options = {"dialect": TORCHVISION, "num_classes": CLASSES}
    with pytest.raises(ValueError, match=r"the neck gives 5 maps and .* 3 anchors a place; .* make \[6, 6\]"):
        RCNN(GivenMaps(), GivenMaps(), model.rpn, (box,), anchor_sizes=((8.0, 16.0),) * 2, **options)
    with pytest.raises(ValueError, match="1 box heads and 3 stages; expected one head for each stage"):
        RCNN(GivenMaps(), GivenMaps(), model.rpn, (box,), stages=CASCADE, **options)
    with pytest.raises(ValueError, match="predict one box for all classes; build them with num_boxes=1"):
        RCNN(GivenMaps(), GivenMaps(), model.rpn, (box,) * 3, stages=CASCADE, **options)
    with pytest.raises(ValueError, match=r"call train_outputs\(inputs, targets, state, keys=...\)"):
        model(inputs_of(), state, train=True)
    with pytest.raises(ValueError, match="trained on masks, and these targets have none"):
        mask_targets(drawn_from(scene())[0], scene()._replace(masks=None), dialect=TORCHVISION, size=28)


def test_unknown_starts_of_heads(key, unchecked):
    for head, options in ((RoIBoxHead, {"num_boxes": 3}), (RoIMaskHead, {})):
        with pytest.raises(ValueError, match=r"init 'xavier' is unknown; choose from \('torch', 'detectron2'\)"):
            head(4, num_outputs=3, init="xavier", key=key, **options)


# What is trained on


def inputs_of(images=2, size=SIZE):
    return PaddedImages(jnp.zeros((images, *size, 3)), jnp.full((images, 2), jnp.asarray(size)))


def scene(junk=0.0, labels=0, valid=(True, True, False)):
    """An image of two objects and one without; the first object's mask is its left half."""
    boxes = np.array([[10, 10, 30, 30], [40, 20, 70, 60], [0, 0, 5, 5]], np.float32)
    boxes = np.stack([boxes, boxes])
    masks = np.zeros((2, 3, *SIZE), np.uint8)
    masks[:, 0, 10:30, 10:20] = 1
    masks[:, 1, 20:60, 40:70] = 1
    columns = np.array([[1, 3, 0]] * 2, np.int32)
    known = np.array([valid, [False] * 3])
    boxes[~known], columns[~known], masks[~known] = junk, labels, labels & 1
    return DetectionTargets(*(jnp.asarray(x) for x in (boxes, columns, known, masks)))


def proposals():
    boxes = [[11.0, 10, 31, 30], [42, 20, 70, 50], [0, 0, 90, 90], [80, 80, 90, 90]]
    return Proposals(jnp.array([boxes] * 2), jnp.zeros((2, 4)), jnp.array([[True, True, True, False]] * 2))


@jax.jit
def drawn_from(targets):
    rule = dataclasses.replace(TORCHVISION.box_sample, count=8, positive=0.5)
    drawn = draw_boxes(proposals(), targets, rule=rule, keys=jax.random.split(jax.random.key(1)))
    first, last = (
        box_targets(drawn, targets, dialect=each, num_classes=CLASSES, weights=(10.0, 10.0, 5.0, 5.0))
        for each in (TORCHVISION, DETECTRON2)
    )
    return drawn, first, last


def test_boxes_are_drawn_from_proposals_and_the_objects_themselves(assert_close):
    drawn, (first, deltas), (last, _) = drawn_from(scene())
    assert drawn.positive.tolist() == [[True] * 4 + [False] * 4, [False] * 8]
    assert drawn.valid.tolist() == [[True] * 5 + [False] * 3, [True] * 3 + [False] * 5]
    boxes = drawn.boxes[0, :5].tolist()
    columns = {tuple(box): c for box, c in zip(boxes, first[0].tolist()[:5], strict=True)}
    assert columns == {
        (11, 10, 31, 30): 2,
        (42, 20, 70, 50): 4,
        (10, 10, 30, 30): 2,
        (40, 20, 70, 60): 4,
        (0, 0, 90, 90): 0,
    }
    assert last[0].tolist() == [c - 1 if c else CLASSES for c in first[0].tolist()]
    assert first[1].tolist() == [0] * 8
    assert_close(deltas[0, boxes.index([11, 10, 31, 30])], [-0.5, 0, 0, 0], 1e-6)
    assert (np.asarray(deltas)[~np.asarray(drawn.positive)] == 0).all()


@pytest.mark.slow
def test_more_objects_than_are_drawn():
    """Of 40 objects, each its own best box, half of the 8 places are given away, and the rest to boxes without."""
    places = jnp.arange(40.0)
    boxes = jnp.stack([places * 2, places, places * 2 + 1, places + 1], axis=-1)[None].repeat(2, 0)
    targets = DetectionTargets(boxes, jnp.ones((2, 40), int), jnp.ones((2, 40), bool))
    drawn, (columns, _), _ = drawn_from(targets)
    assert drawn.positive.sum(axis=1).tolist() == [4, 4]
    assert len({tuple(box) for box in drawn.goals[0, :4].tolist()}) == 4
    assert columns[0].tolist()[:4] == [2] * 4


def test_rows_without_a_box_repeat_those_with_one():
    drawn, _, _ = drawn_from(scene())
    assert drawn.boxes[0, 5:].tolist() == drawn.boxes[0, :3].tolist()
    assert drawn.boxes[1, 3:].tolist() == drawn.boxes[1, jnp.array([0, 1, 2, 0, 1])].tolist()


@jax.jit
def masks_of(drawn, targets):
    return mask_targets(drawn, targets, dialect=DETECTRON2, size=4)


def test_masks_of_the_boxes_with_an_object(assert_close):
    drawn, _, _ = drawn_from(scene())
    chosen = boxes_with_masks(drawn, 6)
    assert chosen.valid.tolist() == [[True] * 4 + [False] * 2, [False] * 6]
    assert chosen.boxes[0, 4:].tolist() == drawn.boxes[0, :2].tolist()
    masks = masks_of(chosen, scene())
    own = chosen.boxes[0].tolist().index([10, 10, 30, 30])
    assert masks[0, own].tolist() == [[1, 1, 0, 0]] * 4
    assert (masks[1] == 0).all()


@pytest.mark.slow
def test_small_masks_in_frames_are_as_good():
    drawn, _, _ = drawn_from(scene())
    targets = scene()
    small = jnp.zeros((2, 3, 8, 8), jnp.uint8).at[:, 0, :, :4].set(1).at[:, 1].set(1)
    framed = targets._replace(masks=small, frames=targets.boxes)
    chosen = boxes_with_masks(drawn, 4)
    whole, cut = (masks_of(chosen, each) for each in (targets, framed))
    own = [chosen.boxes[0].tolist().index(box) for box in ([10, 10, 30, 30], [40, 20, 70, 60])]
    assert cut[0, jnp.array(own)].tolist() == whole[0, jnp.array(own)].tolist()


def test_junk_in_rows_that_are_not_valid_is_not_read(assert_close):
    expected = drawn_from(scene())
    assert_close(drawn_from(scene(junk=np.nan, labels=10**6 + 1)), expected, 0)
    padded = jax.tree.map(lambda x: jnp.concatenate([x, x[:, :2]], axis=1), scene())
    padded = padded._replace(valid=padded.valid.at[:, 3:].set(False))
    assert_close(drawn_from(padded), expected, 0)
    _, (columns, _), _ = drawn_from(scene()._replace(labels=jnp.full((2, 3), CLASSES)))
    assert columns[0].tolist() == [-1] * 4 + [0] * 4  # a label that is no class


def test_later_stages_ask_for_more_overlap():
    boxes, _, valid = proposals()
    drawn = jax.jit(lambda: match_boxes(boxes, valid, scene(), rule=IouRule(0.8, 0.8)))()
    assert drawn.positive.tolist() == [[True, False, False, False], [False] * 4]  # IoU 0.90 and 0.70
    assert drawn.valid.tolist() == valid.tolist()
    assert drawn.goals[0, 0].tolist() == [10, 10, 30, 30]


# What is found


def test_detections_by_hand(assert_close):
    """Two classes overlap, two boxes of one class do, one is too small, one score is at the threshold."""
    boxes = [[0.0, 0, 20, 20], [1, 0, 21, 20], [30, 30, 200, 200], [5, 5, 5.005, 30], [60, 60, 70, 70]]
    scores = [[0.9, 0.6], [0.8, 0.04], [0.3, 0.02], [0.7, 0.0], [0.05, 0.0]]
    each = jnp.repeat(jnp.array(boxes)[None, :, None], 2, axis=2)
    valid, size = jnp.array([[True] * 5]), jnp.array([[100, 120]])

    @eqx.filter_jit
    def decode(boxes, scores, valid, rule):
        return decode_rcnn(scores, boxes, valid, size, dialect=rule, count=4)

    found = decode(each, jnp.array([scores]), valid, TORCHVISION)
    assert found.valid[0].tolist() == [True, True, True, False]
    assert found.labels[0].tolist() == [0, 1, 0, 0]
    assert found.boxes[0].tolist() == [boxes[0], boxes[0], [30, 30, 120, 100], [0] * 4]
    assert_close(found.scores[0], [0.9, 0.6, 0.3, 0], 1e-6)
    assert_close(decode(each[:, :, :1], jnp.array([scores]), valid, TORCHVISION), found, 0)
    thin = decode(each, jnp.array([scores]), valid, DETECTRON2)  # which has no least size
    assert_close(thin.scores[0], [0.9, 0.7, 0.6, 0.3], 1e-6)
    without = decode(each, jnp.array([scores]), valid.at[0, 0].set(False), TORCHVISION)
    assert_close(without.scores[0], [0.8, 0.3, 0, 0], 1e-6)


def test_boxes_move_to_the_original_image():
    found = Detections(
        jnp.array([[[10.0, 20, 30, 40]]]), jnp.ones((1, 1)), jnp.zeros((1, 1), int), jnp.ones((1, 1), bool)
    )
    moved = scale_detections(found, jnp.array([[50, 100]]), jnp.array([[100, 50]]))
    assert moved.boxes.tolist() == [[[5, 40, 15, 80]]]


# Through the heads


@pytest.fixture(scope="module")
def heads():
    model, state = head_model(dialect(anchors=64, boxes=16))
    maps = random_maps(np.random.default_rng(0))

    @jax.jit
    def gradients(maps, targets, weights):
        def loss(maps):
            keys = jax.random.split(jax.random.key(0))
            samples, _ = model.samples(maps, inputs_of(), targets, state, keys=keys)
            value, terms = rcnn_loss(samples, weights, rcnn_counts(samples, weights))
            return value, terms

        return jax.value_and_grad(loss, has_aux=True)(maps)

    return maps, gradients


@pytest.mark.slow
def test_losses_are_finite_with_and_without_objects_and_read_no_junk(heads, assert_close):
    maps, gradients = heads
    (loss, terms), grads = gradients(maps, scene(), jnp.ones(2))
    assert terms["mask"] > 0
    assert terms["box"] > 0
    assert all(np.isfinite(x).all() for x in (loss, *grads))
    junk = gradients(maps, scene(junk=np.nan, labels=10**6 + 1), jnp.ones(2))
    assert_close(junk, ((loss, terms), grads), 0)
    # no objects, which is also what is left of crowds
    (loss, terms), grads = gradients(maps, scene(junk=np.nan, valid=(False,) * 3), jnp.ones(2))
    assert terms["mask"] == terms["box"] == terms["proposal"] == 0
    assert loss > 0
    assert all(np.isfinite(x).all() for x in grads)
    # an object outside the image, and one without extent
    odd = scene()._replace(boxes=jnp.array([[[500.0, 500, 600, 600], [20, 20, 20, 40], [0] * 4]] * 2))
    (loss, _), grads = gradients(maps, odd, jnp.ones(2))
    assert np.isfinite(loss)
    assert all(np.isfinite(x).all() for x in grads)
    # an image of weight 0
    (_, _), grads = gradients(maps, scene(), jnp.array([1.0, 0.0]))
    assert all((level[1] == 0).all() and np.any(level[0]) for level in grads[:2])


@pytest.mark.slow
def test_one_device_and_eight_have_the_same_loss(mesh, assert_close):
    model, state = head_model(dialect(anchors=64, boxes=16))
    maps = random_maps(np.random.default_rng(3), count=8)
    targets = jax.tree.map(lambda x: jnp.concatenate([x] * 4), scene())
    weights = jnp.array([1.0] * 7 + [0.0])

    def loss(maps, targets, weights, numbers):
        keys = jax.vmap(lambda number: jax.random.fold_in(jax.random.key(0), number))(numbers)
        samples, _ = model.samples(maps, inputs_of(len(weights)), targets, state, keys=keys)
        counts = jax.tree.map(global_sum, rcnn_counts(samples, weights))
        return global_sum(rcnn_loss(samples, weights, counts)[0])

    rows = maps, targets, weights, jnp.arange(8)
    spread = jax.shard_map(loss, mesh=mesh, in_specs=P("data"), out_specs=P())
    assert_close(jax.jit(spread)(*rows), jax.jit(loss)(*rows), 1e-5)


@pytest.mark.slow
def test_cascade(assert_close):
    key = jax.random.key(0)
    many = ProposalRule(200, 600, smallest=1e-3, strict=False)
    rule = dataclasses.replace(dialect(anchors=64, boxes=64), train_proposals=many)

    def build():
        box = {"num_outputs": CLASSES + 1, "num_boxes": 1, "width": 16}
        heads = tuple(RoIBoxHead(CHANNELS, **box, key=k) for k in jax.random.split(key, 3))
        options = {"dialect": rule, "num_classes": CLASSES, "stages": CASCADE, "anchor_sizes": ANCHORS}
        return RCNN(GivenMaps(), GivenMaps(), RPNHead(CHANNELS, key=key), heads, **options)

    model, state = eqx.nn.make_with_state(build)()
    still = [head.deltas for head in model.box_heads]
    model = eqx.tree_at(lambda m: [head.deltas for head in m.box_heads], model, jax.tree.map(jnp.zeros_like, still))
    maps = random_maps(np.random.default_rng(4))
    targets = scene()  # the second object is near an anchor, so that its proposals stay in all stages
    targets = targets._replace(boxes=targets.boxes.at[0, 1].set(jnp.array([30.0, 31, 65, 66])))

    @jax.jit
    def both(maps):
        keys = jax.random.split(jax.random.key(0))
        return model.samples(maps, inputs_of(), targets, state, keys=keys)[0], model.detect(maps, inputs_of(), state)

    samples, found = both(maps)
    assert samples.masks is None
    assert found.masks is None
    assert found.boxes.shape == (2, 100, 4)
    first, second, third = samples.boxes
    for before, after in ((first, second), (second, third)):
        assert not jnp.any(after.positive & ~before.positive)  # boxes stand still, and fewer overlap enough
    both = third.positive[..., None]
    assert jnp.any(both & (jnp.abs(first.targets) > 0.1))
    for factor, stage in ((2.0, second), (3.0, third)):
        assert_close(jnp.where(both, stage.targets, 0), factor * jnp.where(both, first.targets, 0), 1e-4)
    _, terms = rcnn_loss(samples, jnp.ones(2), rcnn_counts(samples, jnp.ones(2)))
    assert {"class_0", "class_1", "class", "box_0", "box_1", "box"} <= set(terms)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["v2", "cascade"])
def test_whole_model_on_small_images(kind):
    """ResNet of width 8, pyramid of 16 channels, 64 pixels: finds objects, and all its parameters learn."""
    options = {"masks": True, "v2": kind == "v2", "cascade": kind == "cascade", **TINY}
    options |= {"norm": "batch", "anchor_sizes": ANCHORS}
    small = dialect(boxes=16)  # all anchors are drawn: each level has a gradient
    model, state = eqx.nn.make_with_state(rcnn_resnet_fpn)(dialect=small, **options, key=jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (2, 64, 64, 3))
    inputs = PaddedImages(images, jnp.array([[64, 64], [64, 40]]))
    targets = scene()
    targets = targets._replace(masks=targets.masks[:, :, :64, :64])

    @jax.jit
    def run(model, state):
        def loss(model):
            keys = jax.random.split(jax.random.key(0))
            samples, new = model.train_outputs(inputs, targets, state, keys=keys)
            return rcnn_loss(samples, jnp.ones(2), rcnn_counts(samples, jnp.ones(2)))[0], new

        found, _ = model(inputs, state)  # before: training uses the state up
        (value, new), grads = jax.value_and_grad(loss, has_aux=True)(model)
        return value, new, grads, found

    value, new, grads, found = run(model, state)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((grads, new)))
    silent = [jax.tree_util.keystr(path) for path, g in jax.tree_util.tree_leaves_with_path(grads) if not np.any(g)]
    assert silent == []
    assert found.masks.shape == (2, 100, 28, 28)
    assert found.valid.any()
    assert (found.masks >= 0).all()
    assert (found.masks <= 1).all()
    changed = [bool(np.any(a != b)) for a, b in zip(*map(jax.tree.leaves, (state, new)), strict=True)]
    assert all(changed)
    half = inputs._replace(images=images.astype(jnp.bfloat16))
    shapes = eqx.filter_eval_shape(lambda: model(half, state)[0])
    assert shapes.boxes.dtype == shapes.masks.dtype == jnp.float32
