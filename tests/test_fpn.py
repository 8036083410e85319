"""FPN in three dialects: shapes, upsampling, extra levels, norms, what is refused, and torchvision's numbers."""

import functools
from typing import get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvision.backbones import resnet
from eqvision.layers import BatchNorm, GroupNorm, NormedConv
from eqvision.necks import FPN, Dialect, upsample_to
from eqvision.ops import resize_nearest

KEY = jax.random.key(0)
CHANNELS, STRIDES = (3, 4, 6), (8, 16, 32)
TINY = functools.partial(FPN, CHANNELS, STRIDES, 5)
quickly = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def abstract(**options):
    """Neck and state as shapes: initialisers take seconds to compile."""
    return eqx.filter_eval_shape(eqx.nn.make_with_state(lambda: TINY(**options, key=KEY)))


def noise(**options):
    neck, state = abstract(**options)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), neck), state


def maps_of(*sides, batch=2):
    rng = np.random.default_rng(1)
    return tuple(
        jnp.asarray(rng.normal(size=(batch, *side, c)), jnp.float32) for side, c in zip(sides, CHANNELS, strict=True)
    )


EVEN = ((8, 12), (4, 6), (2, 3))
ODD = ((7, 11), (4, 6), (2, 3))


def shapes(options, sides):
    neck, state = abstract(**options)
    outputs, _ = eqx.filter_eval_shape(neck, maps_of(*sides), state)
    assert neck.channels == tuple(x.shape[-1] for x in outputs)
    return neck.strides, [x.shape[1:3] for x in outputs]


@pytest.mark.parametrize(
    ("options", "strides", "sides"),
    [
        ({}, (8, 16, 32, 64), [*ODD, (1, 2)]),
        ({"extra": "none", "dialect": "mmdet"}, (8, 16, 32), [*ODD]),
        ({"extra": "p6p7_on_input"}, (8, 16, 32, 64, 128), [*ODD, (1, 2), (1, 1)]),
        ({"extra": "p6p7_on_output", "first_level": 1}, (16, 32, 64, 128), [*ODD[1:], (1, 2), (1, 1)]),
    ],
)
def test_levels(options, strides, sides):
    assert shapes(options, ODD) == (strides, sides)


def test_built_for_a_backbone():
    """ResNet-50 with torchvision's FPN: 44.40 M of Mask R-CNN less its heads; here the neck's own convolutions."""
    backbone = eqx.filter_eval_shape(eqx.nn.make_with_state(resnet), 50, key=KEY)[0]
    neck = eqx.filter_eval_shape(lambda: FPN(backbone.channels, backbone.strides, key=KEY))
    assert (neck.channels, neck.strides) == ((256,) * 5, (4, 8, 16, 32, 64))
    assert sum(x.size for x in jax.tree.leaves(neck)) == (256 + 512 + 1024 + 2048) * 256 + 4 * (9 * 256**2 + 512)


@pytest.mark.parametrize(("old", "new"), [((4, 5), (8, 10)), ((4, 5), (7, 9)), ((3, 3), (5, 8)), ((1, 2), (1, 3))])
def test_upsampling_is_torchs_nearest(old, new):
    x = jnp.arange(old[0] * old[1], dtype=jnp.float32).reshape(1, *old, 1)
    assert np.array_equal(upsample_to(x, new), resize_nearest(x, new))


def test_dialects_agree_where_maps_double(assert_close):
    maps = maps_of(*EVEN)
    ours, theirs = (
        quickly(lambda n, s: n(maps, s)[0])(*noise(dialect=each, extra="none"))
        for each in ("torchvision", "detectron2")
    )
    assert_close(list(ours), list(theirs), 1e-6)


def test_relu_between_extra_levels_but_in_mmdet():
    relu = {each: abstract(dialect=each, extra="p6p7_on_output")[0].extra.relu for each in get_args(Dialect)}
    assert relu == {"torchvision": True, "detectron2": True, "mmdet": False}


def test_norms():
    neck, _ = abstract(norm="batch", extra="p6p7_on_input")
    assert isinstance(neck.laterals[0].norm, BatchNorm)
    assert neck.laterals[0].conv.bias is None
    assert neck.extra.p6.norm is None
    assert abstract(norm="batch", extra="p6p7_on_input", dialect="mmdet")[0].extra.p6.norm is not None
    grouped = eqx.filter_eval_shape(lambda: NormedConv(3, 64, 3, norm="group", key=KEY))
    assert isinstance(grouped.norm, GroupNorm)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_training_with_norms(norm):
    neck, state = eqx.nn.make_with_state(lambda: TINY(norm=norm, key=KEY))()
    maps = maps_of(*ODD)
    outputs, new = quickly(lambda n, s: n(maps, s, train=True))(neck, state)
    assert all(bool(jnp.isfinite(x).all()) for x in outputs)
    assert bool(eqx.tree_equal(new, state)) == (norm == "layer")


# What is refused


def test_refused():
    with pytest.raises(ValueError, match=r"3 channels \(3, 4, 6\) and 2 strides \(8, 16\) were given"):
        FPN(CHANNELS, (8, 16), key=KEY)
    with pytest.raises(ValueError, match=r"twice the stride of the one before, got strides \(8, 16, 16\)"):
        FPN(CHANNELS, (8, 16, 16), key=KEY)
    with pytest.raises(ValueError, match=r"first_level 3 does not exist, the backbone has 0\.\.2"):
        TINY(first_level=3, key=KEY)
    neck, state = abstract()
    with pytest.raises(ValueError, match=r"built for maps of \(3, 4, 6\) channels and got \(4, 6\)"):
        eqx.filter_eval_shape(neck, maps_of(*EVEN)[1:], state)


def test_detectron2_wants_padded_images():
    neck, state = abstract(dialect="detectron2")
    with pytest.raises(
        ValueError, match=r"a map of 7x11 stands before one of 4x6.*pad images to a multiple of 32 pixels"
    ):
        eqx.filter_eval_shape(neck, maps_of(*ODD), state)


@pytest.mark.usefixtures("unchecked")
def test_refused_names():
    for options, message in (
        ({"dialect": "mmcv"}, "dialect 'mmcv' is unknown; choose from"),
        ({"extra": "p6"}, "extra 'p6' is unknown; choose from"),
        ({"norm": "bn"}, "norm 'bn' is unknown; choose from"),
    ):
        with pytest.raises(ValueError, match=message):
            TINY(**options, key=KEY)


# torchvision


@pytest.mark.parity
@pytest.mark.parametrize("extra", ["pool", "p6p7_on_input"])
def test_equal_to_torchvision(assert_close, extra):
    import torch
    from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7

    blocks = LastLevelMaxPool() if extra == "pool" else LastLevelP6P7(CHANNELS[-1], 5)
    theirs = FeaturePyramidNetwork(list(CHANNELS), 5, blocks)
    neck, state = noise(extra=extra)
    convs = [
        *zip(neck.laterals, theirs.inner_blocks, strict=True),
        *zip(neck.outputs, theirs.layer_blocks, strict=True),
    ]
    convs = [(ours.conv, block[0]) for ours, block in convs]
    if neck.extra is not None:
        convs += [(neck.extra.p6.conv, blocks.p6), (neck.extra.p7.conv, blocks.p7)]
    with torch.no_grad():
        for ours, conv in convs:
            conv.weight.copy_(torch.tensor(np.asarray(ours.weight)).permute(3, 2, 0, 1))
            conv.bias.copy_(torch.tensor(np.asarray(ours.bias)))
        maps = maps_of(*ODD)
        expected = theirs({str(i): torch.tensor(np.asarray(x)).permute(0, 3, 1, 2) for i, x in enumerate(maps)})
    outputs, _ = quickly(lambda n, s: n(maps, s))(neck, state)
    assert_close(list(outputs), [x.permute(0, 2, 3, 1).numpy() for x in expected.values()], 1e-5)
