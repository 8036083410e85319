"""ConvNeXt: the depthwise convolution against XLA's, GRN, the stack of blocks, the head, and what is refused."""

import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from eqvision.backbones import CONVNEXT_SIZES, ConvNeXt, ConvNeXtSize, convnext
from eqvision.backbones.convnext import (
    ConvNeXtBlock,
    ConvNeXtStage,
    DepthwiseConv,
    GlobalResponseNorm,
    depthwise,
)
from eqvision.counting import count
from eqvision.heads import NormedMapHead
from eqvision.layers import MissingKeyError
from eqvision.zoo import create

KEY = jax.random.key(0)
TINY = ConvNeXtSize((2, 1), (8, 12))
# For what is run once: compiling it well takes twice as long and gains nothing.
ONCE = {"xla_backend_optimization_level": 0}


def draw(*shape, seed=1, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def grouped(x, weight):
    """The definition, by XLA's grouped convolution."""
    pad = (weight.shape[0] // 2,) * 2
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, weight, (1, 1), (pad, pad), dimension_numbers=dimensions, feature_group_count=x.shape[-1]
    )


def value_and_gradients(convolve, x, weight):
    def loss(x, weight):
        y = convolve(x, weight)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), compiler_options=ONCE)(x, weight)


# The depthwise convolution


@pytest.mark.parametrize(("height", "width", "kernel_size"), [(9, 11, 7), (2, 3, 7), (1, 1, 7), (5, 4, 3), (4, 4, 1)])
def test_depthwise_is_the_grouped_convolution(height, width, kernel_size, assert_close):
    x, weight = draw(3, height, width, 5), draw(kernel_size, kernel_size, 1, 5, seed=2)
    assert_close(value_and_gradients(depthwise, x, weight), value_and_gradients(grouped, x, weight), 1e-5)


def test_depthwise_of_bfloat16_sums_in_float32(assert_close):
    x, weight = draw(2, 12, 12, 4, dtype=jnp.bfloat16), draw(7, 7, 1, 4, seed=2, dtype=jnp.bfloat16)
    ours = value_and_gradients(depthwise, x, weight)
    assert {leaf.dtype for leaf in jax.tree.leaves(ours)} == {jnp.dtype(jnp.bfloat16)}
    exact = grouped(x.astype(jnp.float32), weight.astype(jnp.float32))
    assert_close(ours[1].astype(jnp.float32), exact, 2**-8)  # one rounding, at the end


def test_depthwise_under_vmap(assert_close):
    x, weights = draw(2, 6, 5, 3), draw(4, 7, 7, 1, 3, seed=2)

    def gradient(weight):
        return value_and_gradients(depthwise, x, weight)[0][1]

    expected = jnp.stack([value_and_gradients(grouped, x, weight)[0][1] for weight in weights])
    assert_close(jax.vmap(gradient)(weights), expected, 1e-5)


@pytest.mark.parametrize(("platform", "convolutions"), [("cpu", 0), ("cuda", 3), ("tpu", 3)])
def test_accelerators_get_convolutions_and_the_cpu_sums(platform, convolutions):
    x, weight = draw(2, 6, 6, 4), draw(7, 7, 1, 4, seed=2)
    gradients = jax.jit(lambda x, w: jax.vjp(depthwise, x, w)[1](x))
    once = gradients.trace(x, weight).lower(lowering_platforms=(platform,)).as_text()
    forward = jax.jit(depthwise).trace(x, weight).lower(lowering_platforms=(platform,)).as_text()
    assert (once + forward).count("stablehlo.convolution") == convolutions


def test_the_gradient_of_accelerators_is_that_of_the_cpu(assert_close):
    from eqvision.backbones.convnext import _grouped, _grouped_gradient, _shifted_products, _shifted_sum

    x, weight, g = draw(2, 6, 5, 4), draw(7, 7, 1, 4, seed=2), draw(2, 6, 5, 4, seed=3)
    assert_close(_shifted_sum(x, weight), _grouped(x, weight), 1e-5)
    assert_close(_shifted_products(x, weight, g), _grouped_gradient(x, weight, g), 1e-5)


def test_depthwise_counts_its_products():
    layer = DepthwiseConv(6, key=KEY)
    assert count(layer, jax.ShapeDtypeStruct((2, 8, 9, 6), jnp.float32)).macs == 2 * 8 * 9 * 6 * 49


def test_window_without_middle(unchecked):
    with pytest.raises(ValueError, match="a window of 4 has no middle; take an odd kernel_size"):
        DepthwiseConv(8, 4, key=KEY)


# Global response normalisation


def test_grn_is_its_formula(assert_close):
    x = draw(2, 4, 5, 6)
    norm = eqx.tree_at(lambda n: (n.weight, n.bias), GlobalResponseNorm(6), (draw(6, seed=2), draw(6, seed=3)))
    wide = np.asarray(x, np.float64)
    norms = np.sqrt((wide**2).sum((1, 2), keepdims=True))
    relative = norms / (norms.mean(-1, keepdims=True) + 1e-6)
    assert_close(norm(x), norm.weight * (wide * relative) + norm.bias + wide, 1e-6)


def test_grn_is_the_identity_at_first():
    x = draw(2, 3, 3, 4)
    assert np.array_equal(GlobalResponseNorm(4)(x), x)


def test_gradients_of_a_black_image_are_finite():
    model, state = eqx.filter_jit(eqx.nn.make_with_state(create_tiny))(grn=True)

    @functools.partial(jax.jit, compiler_options=ONCE)
    def gradients_of(model):
        return jax.grad(lambda m: jnp.sum(jnp.sin(m(jnp.zeros((1, 16, 16, 3)), state, train=True)[0][-1])))(model)

    gradients = gradients_of(model)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))


# Stages and the backbone


def create_tiny(**options):
    return ConvNeXt(TINY, key=KEY, **options)


def woken(model):
    """Noise on every leaf: layer scales of 1e-6 hide all blocks."""
    leaves, tree = jax.tree.flatten(model)
    return jax.tree.unflatten(tree, [leaf + 0.3 * draw(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)])


@functools.cache
def built(**options):
    model, state = eqx.filter_jit(eqx.nn.make_with_state(functools.partial(create_tiny, **options)))()
    return woken(model), state


@pytest.mark.parametrize("options", [{"unroll": True}, {"remat": "full"}, {"remat": "dots"}])
def test_unrolling_and_rematerialisation_change_nothing(options, assert_close):
    x, common = draw(2, 4, 5, 6), {"grn": True, "layer_scale": 0.5, "key": KEY}

    @functools.partial(jax.jit, compiler_options=ONCE)
    def gradients(stage):
        return jax.grad(lambda stage: jnp.sum(jnp.sin(stage(x, train=True, key=KEY))))(stage)

    stage, other = (woken(ConvNeXtStage(None, 6, (0.0, 0.5), **common, **extra)) for extra in ({}, options))
    assert_close(jax.tree.leaves(gradients(other)), jax.tree.leaves(gradients(stage)), 1e-5)


def test_blocks_run_in_order(assert_close):
    """A stage of stacked blocks is its blocks one after the other."""
    stage = woken(ConvNeXtStage(None, 6, (0.0, 0.0, 0.0), key=KEY))
    x = expected = draw(2, 5, 4, 6)
    for i in range(3):
        expected = jax.tree.map(lambda leaf, i=i: leaf[i], stage.blocks)(expected)
    assert_close(stage(x), expected, 1e-5)


def test_drop_path_rises_over_all_blocks():
    model = create_tiny(drop_path=0.4)
    assert [stage.rates for stage in model.stages] == [(0.0, 0.2), (0.4,)]


def test_drop_path_drops_whole_examples():
    block = woken(ConvNeXtBlock(6, key=KEY))
    x = draw(64, 2, 2, 6)
    y = block(x, drop_path_rate=0.5, train=True, key=KEY)
    dropped = np.all(np.asarray(y == x), axis=(1, 2, 3))
    assert 16 < dropped.sum() < 48
    whole = np.asarray(x + 2 * (block(x) - x))
    np.testing.assert_allclose(np.asarray(y)[~dropped], whole[~dropped], rtol=1e-4, atol=1e-4)


def test_drop_path_needs_a_key():
    model, state = built(drop_path=0.1)
    with pytest.raises(MissingKeyError, match="drop_path is random in training and got key=None"):
        model(draw(1, 32, 32, 3), state, train=True)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (45, 39), (8, 8)])
def test_rows_that_fill_no_window_are_left_out(height, width):
    model, state = built()
    features = jax.eval_shape(lambda m, s, x: m(x, s)[0], model, state, draw(1, height, width, 3))
    grids = [(height // stride, width // stride) for stride in (4, 8)]
    assert [feature.shape for feature in features] == [(1, *grids[0], 8), (1, *grids[1], 12)]


def test_image_of_less_than_one_window():
    model, state = built()
    message = "images of 40x7 leave nothing at stride 8; resize or pad them to at least 8x8"
    with pytest.raises(ValueError, match=message):
        model(jnp.zeros((1, 40, 7, 3)), state)


def test_versions_differ_in_layer_scale_and_grn():
    first, second = (eqx.filter_eval_shape(convnext, "atto", version=version, key=KEY) for version in (1, 2))
    assert [stage.blocks.grn for stage in first.stages] == [None] * 4
    assert [stage.blocks.scale for stage in second.stages] == [None] * 4
    assert second.stages[1].blocks.grn.weight.shape == (2, 4 * 80)
    assert np.all(create_tiny().stages[0].blocks.scale.scale == np.float32(1e-6))


def test_activation_reaches_the_blocks():
    images, outputs = draw(1, 16, 16, 3), []
    for activation in ("gelu", "gelu_tanh"):
        model, state = built(activation=activation)
        outputs.append(np.asarray(model(images, state)[0][-1]))
    difference = np.max(np.abs(outputs[0] - outputs[1]))
    assert 0 < difference < 0.05 * np.max(np.abs(outputs[0]))


def test_devices_agree_with_one(mesh, assert_close):
    """Values and summed gradients where each device has a part of the batch, and where one has all."""
    model, state = built(grn=True)
    images = draw(8, 16, 16, 3)

    def loss(model, images):
        return jnp.sum(jnp.sin(model(images, state, train=True)[0][-1]))

    def local(model, images):
        return jax.lax.psum(loss(model, images), "data")

    split = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    actual = jax.jit(jax.value_and_grad(split), compiler_options=ONCE)(model, images)
    expected = jax.jit(jax.value_and_grad(loss), compiler_options=ONCE)(model, images)
    assert_close(jax.tree.leaves(actual), jax.tree.leaves(expected), 1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "medium"}, "ConvNeXt of size 'medium' does not exist; choose from atto, femto, pico"),
        ({"size": "tiny", "version": 3}, "ConvNeXt version 3 does not exist; choose 1 or 2"),
        ({"size": "tiny", "remat": "all"}, "remat 'all' is unknown; choose from ('none', 'dots', 'full')"),
        ({"size": "tiny", "drop_path": 1.0}, "drop_path rate 1.0 is not in [0, 1)"),
    ],
)
def test_options_that_do_not_exist(options, message, unchecked):
    with pytest.raises(ValueError, match=re.escape(message)):
        eqx.filter_eval_shape(convnext, **options, key=KEY)


def test_options_of_the_zoo_reach_the_model(monkeypatch):
    monkeypatch.setitem(CONVNEXT_SIZES, "tiny", TINY)
    model, _ = eqx.filter_eval_shape(create, "convnextv2_tiny", drop_path=0.3, remat="full", unroll=2, key=KEY)
    assert model.backbone.stages[1].rates == (0.3,)
    assert {(stage.remat, stage.unroll) for stage in model.backbone.stages} == {("full", 2)}


# The head


def test_head_normalises_the_mean(assert_close):
    head = woken(NormedMapHead(6, 3, key=KEY))
    coarsest = draw(2, 4, 5, 6, dtype=jnp.bfloat16)
    mean = np.asarray(coarsest, np.float64).mean((1, 2))
    centred = mean - mean.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * head.norm.weight + head.norm.bias
    assert head.pooled((coarsest,)).dtype == jnp.float32
    assert_close(head.pooled((coarsest,)), normed, 1e-5)
    _, state = built()
    logits, _ = head((draw(2, 8, 10, 3), coarsest), state)
    assert_close(logits, normed @ head.linear.weight + head.linear.bias, 1e-5)


def test_reset_keeps_the_norm():
    head = woken(NormedMapHead(6, 3, eps=1e-3, key=KEY))
    fresh = head.reset(5, key=KEY)
    assert fresh.linear.weight.shape == (6, 5)
    assert np.array_equal(fresh.norm.weight, head.norm.weight)
    assert fresh.norm.eps == 1e-3
