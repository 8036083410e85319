"""DETR by itself: sizes, options, and what padding, batching and devices may change."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from detr_references import made, toy_detr

import eqvision
from eqvision.backbones import small_cnn
from eqvision.backbones.resnet import ConvNorm, resnet
from eqvision.detectors import DETR
from eqvision.heads.set_prediction import PanopticMaskHead
from eqvision.layers import FrozenBatchNorm
from eqvision.layers.detr_transformer import DETRDecoder, DETREncoder
from eqvision.names import UnknownNameError
from eqvision.types import PaddedImages, SetPredictions

KEY = jax.eval_shape(jax.random.key, 0)


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def frozen_count(model):
    """Numbers of all frozen norms: scale, shift, mean and variance."""
    norms = jax.tree.leaves(model, is_leaf=lambda x: isinstance(x, FrozenBatchNorm))
    return sum(count(norm) for norm in norms if isinstance(norm, FrozenBatchNorm))


def abstract(name, **options):
    return eqx.filter_eval_shape(eqvision.create, name, key=KEY, **options)


@eqx.filter_jit
def predict(model, maps, mask):
    return model.predict((maps,), mask)


@eqx.filter_jit
def forward(model, state, inputs):
    return model(inputs, state)[0]


# Sizes


@pytest.mark.parametrize(("name", "millions"), [("detr_r50", 41.52), ("detr_r101", 60.46)])
def test_published_parameters(name, millions):
    """As transformers counts them (41.52 M): frozen norms are buffers there, so none of their four vectors counts."""
    model, state = abstract(name)
    assert round((count(model) - frozen_count(model)) / 1e6, 2) == millions
    assert frozen_count(model) == 4 * {"detr_r50": 26_560, "detr_r101": 52_672}[name]
    assert not jax.tree.leaves(state)
    assert model.backbone.strides[-1] == 32


def test_shapes_of_outputs_for_images_of_any_size():
    model, state = abstract("detr_r50_dc5")
    inputs = PaddedImages(jax.ShapeDtypeStruct((2, 161, 97, 3), jnp.float32), jax.ShapeDtypeStruct((2, 2), jnp.int32))
    outputs = eqx.filter_eval_shape(forward, model, state, inputs)
    assert outputs.logits.shape == (6, 2, 100, 92)
    assert outputs.boxes_cxcywh.shape == (6, 2, 100, 4)
    assert (outputs.masks, outputs.proposals) == (None, None)
    assert model.backbone.strides[-1] == 16


def test_panoptic_detr_has_250_classes_and_masks_at_a_quarter():
    model, state = abstract("detr_r50_panoptic")
    inputs = PaddedImages(jax.ShapeDtypeStruct((1, 128, 96, 3), jnp.float32), jax.ShapeDtypeStruct((1, 2), jnp.int32))
    outputs = eqx.filter_eval_shape(forward, model, state, inputs)
    assert outputs.logits.shape == (6, 1, 100, 251)
    assert outputs.masks.shape == (1, 100, 32, 24)


def test_bfloat16_images_give_float32_predictions():
    model, state = abstract("detr_r50")
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.bfloat16)
    half = eqx.filter_eval_shape(forward, model, state, PaddedImages(images, jax.ShapeDtypeStruct((1, 2), jnp.int32)))
    assert half.logits.dtype == half.boxes_cxcywh.dtype == jnp.float32


def test_names_options_and_classes():
    assert {"detr_r50", "detr_r50_dc5", "detr_r101", "detr_r101_dc5", "detr_r50_panoptic"} <= set(
        eqvision.list_models("detr*", kind="detector")
    )
    assert "detr_r50" not in eqvision.list_models()
    assert abstract("detr_r50", num_classes=3)[0].head.classes.weight.shape == (256, 4)
    with pytest.raises(UnknownNameError, match="detr_r50"):
        eqvision.create("detr_r5O", key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"model 'detr_r50' has no option 'drop_path'; it has: .*dropout"):
        eqvision.create("detr_r50", drop_path=0.1, key=jax.random.key(0))


def test_any_pyramid_and_its_errors(key):
    cnn = eqx.filter_eval_shape(lambda: small_cnn(in_channels=3, key=jax.random.key(0)))
    options = {"width": 16, "num_heads": 2, "mlp_dim": 8, "encoder_depth": 1, "decoder_depth": 2, "num_queries": 4}
    model, state = eqx.filter_eval_shape(
        lambda: eqx.nn.make_with_state(
            lambda: DETR(small_cnn(in_channels=3, key=jax.random.key(0)), **options, key=jax.random.key(0))
        )()
    )
    inputs = PaddedImages(jax.ShapeDtypeStruct((1, 24, 40, 3), jnp.float32), jax.ShapeDtypeStruct((1, 2), jnp.int32))
    assert eqx.filter_eval_shape(forward, model, state, inputs).logits.shape == (2, 1, 4, 92)
    with pytest.raises(ValueError, match="masks=True reads four maps of the backbone, and this one gives 3"):
        DETR(cnn, masks=True, key=key)
    with pytest.raises(ValueError, match="DETREncoder needs at least one layer, got depth 0"):
        DETREncoder(0, 16, 2, 8, key=key)
    with pytest.raises(ValueError, match=r"width that 16 divides and width \+ num_heads that 8 divides; got 3 maps"):
        PanopticMaskHead(40, 4, (3, 3, 3), key=key)


def test_wrong_words_are_named(key, unchecked):
    with pytest.raises(ValueError, match=r"norm_order 'last' is unknown; choose from \('pre', 'post'\)"):
        DETREncoder(1, 16, 2, 8, norm_order="last", key=key)
    with pytest.raises(ValueError, match=r"remat 'some' is unknown; choose from"):
        DETRDecoder(1, 16, 2, 8, remat="some", key=key)
    with pytest.raises(ValueError, match=r"norm 'group' is unknown; choose from \('batch', 'frozen'\)"):
        resnet(50, norm="group", key=key)
    with pytest.raises(ValueError, match="kind 'tracker' of model is unknown"):
        eqvision.list_models(kind="tracker")


# The backbone's options


def test_dilated_and_frozen_resnets_have_the_same_parameters():
    plain, dilated = (
        eqx.filter_eval_shape(lambda key, flag=flag: resnet(50, dilate_last=flag, key=key), KEY)
        for flag in (False, True)
    )
    assert (plain.strides, dilated.strides) == ((4, 8, 16, 32), (4, 8, 16, 16))
    assert [leaf.shape for leaf in jax.tree.leaves(plain)] == [leaf.shape for leaf in jax.tree.leaves(dilated)]
    convs = [[conv.conv.dilation for conv in block.convs] for block in dilated.stages[-1]]
    assert convs == [[1, 1, 1], [1, 2, 1], [1, 2, 1]]
    assert [block.convs[1].conv.padding for block in dilated.stages[-1]] == [1, 2, 2]
    frozen = eqx.filter_eval_shape(lambda key: resnet(50, norm="frozen", key=key), KEY)
    assert count(frozen) == count(plain)  # which holds its statistics until make_with_state takes them out


def test_basic_blocks_are_not_dilated(key):
    with pytest.raises(ValueError, match=r"dilate_last needs a ResNet of bottlenecks \(50, 101, 152\), got depth 18"):
        resnet(18, dilate_last=True, key=key)


def test_frozen_norms_start_open_and_get_no_gradient(key):
    norm = ConvNorm(1, 4, 1, norm="frozen", zero_scale=True, key=key).norm
    assert np.all(norm.weight == 1), "a frozen scale of zero would shut the block for good"
    gradient = jax.grad(lambda norm: jnp.sum(norm(jnp.ones((1, 2, 2, 4)), eqx.nn.State(norm))[0]))(norm)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


# What padding and batching may change


def maps_and_mask(rng, size=(2, 3, 4), valid=((3, 2), (2, 4))):
    maps = rng.normal(size=(*size, 32)).astype(np.float32)
    mask = np.zeros(size, bool)
    for row, (height, width) in zip(mask, valid, strict=True):
        row[:height, :width] = True
    return jnp.asarray(maps), jnp.asarray(mask)


def test_padding_of_the_map_changes_nothing_whatever_it_holds(rng, assert_close):
    model, _ = made()
    maps, mask = maps_and_mask(rng)
    wide = np.full((2, 5, 7, 32), np.nan, np.float32)
    wide[:, :3, :4] = np.where(mask[..., None], maps, np.nan)
    more = np.pad(mask, ((0, 0), (0, 2), (0, 3)))
    assert_close(predict(model, jnp.asarray(wide), jnp.asarray(more)), predict(model, maps, mask), 1e-5)


def test_a_row_that_only_pads_the_batch_is_finite_and_changes_no_other(rng, assert_close):
    model, _ = made()
    maps, mask = maps_and_mask(rng)
    both, first = predict(model, maps, mask), predict(model, maps, mask.at[1].set(False))
    assert_close(first.logits[:, 0], both.logits[:, 0], 1e-6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(first))


@pytest.mark.slow
def test_gradients_with_a_row_that_only_pads_the_batch_are_finite(rng):
    model, _ = made("toy_detr_panoptic")
    (maps, mask), finer = maps_and_mask(rng), [(2, 12, 16, 8), (2, 9, 11, 16), (2, 6, 8, 24)]
    pyramid = (*(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in finer), maps)

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(model, mask):
        found = model.predict(pyramid, mask)
        return jnp.sum(found.logits**2) + jnp.sum(found.boxes_cxcywh) + jnp.sum(found.masks**2)

    leaves = jax.tree.leaves(gradient(model, mask.at[1].set(False)))
    assert all(np.isfinite(leaf).all() for leaf in leaves)


@pytest.mark.slow
def test_a_batch_of_two_is_two_batches_of_one(rng, assert_close):
    model, _ = made()
    maps, mask = maps_and_mask(rng)
    both = predict(model, maps, mask)
    for i in range(2):
        alone = predict(model, maps[i : i + 1], mask[i : i + 1])
        picked = SetPredictions(both.logits[:, i : i + 1], both.boxes_cxcywh[:, i : i + 1])
        assert_close(alone, picked, 1e-5)


def test_what_the_mask_hides_is_what_counts(rng):
    model, _ = made()
    maps, mask = maps_and_mask(rng)
    masked, whole = predict(model, maps, mask), predict(model, maps, jnp.ones_like(mask))
    assert np.abs(masked.logits - whole.logits).max() > 1e-3


@pytest.mark.slow
def test_masks_of_a_batch_are_those_of_its_images(rng, assert_close):
    model, state = made("toy_detr_panoptic")
    images = jnp.asarray(rng.normal(size=(2, 64, 48, 3)), jnp.float32)
    size = jnp.array([[64, 48], [64, 48]], jnp.int32)
    both = forward(model, state, PaddedImages(images, size))
    alone = forward(model, state, PaddedImages(images[1:], size[1:]))
    assert both.masks.shape == (2, 7, 16, 12)
    assert_close(alone.masks, both.masks[1:], 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("norm_order", ["pre", "post"])
def test_scanned_layers_are_a_loop(norm_order, rng, key, assert_close):
    encoder = DETREncoder(3, 16, 2, 8, norm_order=norm_order, key=key)
    decoder = DETRDecoder(3, 16, 2, 8, norm_order=norm_order, key=key)
    x, position = (jnp.asarray(rng.normal(size=(2, 6, 16)), jnp.float32) for _ in range(2))
    queries, mask = jnp.asarray(rng.normal(size=(2, 4, 16)), jnp.float32), jnp.arange(6) < jnp.array([[6], [4]])
    y, outputs = x, []
    for i in range(3):
        y = jax.tree.map(lambda leaf, i=i: leaf[i], encoder.layers)(y, position, key_mask=mask)
    y = y if encoder.norm is None else encoder.norm(y)
    assert (encoder.norm is None) == (norm_order == "post")
    assert_close(encoder(x, position, key_mask=mask), y, 1e-5)
    z = jnp.zeros_like(queries)
    for i in range(3):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], decoder.layers)
        z = layer(z, queries, x, x + position, key_mask=mask)
        outputs.append(decoder.norm(z))
    assert_close(decoder(queries, x, position, key_mask=mask), jnp.stack(outputs), 1e-5)


@pytest.mark.slow
def test_a_batch_split_over_devices_says_the_same(mesh, rng, assert_close):
    """Under ``shard_map`` with its checks on: what enters the decoder's scan varies as what leaves it."""
    model, _ = made()
    maps, mask = jnp.asarray(rng.normal(size=(8, 2, 3, 32)), jnp.float32), jnp.ones((8, 2, 3), bool)
    split, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()

    def logits(model, maps, mask):
        return model.predict((maps,), mask).logits[-1]

    sharded = jax.shard_map(logits, mesh=mesh, in_specs=(whole, split, split), out_specs=split)
    assert_close(jax.jit(sharded)(model, maps, mask), jax.jit(logits)(model, maps, mask), 1e-5)


@pytest.mark.slow
def test_rematerialised_gradients_are_the_same(rng, assert_close):
    maps, mask = maps_and_mask(rng)

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(model, maps, mask):
        return jnp.mean(model.predict((maps,), mask, train=True, key=jax.random.key(3)).logits ** 2)

    plain, remat = (gradient(made("toy_detr", remat=remat, dropout=0.1)[0], maps, mask) for remat in ("none", "full"))
    # All leaves as one: the gradients of some (biases of keys) are rounding errors alone.
    vectors = [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (remat, plain)]
    assert_close(*vectors, 1e-4)


@pytest.mark.slow
def test_dropout_needs_a_key_and_draws_from_it(rng):
    model, _ = made("toy_detr", dropout=0.2)
    maps, mask = maps_and_mask(rng)

    @eqx.filter_jit
    def run(model, key):
        return model.predict((maps,), mask, train=True, key=key).logits

    first, second = run(model, jax.random.key(0)), run(model, jax.random.key(1))
    assert np.abs(first - second).max() > 1e-3
    np.testing.assert_array_equal(first, run(model, jax.random.key(0)))
    with pytest.raises(ValueError, match=r"dropout\(0.2\) is random in training and got key=None"):
        run(model, None)


@pytest.mark.slow
def test_published_initial_values(key):
    model = eqx.filter_jit(lambda key: toy_detr(key=key))(key)
    attention = model.encoder.layers.attention
    width, hidden = 32, 64
    assert np.abs(attention.query.weight).max() == pytest.approx(math.sqrt(6 / (4 * width)), rel=0.01)
    assert np.abs(attention.out.weight).max() == pytest.approx(math.sqrt(6 / (2 * width)), rel=0.01)
    assert not np.any(attention.query.bias)
    assert not np.any(attention.out.bias)
    fc1 = model.decoder.layers.mlp.fc1
    assert np.abs(fc1.weight).max() == pytest.approx(math.sqrt(6 / (width + hidden)), rel=0.01)
    for layer, inputs in ((fc1, width), (model.head.classes, width), (model.head.boxes.layers[0], width)):
        assert np.abs(layer.bias).max() == pytest.approx(inputs**-0.5, rel=0.15)
    assert np.std(model.queries) == pytest.approx(1, rel=0.15)
