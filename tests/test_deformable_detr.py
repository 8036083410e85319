"""Deformable DETR: shapes, what it starts from, and what must not change its outputs."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvision.detectors import DeformableDETR
from eqvision.heads.per_layer import PerLayerHead
from eqvision.layers import Conv
from eqvision.layers.deformable_transformer import (
    DeformableDecoder,
    at_levels,
    flatten_levels,
    inverse_sigmoid,
    moved_boxes,
    pixel_references,
    split_levels,
    valid_ratios,
)
from eqvision.types import PaddedImages

SIZES = {"width": 32, "num_heads": 4, "mlp_dim": 32, "encoder_depth": 2, "decoder_depth": 2, "num_points": 2}


class Pyramid(eqx.Module):
    """Three maps of 8 channels, of strides 4, 8 and 16."""

    convs: tuple[Conv, ...]
    in_channels: int = eqx.field(static=True)
    channels: tuple[int, ...] = eqx.field(static=True)
    strides: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, *, key):
        kinds = ((3, 4), (8, 2), (8, 2))
        self.convs = tuple(Conv(inputs, 8, 3, stride=stride, padding=1, key=key) for inputs, stride in kinds)
        self.in_channels, self.channels, self.strides = 3, (8, 8, 8), (4, 8, 16)

    def __call__(self, images, state, *, train=False, key=None):
        maps = []
        for conv in self.convs:
            images = jax.nn.relu(conv(images))
            maps.append(images)
        return tuple(maps), state

    def intermediates(self, images, state, layers):
        raise NotImplementedError


def build(**options):
    """A model whose numbers are all random: what starts as zero would hide mistakes. Drawn by numpy, which compiles
    nothing."""
    kind = {"num_classes": 3, "num_queries": 5, "num_levels": 3, "dropout": 0.0, **SIZES, **options}

    def shapes():
        key = jax.random.key(0)
        return eqx.nn.make_with_state(lambda: DeformableDETR(Pyramid(key=key), **kind, key=key))()

    model, state = eqx.filter_eval_shape(shapes)
    return drawn(model), state


def drawn(tree, seed=0):
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        name = jax.tree_util.keystr(path)
        if name.endswith("weight") and "norm" in name:
            return jnp.asarray(1 + 0.2 * noise)
        scale = leaf.shape[-2] ** -0.5 if name.endswith("weight") else 0.2
        return jnp.asarray(noise * np.float32(scale))

    return jax.tree.map_with_path(draw, tree)


def maps_and_masks(padded, valid, images=1):
    """Two levels of 32 channels; beyond ``valid`` there is junk."""
    rng, masks, maps = np.random.default_rng(1), [], []
    for level in range(2):
        (height, width), (rows, columns) = ((side // 2**level for side in size) for size in (padded, valid))
        inside = np.zeros((images, height, width), bool)
        inside[:, :rows, :columns] = True
        content = np.full((images, height, width, 32), 7, np.float32)
        content[:, :rows, :columns] = rng.normal(size=(images, rows, columns, 32))
        maps.append(jnp.asarray(content))
        masks.append(jnp.asarray(inside))
    return tuple(maps), tuple(masks)


@eqx.filter_jit
def predict(model, maps, masks):
    return model.predict(maps, masks)


def worst_on_padding(queries, head):
    """Places on padding compete for the choice, all with the score of the bias: make it the worst that there is."""
    leaves = lambda q: (q.project.bias, q.norm.weight)  # noqa: E731
    bias = -0.1 * head.classes.weight[-1, :, 0]
    return eqx.tree_at(leaves, queries, (bias, jnp.ones_like(queries.norm.weight)))


STAGES = [False, pytest.param(True, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def refined():
    return build(num_levels=2, refine=True)[0]


@pytest.mark.parametrize("two_stage", STAGES, ids=["one stage", "two stages"])
def test_more_padding_changes_nothing(refined, two_stage, assert_close):
    model = refined
    if two_stage:
        model, _ = build(num_levels=2, refine=True, two_stage=True)
        model = eqx.tree_at(lambda m: m.queries, model, worst_on_padding(model.queries, model.head))
    tight, wide = (predict(model, *maps_and_masks(padded, (4, 6))) for padded in ((4, 6), (8, 10)))
    assert np.std(wide.logits[-1], axis=1).min() > 1e-3, "all queries say the same"
    assert_close((wide.logits, wide.boxes_cxcywh), (tight.logits, tight.boxes_cxcywh), 1e-4)


def two_images():
    """Of other sizes on the same canvas."""
    pairs = [maps_and_masks((8, 10), valid) for valid in ((4, 6), (8, 2))]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *pairs)


def test_a_batch_of_two_is_two_batches_of_one(refined, assert_close):
    maps, masks = two_images()
    both = predict(refined, maps, masks)
    assert both.logits.shape == (2, 2, 5, 3)
    assert both.boxes_cxcywh.shape == (2, 2, 5, 4)
    for i in range(2):
        one = predict(refined, *jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], (maps, masks)))
        ours = (both.logits[:, i : i + 1], both.boxes_cxcywh[:, i : i + 1])
        assert_close(ours, (one.logits, one.boxes_cxcywh), 1e-4)


@pytest.mark.slow
def test_permuting_queries_permutes_what_they_say(refined, assert_close):
    order = jnp.array([3, 0, 4, 1, 2])
    leaves = lambda m: (m.queries.position, m.queries.content)  # noqa: E731
    shuffled = eqx.tree_at(leaves, refined, tuple(leaf[order] for leaf in leaves(refined)))
    before, after = (predict(model, *two_images()) for model in (refined, shuffled))
    expected = (before.logits[:, :, order], before.boxes_cxcywh[:, :, order])
    assert_close((after.logits, after.boxes_cxcywh), expected, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("levels", [1, 2, 5])
def test_any_number_of_levels_of_a_pyramid(levels, rng):
    model, state = build(num_levels=levels)
    images, size = jnp.asarray(rng.normal(size=(2, 48, 64, 3)), jnp.float32), jnp.array([[48, 40], [26, 64]])
    ours = eqx.filter_jit(lambda model, images: model(PaddedImages(images, size), state)[0])(model, images)
    assert len(model.projections) == levels
    assert ours.logits.shape == (2, 2, 5, 3)
    assert bool(jnp.all(jnp.isfinite(ours.logits)))
    assert ours.proposals is None


@pytest.mark.slow
def test_refinement_from_a_point_equals_layer_by_layer(assert_close):
    """The scan gives the first layer a box in place of its point, so that all layers are equal."""
    key, sizes = jax.random.key(0), {"num_levels": 2, "num_points": 3, "dropout": 0.0}
    decoder, head = drawn(
        eqx.filter_eval_shape(
            lambda: (DeformableDecoder(2, 32, 4, 32, **sizes, refine=True, key=key), PerLayerHead(32, 3, 2, key=key))
        )
    )
    head, (maps, masks) = head.first(2), maps_and_masks((8, 10), (4, 6))
    rng = np.random.default_rng(2)
    content, position = jnp.asarray(rng.normal(size=(2, 1, 5, 32)), jnp.float32)
    point = jnp.asarray(rng.uniform(size=(1, 5, 2)), jnp.float32)

    def by_hand(content, position, reference):
        hidden, boxes, x = [], [], content
        for i in range(2):
            layer, box_head = jax.tree.map(lambda leaf, i=i: leaf[i], (decoder.layers, head))
            x = layer(x, position, at_levels(reference, valid_ratios(masks)), maps, masks)
            reference = moved_boxes(box_head(x), reference)
            hidden.append(x)
            boxes.append(reference)
        return jnp.stack(hidden), jnp.stack(boxes)

    scanned = jax.jit(lambda *q: decoder(*q, maps, masks, head))(content, position, point)
    assert_close(tuple(scanned), jax.jit(by_hand)(content, position, point), 1e-5)


def test_published_initialisation(key):
    assert build(refine=True)[0].head.count == 2
    assert build(refine=True, two_stage=True)[0].head.count == 3
    shared, refined, two_stage = (
        PerLayerHead(32, 3, count, small_boxes=small, key=key) for count, small in ((1, True), (2, True), (3, False))
    )
    for head in (shared, refined, two_stage):
        np.testing.assert_allclose(np.asarray(head.classes.bias), -4.595, atol=1e-3)
        assert not np.any(head.boxes.layers[-1].weight)
        assert bool(jnp.all(head.classes.weight == head.classes.weight[0]))
    np.testing.assert_array_equal(shared.boxes.layers[-1].bias, [[0, 0, -2, -2]])
    np.testing.assert_array_equal(refined.boxes.layers[-1].bias, [[0, 0, -2, -2], [0, 0, 0, 0]])
    assert not np.any(two_stage.boxes.layers[-1].bias)


def test_another_number_of_classes_keeps_the_boxes(key):
    head = PerLayerHead(32, 3, 2, key=key)
    other = head.reset(7, key=key)
    assert other.classes.weight.shape == (2, 32, 7)
    assert bool(jnp.all(other.boxes.layers[0].weight == head.boxes.layers[0].weight))


def test_references_are_pixel_centres_of_the_image_part():
    _, masks = maps_and_masks((4, 8), (2, 6))
    reference = np.asarray(pixel_references(masks))
    assert reference.shape == (1, 4 * 8 + 2 * 4, 2, 2)
    # x 2.5 of 6 image columns, y 0.5 of 2 rows; the image has 6/8 and 2/4 of level 0, 3/4 and 1/2 of level 1
    np.testing.assert_allclose(reference[0, 2, 0], [2.5 / 6 * 6 / 8, 0.5 / 2 * 2 / 4], rtol=1e-6)
    np.testing.assert_allclose(reference[0, 2, 1], [2.5 / 6 * 3 / 4, 0.5 / 2 * 1 / 2], rtol=1e-6)
    np.testing.assert_allclose(reference[0, 32 + 1, 0], [1.5 / 3 * 6 / 8, 0.5 / 1 * 2 / 4], rtol=1e-6)


def test_levels_are_flattened_and_split_again():
    maps, masks = maps_and_masks((4, 8), (2, 6))
    for ours, theirs in zip(split_levels(flatten_levels(maps), masks), maps, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_inverse_sigmoid_is_finite_outside_too():
    x = jnp.array([-1.0, 0.0, 0.3, 1.0, 2.0])
    np.testing.assert_allclose(
        inverse_sigmoid(x), [np.log(1e-5), np.log(1e-5), np.log(3 / 7), -np.log(1e-5), -np.log(1e-5)], rtol=1e-5
    )


def compared(gradients):
    """Without the bias of the keys: it shifts all logits of a query, and its gradient is noise around zero."""
    key_bias = lambda layers: layers.self_attention.key.bias  # noqa: E731
    layers = eqx.tree_at(key_bias, gradients.decoder.layers, replace_fn=jnp.zeros_like)
    return gradients.queries, gradients.head, layers


@pytest.mark.slow
@pytest.mark.parametrize("two_stage", [False, True], ids=["one stage", "two stages"])
def test_gradients_are_finite_with_empty_images_and_remat(two_stage, rng, assert_close):
    """A row that only pads the batch has size 0 x 0. And what is computed again gives the same gradients."""
    images = jnp.asarray(rng.normal(size=(2, 48, 64, 3)), jnp.float32)
    inputs = PaddedImages(images, jnp.array([[32, 40], [0, 0]]))
    gradients = []
    for remat in ("none", "full"):
        model, state = build(refine=True, two_stage=two_stage, remat=remat, dropout=0.1)

        @jax.jit
        @jax.grad
        def gradient(model, state=state):
            ours, _ = model(inputs, state, train=True, key=jax.random.key(1))
            total = jnp.sum(ours.logits**2) + jnp.sum(ours.boxes_cxcywh)
            return total if ours.proposals is None else total + jnp.sum(ours.proposals.boxes_cxcywh)

        gradients.append(gradient(model))
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(gradients[0]))
    assert_close(compared(gradients[1]), compared(gradients[0]), 1e-4)


@pytest.mark.slow
def test_devices_hold_different_images(mesh, rng, assert_close):
    """Under ``shard_map`` the queries are the same on all devices and the images are not."""
    model, state = build(refine=True)
    images = jnp.asarray(rng.normal(size=(8, 48, 64, 3)), jnp.float32)
    size = jnp.asarray(rng.integers(16, 48, size=(8, 2)), jnp.int32)
    spec = jax.sharding.PartitionSpec

    def loss(model, images, size):
        ours, _ = model(PaddedImages(images, size), state, train=False)
        return jnp.sum(ours.logits**2, axis=(0, 2, 3)) + jnp.sum(ours.boxes_cxcywh, axis=(0, 2, 3))

    split = jax.shard_map(loss, mesh=mesh, in_specs=(spec(), spec("data"), spec("data")), out_specs=spec("data"))
    together, apart = (
        jax.jit(jax.grad(lambda model, f=f: jnp.sum(f(model, images, size))))(model) for f in (loss, split)
    )
    assert_close(compared(apart), compared(together), 1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"two_stage": True}, "needs refine=True"),
        ({"width": 48}, "width 48 is not a multiple of 32"),
        ({"remat": "some"}, "remat 'some' is unknown"),
    ],
)
def test_options_that_do_not_go_together(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_more_proposals_than_places():
    model, _ = build(num_levels=1, num_queries=30, refine=True, two_stage=True)
    maps, masks = maps_and_masks((4, 6), (4, 6))
    with pytest.raises(ValueError, match=r"30 proposals are asked for, and maps of 4x6 have 24 places"):
        predict(model, maps[:1], masks[:1])
