"""Segmenters: rows of the zoo on shapes, published figures, heads, and sizes of images that fit no patch."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqvision
from eqvision.backbones import resnet
from eqvision.backbones.resnet import DEPTHS
from eqvision.backbones.vit import SIZES, ViTSize
from eqvision.counting import count
from eqvision.models import Model
from eqvision.ops import adaptive_average_pool
from eqvision.segmenters import (
    SegmentationHead,
    Segmenter,
    deeplabv3plus_resnet,
    fcn_resnet,
    filled_up,
    resized_logits,
    setr_naive,
    upernet_resnet,
    vit_segmenter,
)
from eqvision.types import PaddedImages
from eqvision.zoo import SEGMENTERS, builder

KEY = jax.eval_shape(jax.random.key, 0)
# tracing takes a second or so
QUICK = ("unet_small", "segmenter_vit_s16_mask", "setr_naive_vit_b16")
NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in SEGMENTERS]


def images_of(height, width, channels=3):
    return jax.ShapeDtypeStruct((1, height, width, channels), jnp.float32)


def logits_of(model, state, images):
    return jax.eval_shape(lambda m, s, x: m(x, s)[0], model, state, images)


def abstract(name, **options):
    build = eqx.nn.make_with_state(builder(name, options))
    return eqx.filter_eval_shape(functools.partial(build, image_size=(64, 96)), key=KEY)


@pytest.fixture
def toys(monkeypatch):
    """Rows of each family that are quick to run."""
    monkeypatch.setitem(SIZES, "toy", ViTSize(16, 2, 2, 32))
    monkeypatch.setitem(DEPTHS, 14, ((1, 1, 1, 1), True))
    vit = {"size": "toy", "patch_size": 8, "image_size": 30, "drop_path": 0.1}
    return {
        "linear": functools.partial(vit_segmenter, **vit, decoder="linear"),
        "mask": functools.partial(vit_segmenter, **vit, decoder="mask", num_heads=2),
        "setr": functools.partial(setr_naive, **vit),
        "fcn": functools.partial(fcn_resnet, 14, width=4, auxiliary=True),
        "plus": functools.partial(deeplabv3plus_resnet, 14, width=4, head_width=8),
        "upernet": functools.partial(upernet_resnet, 14, width=4, head_width=8, auxiliary=True),
    }


def made(build, **options):
    return eqx.nn.make_with_state(build)(num_classes=3, in_channels=3, key=jax.random.key(0), **options)


@pytest.mark.parametrize("name", NAMES)
def test_every_row_gives_logits_of_each_pixel(name):
    model, state = abstract(name)
    assert isinstance(model, Model)
    assert all(hasattr(leaf, "shape") for leaf in jax.tree.leaves(model))
    logits = logits_of(model, state, jax.ShapeDtypeStruct((1, 72, 83, 3), jnp.bfloat16))
    assert logits.shape == (1, 72, 83, eqvision.zoo.default_classes(name))
    assert logits.dtype == jnp.float32


# torchvision's metadata: parameters with the second head, and 1e9 multiply-adds of both heads for 520x520 pixels
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "params", "gmacs"),
    [
        ("fcn_r50", 35_322_218, 152.717),
        ("fcn_r101", 54_314_346, 232.738),
        ("deeplabv3_r50", 42_004_074, 178.722),
        ("deeplabv3_r101", 60_996_202, 258.743),
    ],
)
def test_figures_of_torchvision(name, params, gmacs):
    model, state = abstract(name, auxiliary=True)
    counts = count(model, images_of(520, 520), state)
    assert counts.params == params
    second = 65 * 65 * (9 * 1024 + 21) * 256
    assert (counts.macs + second) / 1e9 == pytest.approx(gmacs, abs=6e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mega", "giga"),
    [("upernet_swin_t", 60, 945), ("upernet_swin_s", 81, 1038), ("upernet_convnext_tiny", 60, 939)],
)
def test_figures_of_upernet(name, mega, giga):
    """Liu et al. 2021, table 3, and Liu et al. 2022, table 5, for 512x2048 pixels; both count the second head."""
    model, state = abstract(name, auxiliary=True)
    counts = count(model, images_of(512, 2048), state)
    assert counts.params / 1e6 == pytest.approx(mega, abs=0.6)
    assert counts.macs / 1e9 == pytest.approx(giga, rel=0.02)


def test_dilated_resnets_keep_their_stride():
    build = functools.partial(eqx.filter_eval_shape, resnet, 50, key=KEY)
    model = build(dilated_stages=2)
    assert model.strides == (4, 8, 8, 8)
    dilations = [[block.convs[1].conv.dilation for block in stage] for stage in model.stages]
    assert dilations == [[1] * 3, [1] * 4, [1, 2, 2, 2, 2, 2], [2, 4, 4]]
    with pytest.raises(ValueError, match="of which there are 3; got 4"):
        build(dilated_stages=4)


@pytest.mark.parametrize(("height", "width", "size"), [(7, 4, 6), pytest.param(5, 9, 3, marks=pytest.mark.slow)])
def test_adaptive_pooling_by_cells(height, width, size, rng, assert_close):
    x = rng.normal(size=(2, height, width, 3)).astype(np.float32)
    expected = np.zeros((2, size, size, 3), np.float32)
    for i in range(size):
        for j in range(size):
            rows = slice(i * height // size, -(-(i + 1) * height // size))
            columns = slice(j * width // size, -(-(j + 1) * width // size))
            expected[:, i, j] = x[:, rows, columns].mean((1, 2))
    assert_close(adaptive_average_pool(jnp.asarray(x), size), expected, 1e-6)


def test_adaptive_pooling_needs_a_size():
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        adaptive_average_pool(jnp.ones((1, 2, 2, 1)), 0)


class EveryEighth(eqx.Module):
    """A backbone of one map, without parameters."""

    channels: tuple[int, ...] = eqx.field(static=True, default=(3,))
    strides: tuple[int, ...] = eqx.field(static=True, default=(8,))
    in_channels: int = eqx.field(static=True, default=3)

    def __call__(self, images, state, *, train=False, key=None):
        assert not any(side % 8 for side in images.shape[1:3])
        return (images[:, 4::8, 4::8],), state

    def intermediates(self, images, state, layers):
        return self(images, state)[0]


class TwoLogits(eqx.Module):
    def __call__(self, features, state, *, train=False, key=None):
        return features[0][..., :2], state

    def reset(self, num_classes, *, key):
        return self


def test_filled_up_images_and_logits_cut_off(rng):
    """Steps of 8 pixels in images of 13x20: as in 16x24 with zeros."""
    model, state = Segmenter(EveryEighth(), None, TwoLogits(), multiple=8), eqx.nn.State({})
    images = jnp.asarray(rng.normal(size=(2, 13, 20, 3)), jnp.float32)
    whole = filled_up(images, 8)
    np.testing.assert_array_equal(whole, np.pad(images, ((0, 0), (0, 3), (0, 4), (0, 0))))
    logits, expected = model(images, state)[0], model(whole, state)[0]
    assert (logits.shape, expected.shape) == ((2, 13, 20, 2), (2, 16, 24, 2))
    np.testing.assert_array_equal(logits, expected[:, :13, :20])
    padded = PaddedImages(images, jnp.asarray([[13, 20], [9, 9]]))
    np.testing.assert_array_equal(model(padded, state)[0], logits)
    assert jax.tree.leaves(model.intermediates(padded, state, (0,)))[0].shape == (2, 2, 3, 3)


def test_logits_are_resized_as_torch_resizes():
    """Without aligned corners: the outer quarter of a doubled row repeats its border."""
    logits = jnp.asarray([0.0, 4.0], jnp.bfloat16).reshape(1, 1, 2, 1)
    resized = resized_logits(logits, (1, 4))
    assert resized.dtype == jnp.float32
    np.testing.assert_allclose(resized[0, 0, :, 0], [0, 1, 3, 4])


@pytest.mark.parametrize(("name", "heads"), [("fcn", 2), ("mask", 1)])
def test_auxiliary_logits_stand_behind_the_others(toys, name, heads, rng):
    model, state = jax.eval_shape(functools.partial(made, toys[name]))
    outputs = jax.eval_shape(lambda m, s, x: m.with_auxiliary(x, s)[0], model, state, images_of(24, 30))
    assert [each.shape for each in outputs] == [(1, 24, 30, 3)] * heads
    assert isinstance(model.head, SegmentationHead)


SLOWER = [pytest.param(name, marks=pytest.mark.slow) for name in ("setr", "fcn", "plus", "upernet")]


@pytest.mark.parametrize("name", ["linear", "mask", *SLOWER])
def test_a_new_head_for_other_classes(toys, name, key):
    model, state = jax.eval_shape(functools.partial(made, toys[name]))
    assert isinstance(model, Segmenter)
    fresh = eqx.tree_at(lambda m: m.head, model, eqx.filter_eval_shape(model.head.reset, 5, key=key))
    assert logits_of(fresh, state, images_of(24, 30)).shape == (1, 24, 30, 5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear", "mask", "setr", "fcn", "plus", "upernet"])
def test_gradients_reach_every_parameter(toys, name, rng):
    model, state = made(toys[name])
    model = jax.tree.map(lambda x: x + 0.05, model)  # the last norm of a residual block starts at zero
    images = jnp.asarray(rng.normal(size=(2, 48, 56, 3)), jnp.float32)
    target = jnp.asarray(rng.normal(size=(2, 48, 56, 3)), jnp.float32)

    @jax.jit
    def gradient(model, state):
        def loss(model):
            outputs, new = model.with_auxiliary(images, state, train=True, key=jax.random.key(1))
            return sum(jnp.mean(jnp.square(logits - target)) for logits in outputs), new

        return jax.grad(loss, has_aux=True)(model)

    gradients, new = gradient(model, state)
    for path, leaf in jax.tree.leaves_with_path(gradients):
        assert np.all(np.isfinite(leaf)), path
        assert np.any(np.asarray(leaf) != 0) or "key" in jax.tree_util.keystr(path), path
    moved = [not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True)]
    assert all(moved)


@pytest.mark.slow
def test_padding_of_a_map_of_one_class_has_finite_gradients():
    """Projected patches of length zero."""
    from eqvision.heads.mask_transformer import _unit

    assert np.all(np.isfinite(jax.grad(lambda x: jnp.sum(_unit(x)))(jnp.zeros((2, 3)))))


def test_unknown_decoders_are_refused(unchecked):
    with pytest.raises(ValueError, match=r"decoder 'masks' is unknown; choose from \('linear', 'mask'\)"):
        vit_segmenter("ti", 16, decoder="masks", key=KEY)  # pyright: ignore[reportArgumentType]


def test_commands_for_classifiers_refuse_segmenters():
    with pytest.raises(ValueError, match="model 'unet' is a segmenter, and this takes image classifiers"):
        eqvision.zoo.require_classifier("unet")
