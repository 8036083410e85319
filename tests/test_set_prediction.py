"""The set-prediction loss: by hand, with junk in unused rows, without objects, on eight devices; its matching costs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from eqvision.losses import (
    DEFORMABLE_DETR_LOSS,
    DETR_LOSS,
    Counts,
    SetPredictionConfig,
    detr_loss,
    focal_cost,
    mask_dice,
    mask_focal,
    softmax_cost,
    target_counts,
)
from eqvision.ops import global_sum
from eqvision.ops.assignment import hungarian, scipy_assignment
from eqvision.types import DetectionTargets, SetPredictions, SetProposals

CLASSES, ROWS, QUERIES, PLACES = 5, 4, 6, 9
KINDS = {"softmax": DETR_LOSS, "sigmoid": DEFORMABLE_DETR_LOSS}
# masks for both, proposals for the second: what one of them compiles serves most tests of this file
every_kind = pytest.mark.parametrize("kind", ["softmax", pytest.param("sigmoid", marks=pytest.mark.slow)])


def draw(kind, counts=(2, 0, 3, 1), seed=0):
    """Random predictions for images with so many objects each; the objects stand in random rows of the targets."""
    rng = np.random.default_rng(seed)
    batch, k = len(counts), CLASSES + (kind == "softmax")
    size = rng.integers(20, 33, (batch, 2))
    centres, half = rng.uniform(0.3, 0.7, (batch, ROWS, 2)), rng.uniform(0.05, 0.25, (batch, ROWS, 2))
    boxes = np.concatenate([centres - half, centres + half], axis=-1) * np.tile(size[:, ::-1], 2)[:, None]
    targets = DetectionTargets(
        boxes=jnp.asarray(boxes, jnp.float32),
        labels=jnp.asarray(rng.integers(0, CLASSES, (batch, ROWS)), jnp.int32),
        valid=jnp.asarray(np.stack([rng.permutation(ROWS) < count for count in counts])),
        masks=jnp.asarray(rng.integers(0, 2, (batch, ROWS, 12, 14)), jnp.uint8),
    )
    predictions = SetPredictions(
        logits=jnp.asarray(rng.normal(size=(3, batch, QUERIES, k)), jnp.float32),
        boxes_cxcywh=jnp.asarray(rng.uniform(0.1, 0.9, (3, batch, QUERIES, 4)), jnp.float32),
        proposals=draw_proposals(rng, batch, k) if kind == "sigmoid" else None,
        masks=jnp.asarray(rng.normal(size=(batch, QUERIES, 6, 7)), jnp.float32),
    )
    return predictions, targets, jnp.asarray(size, jnp.int32)


def draw_proposals(rng, batch, k):
    logits, boxes = rng.normal(size=(batch, PLACES, k)), rng.uniform(0.1, 0.9, (batch, PLACES, 4))
    valid = rng.uniform(size=(batch, PLACES)) < 0.8
    return SetProposals(jnp.asarray(logits, jnp.float32), jnp.asarray(boxes, jnp.float32), jnp.asarray(valid))


def graded(kind, predictions, targets, size, weights=None, counts=None):
    """Loss, terms, and the gradient into all that is real in the predictions."""
    weights = jnp.ones(targets.boxes.shape[0]) if weights is None else weights
    counts = target_counts(targets, weights) if counts is None else counts
    real, places = apart(predictions)
    (loss, terms), gradients = compiled(kind)(real, places, targets, size, weights, counts)
    return loss, terms, gradients


@functools.cache
def compiled(kind):
    def value(real, places, *given):
        return detr_loss(together(real, places), *given, KINDS[kind])

    return jax.jit(jax.value_and_grad(value, has_aux=True))


def apart(predictions):
    if predictions.proposals is None:
        return predictions, None
    return predictions._replace(proposals=predictions.proposals[:2]), predictions.proposals.valid


def together(real, places):
    return real if places is None else real._replace(proposals=SetProposals(*real.proposals, places))


def every_leaf_finite(tree):
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


# Two queries, one object, by hand


def by_hand(kind, logits, shift):
    """Terms for an image of 20 x 20 with one object, of class 1, that lies ``shift`` pixels below the second query."""
    boxes = jnp.array([[[[0.0, 0.5, 0.2, 0.4], [0.5, 0.5, 0.2, 0.4]]]])
    rows = jnp.array([[[8.0, 6.0 + shift, 12.0, 14.0 + shift], [jnp.nan] * 4]])
    targets = DetectionTargets(rows, jnp.array([[1, 0]]), jnp.array([[True, False]]))
    given = (targets, jnp.array([[20, 20]]), jnp.ones(1), Counts(jnp.array(1.0), jnp.array(1.0)))

    def second(cost, valid):
        assert (cost.shape, valid.shape) == ((1, 1, 2, 2), (1, 1, 2))
        return jnp.where(valid, jnp.argmin(cost, axis=2), -1)

    predictions = SetPredictions(jnp.array([[logits]]), boxes)
    return jax.jit(lambda predictions: detr_loss(predictions, *given, KINDS[kind], matcher=second))(predictions)


def test_softmax_loss_by_hand():
    loss, terms = by_hand("softmax", [[0.0, 0, 2], [0, 1, 0]], shift=0.0)
    entropies = np.log(2 + np.exp(2)) - 2, np.log(2 + np.e) - 1
    np.testing.assert_allclose(terms["class"], (0.1 * entropies[0] + entropies[1]) / 1.1, rtol=1e-6)
    np.testing.assert_allclose([terms["l1"], terms["giou"]], 0, atol=1e-6)
    np.testing.assert_allclose(loss, terms["class"], rtol=1e-5)
    assert terms["cardinality_error"] == 0


def test_sigmoid_loss_by_hand():
    logits = [[0.0, -1], [-1, 1]]
    loss, terms = by_hand("sigmoid", logits, shift=2.0)
    p = 1 / (1 + np.exp(-np.array(logits)))
    cells = -0.75 * p**2 * np.log(1 - p)
    cells[1, 1] = -0.25 * (1 - p[1, 1]) ** 2 * np.log(p[1, 1])
    np.testing.assert_allclose(terms["class"], cells.sum(), rtol=1e-5)
    np.testing.assert_allclose(terms["l1"], 0.1, rtol=1e-5)
    np.testing.assert_allclose(terms["giou"], 1 - 0.6, rtol=1e-5)  # 6 of 10 rows in common, and no gap in the hull
    np.testing.assert_allclose(loss, 2 * cells.sum() + 0.5 + 0.8, rtol=1e-5)
    assert terms["cardinality_error"] == 0


def test_costs_by_hand():
    logits, labels = jnp.array([[0.0, np.log(3.0)]]), jnp.array([1, 0])
    np.testing.assert_allclose(softmax_cost(logits, labels), [[-0.75, -0.25]], rtol=1e-6)
    expected = -0.25 * 0.25**2 * np.log(0.75) + 0.75 * 0.75**2 * np.log(0.25)
    np.testing.assert_allclose(focal_cost(logits, labels)[0, 0], expected, rtol=1e-5)
    assert np.isfinite(focal_cost(jnp.array([[200.0, -200.0]]), labels)).all()


def test_mask_losses_by_hand():
    masks = jnp.array([[[1, 0], [0, 0]]], jnp.uint8)
    logits = jnp.array([[[0.0, 0], [0, 0]]])
    np.testing.assert_allclose(mask_dice(logits, masks), 1 - (2 * 0.5 + 1) / (2 + 1 + 1), rtol=1e-6)
    expected = np.log(2) * 0.25 * (0.25 + 3 * 0.75) / 4
    np.testing.assert_allclose(mask_focal(logits, masks), expected, rtol=1e-6)


# Names, layers, factors


@every_kind
def test_terms_are_named_by_layer_and_weighted(kind):
    loss, terms, _ = graded(kind, *draw(kind))
    factors = {"class": {"softmax": 1, "sigmoid": 2}[kind], "l1": 5, "giou": 2}
    layers = ("", "_0", "_1") + (("_encoder",) if kind == "sigmoid" else ())
    weighted = {f"{name}{layer}": factor for name, factor in factors.items() for layer in layers}
    weighted |= {"mask": 1, "dice": 1}
    assert set(terms) == set(weighted) | {f"cardinality_error{layer}" for layer in layers[:3]}
    np.testing.assert_allclose(loss, sum(terms[name] * factor for name, factor in weighted.items()), rtol=1e-5)


@pytest.mark.slow
def test_factors_of_masks_and_layers_without_auxiliary_losses():
    predictions, targets, size = draw("softmax")
    weights = jnp.ones(4)
    given = (targets, size, weights, target_counts(targets, weights))
    config = SetPredictionConfig(mask_weight=7.0, dice_weight=11.0, class_weight=0.0, auxiliary=False)
    loss, terms = detr_loss(predictions, *given, config)
    parts = 5 * terms["l1"] + 2 * terms["giou"] + 7 * terms["mask"] + 11 * terms["dice"]
    np.testing.assert_allclose(loss, parts, rtol=1e-5)
    assert set(terms) == {"class", "l1", "giou", "cardinality_error", "mask", "dice"}
    last = predictions._replace(logits=predictions.logits[-1:], boxes_cxcywh=predictions.boxes_cxcywh[-1:])
    assert loss == detr_loss(last, *given, dataclasses.replace(config, auxiliary=True))[0]


def test_all_layers_are_matched_in_one_call_of_the_matcher():
    predictions, targets, size = draw("softmax")
    calls = []

    def matcher(cost, valid):
        calls.append((cost.shape, valid.shape))
        return jnp.zeros(valid.shape, jnp.int32)

    counts = target_counts(targets, jnp.ones(4))
    jax.eval_shape(lambda p: detr_loss(p, targets, size, jnp.ones(4), counts, matcher=matcher), predictions)
    assert calls == [((3, 4, QUERIES, ROWS), (3, 4, ROWS))]


@pytest.mark.slow
def test_every_layer_has_its_own_matching():
    predictions, targets, size = draw("softmax")
    weights = jnp.ones(4)
    given = (targets, size, weights, target_counts(targets, weights))
    loss, terms = detr_loss(predictions, *given)
    np.testing.assert_allclose(detr_loss(predictions, *given, matcher=scipy_assignment)[0], loss, rtol=1e-6)
    first = predictions._replace(logits=predictions.logits[:1], boxes_cxcywh=predictions.boxes_cxcywh[:1])
    alone = detr_loss(first, *given)[1]
    np.testing.assert_allclose([alone["class"], alone["l1"]], [terms["class_0"], terms["l1_0"]], rtol=1e-6)


# What must change nothing


@every_kind
def test_junk_in_unused_rows_changes_nothing(kind, assert_close):
    """NaN in invalid targets, in images of weight 0, and in proposals outside the image."""
    predictions, targets, size = draw(kind)
    weights = jnp.array([1.0, 1, 0, 1])
    clean = graded(kind, predictions, targets, size, weights)
    empty = (weights == 0)[:, None, None]
    unused = ~targets.valid | empty[..., 0]
    dirty_targets = DetectionTargets(
        jnp.where(unused[..., None], jnp.nan, targets.boxes),
        jnp.where(unused, -77, targets.labels),
        targets.valid,
        jnp.where(unused[..., None, None], 255, targets.masks).astype(jnp.uint8),
    )
    dirty = SetPredictions(
        jnp.where(empty, jnp.nan, predictions.logits),
        jnp.where(empty, jnp.inf, predictions.boxes_cxcywh),
        dirty_proposals(predictions.proposals),
        jnp.where(empty[..., None], jnp.nan, predictions.masks),
    )
    loss, terms, gradients = graded(kind, dirty, dirty_targets, jnp.where(empty[..., 0], 0, size), weights)
    assert np.isfinite(loss)
    assert_close((loss, terms, gradients), clean, 1e-7)
    assert not gradients.logits[:, 2].any()
    assert gradients.logits[:, 1].any()  # an image without objects still teaches what is empty


def dirty_proposals(proposals):
    if proposals is None:
        return None
    outside = ~proposals.valid[..., None]
    logits = jnp.where(outside, jnp.inf, proposals.logits)
    return SetProposals(logits, jnp.where(outside, jnp.nan, proposals.boxes_cxcywh), proposals.valid)


@every_kind
def test_the_order_of_the_targets_changes_nothing(kind, assert_close):
    predictions, targets, size = draw(kind)
    turned = jax.tree.map(lambda x: x[:, jnp.array([2, 0, 3, 1])], targets)
    assert_close(graded(kind, predictions, turned, size), graded(kind, predictions, targets, size), 1e-6)


@every_kind
def test_a_batch_is_the_sum_of_its_images(kind, assert_close):
    """With the counts of the whole batch, which is how devices and parts of an accumulated batch add up."""
    predictions, targets, size = draw(kind)
    counts = target_counts(targets, jnp.ones(4))
    shares = [graded(kind, predictions, targets, size, jnp.eye(4)[i], counts) for i in range(4)]
    assert_close(jax.tree.map(lambda *parts: sum(parts), *shares), graded(kind, predictions, targets, size), 1e-6)


@every_kind
def test_without_any_object_loss_and_gradients_are_finite(kind):
    predictions, targets, size = draw(kind, counts=(0, 0, 0, 0))
    loss, terms, gradients = graded(kind, predictions, targets, size)
    assert every_leaf_finite((loss, gradients))
    assert terms["class"] > 0
    assert terms["l1"] == terms["giou"] == terms["mask"] == terms["dice"] == 0
    assert gradients.logits.any()


@every_kind
def test_without_any_image_there_is_no_loss(kind):
    nothing = graded(kind, *draw(kind), jnp.zeros(4))
    assert not any(leaf.any() for leaf in jax.tree.leaves(nothing))


@every_kind
def test_empty_boxes_have_finite_gradients(kind):
    predictions, targets, size = draw(kind)
    flat = predictions._replace(boxes_cxcywh=predictions.boxes_cxcywh.at[..., 2:].set(0.0))
    points = targets._replace(boxes=targets.boxes.at[..., 2:].set(targets.boxes[..., :2]))
    loss, _, gradients = graded(kind, flat, points, size)
    assert every_leaf_finite((loss, gradients))
    assert gradients.boxes_cxcywh.any()


@pytest.mark.slow
def test_objects_beyond_the_proposals_are_left_out():
    predictions, targets, size = draw("sigmoid", counts=(3, 3, 3, 3))
    inside = jnp.broadcast_to(jnp.arange(PLACES) < 1, (4, PLACES))
    predictions = predictions._replace(proposals=predictions.proposals._replace(valid=inside))
    loss, terms, gradients = graded("sigmoid", predictions, targets, size)
    boxes = gradients.proposals[1]
    assert np.isfinite(loss)
    assert terms["l1_encoder"] > 0
    assert boxes[:, 0].any()
    assert not boxes[:, 1:].any()


# What must not pass in silence


@every_kind
@pytest.mark.parametrize("label", [-1, CLASSES])
def test_a_label_that_is_no_class_makes_the_loss_nan(kind, label):
    predictions, targets, size = draw(kind)
    wrong = targets._replace(labels=jnp.where(targets.valid, jnp.int32(label), 0))
    assert np.isnan(graded(kind, predictions, wrong, size)[0])


@every_kind
def test_an_object_without_query_makes_the_loss_nan(kind):
    """As where a prediction is NaN: the matcher then gives none of the image's objects a query."""
    predictions, targets, size = draw(kind)
    broken = predictions._replace(boxes_cxcywh=predictions.boxes_cxcywh.at[1, 0, 0, 0].set(jnp.nan))
    _, terms, _ = graded(kind, broken, targets, size)
    assert np.isfinite(terms["class_0"])
    assert np.isnan(terms["class_1"])


def test_messages():
    predictions, targets, size = draw("sigmoid")
    given = (size, jnp.ones(4), Counts(jnp.array(4.0), jnp.array(6.0)))
    with pytest.raises(ValueError, match="gives proposals, whose loss is defined for classification 'sigmoid' only"):
        detr_loss(predictions, targets, *given)
    with pytest.raises(ValueError, match=r"the targets have none .* predictions._replace\(masks=None\)"):
        detr_loss(predictions, targets._replace(masks=None), *given, DEFORMABLE_DETR_LOSS)
    with pytest.raises(ValueError, match="predictions are of 4 images and targets of 2"):
        detr_loss(predictions, jax.tree.map(lambda x: x[:2], targets), *given, DEFORMABLE_DETR_LOSS)
    with pytest.raises(ValueError, match=r"l1_cost is -1\.0; expected 0 or more"):
        SetPredictionConfig(l1_cost=-1.0)
    with pytest.raises(ValueError, match="class_cost, l1_cost and giou_cost are all 0"):
        SetPredictionConfig(class_cost=0.0, l1_cost=0.0, giou_cost=0.0)
    with pytest.raises(ValueError, match=r"focal_alpha is 2\.0; expected a value in \[0, 1\]"):
        SetPredictionConfig(focal_alpha=2.0)


def test_an_unknown_classification_names_the_nearest(unchecked):
    with pytest.raises(ValueError, match="classification 'softmacks' does not exist; nearest: softmax"):
        SetPredictionConfig("softmacks")  # pyright: ignore[reportArgumentType]


# Devices


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_eight_devices_are_one(kind, mesh, assert_close):
    """Loss, terms and the gradient of something shared, with different numbers of objects on each device."""
    predictions, targets, size = draw(kind, counts=(2, 0, 3, 1, 0, 4, 1, 2))
    weights = jnp.array([1.0, 1, 1, 0, 1, 1, 1, 0])

    def share(shared, layers, rest, targets, size, weights):
        counts = jax.tree.map(global_sum, target_counts(targets, weights))
        predictions = SetPredictions(layers[0] * shared, layers[1] ** shared, *rest)
        loss, terms = detr_loss(predictions, targets, size, weights, counts, KINDS[kind], matcher=hungarian)
        return global_sum(loss), jax.tree.map(global_sum, terms)

    step = jax.value_and_grad(share, has_aux=True)
    given = (jnp.array(1.3), predictions[:2], predictions[2:], targets, size, weights)
    split = (P(), P(None, "data"), *(P("data"),) * 4)
    sharded = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=split, out_specs=P()))(*given)
    assert_close(sharded, jax.jit(step)(*given), 1e-6)
    assert np.isfinite(sharded[0][0])


def test_counts_leave_out_what_does_not_count():
    _, targets, _ = draw("softmax")
    assert target_counts(targets, jnp.array([1.0, 1, 0, 1])) == Counts(jnp.array(3.0), jnp.array(3.0))
