"""DLA-34 and its upsampling: published counts, shapes, which maps are joined, what is refused, and timm's numbers."""

import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvision.backbones import DLA, DLASize, dla, resnet
from eqvision.backbones.dla import Leaf, Tree
from eqvision.layers import bilinear_upsampling
from eqvision.necks import DeconvUp, DLAUp

KEY = jax.random.key(0)
SIZE = DLASize((1, 2, 1, 3, 2, 1), (4, 6, 8, 12, 16, 20))
CHANNELS, STRIDES = (16, 32, 64, 128, 256, 512), (1, 2, 4, 8, 16, 32)


def abstract(build):
    """Model and state as shapes."""
    return eqx.filter_eval_shape(eqx.nn.make_with_state(build))


def parameters(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def positive_like(tree, rng):
    """Positive numbers everywhere, so that no ReLU closes."""
    return jax.tree.map(lambda x: jnp.asarray(rng.uniform(0.1, 0.5, x.shape), jnp.float32), tree)


def test_parameter_counts():
    """timm's dla34 has 15,742,104 with the 513,000 of its classifier; the upsampling as in CenterNet's own code."""
    assert parameters(abstract(lambda: dla("34", key=KEY))[0]) == 15_742_104 - 513_000
    plain, deformable = (
        abstract(lambda each=each: DLAUp(CHANNELS, STRIDES, conv=each, key=KEY))[0] for each in ("plain", "deformable")
    )
    blocks = [(512, 256), (256, 256)] + [(256, 128), (128, 128)] * 2 + [(128, 64), (64, 64)] * 3
    blocks += [(128, 64), (64, 64), (256, 64), (64, 64)]
    ups = 256 * 16 + 2 * 128 * 16 + 3 * 64 * 16 + 64 * 16 + 64 * 64
    assert parameters(plain) == ups + sum(9 * i * o + 2 * o for i, o in blocks)
    assert parameters(deformable) == parameters(plain) + sum(9 * i * 27 + 27 + o for i, o in blocks)


def test_shapes():
    side = (64, 160)
    model, state = abstract(lambda: dla("34", key=KEY))
    neck, neck_state = abstract(lambda: DLAUp(model.channels, model.strides, conv="plain", key=KEY))
    images = jax.ShapeDtypeStruct((2, *side, 3), jnp.float32)
    features, _ = eqx.filter_eval_shape(model, images, state)
    assert (model.channels, model.strides) == (CHANNELS, STRIDES)
    assert [x.shape for x in features] == [
        (2, side[0] // s, side[1] // s, c) for c, s in zip(CHANNELS, STRIDES, strict=True)
    ]
    (joined,), _ = eqx.filter_eval_shape(neck, features, neck_state)
    assert joined.shape == (2, side[0] // 4, side[1] // 4, 64)
    assert (neck.channels, neck.strides) == ((64,), (4,))


def test_roots_read_all_subtrees():
    tree = abstract(lambda: DLA(SIZE, key=KEY))[0].trees[1]  # three levels, 8 -> 12 channels
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Leaf))
    widths = [leaf.root.conv.weight.shape[2] for leaf in leaves]
    assert isinstance(tree, Tree)
    # The last reads its blocks, the first subtree of its own tree, that of the whole tree and the pooled input.
    assert widths == [24, 24 + 12, 24, 24 + 12 + 12 + 8]
    assert [leaf.projection is not None for leaf in leaves] == [True, False, False, False]


@pytest.mark.slow
def test_every_map_reaches_the_joined_one():
    channels, strides = (4, 8, 8, 12), (4, 8, 16, 32)
    neck, state = abstract(lambda: DLAUp(channels, strides, first_level=0, conv="plain", norm="frozen", key=KEY))
    neck = positive_like(neck, np.random.default_rng(0))
    maps = tuple(jnp.ones((1, 32 // s, 32 // s, c)) for c, s in zip(channels, strides, strict=True))
    gradients = jax.jit(jax.grad(lambda maps: jnp.sum(neck(maps, state)[0][0] ** 2)))(maps)
    assert all(np.abs(each).max() > 0 for each in gradients)


def test_bilinear_upsampling():
    kernel = bilinear_upsampling(KEY, (4, 4, 1, 3))
    ramp = np.array([0.25, 0.75, 0.75, 0.25])
    assert np.array_equal(kernel[:, :, 0, 2], np.outer(ramp, ramp))
    # Wherever windows overlap, what is put down adds up to one.
    for factor in (2, 4, 8):
        wide = np.asarray(bilinear_upsampling(KEY, (2 * factor, 2 * factor, 1, 1)))[:, :, 0, 0]
        assert np.allclose(wide.reshape(2, factor, 2, factor).sum(axis=(0, 2)), 1)


def test_deconv_up():
    backbone = abstract(lambda: resnet(18, key=KEY))[0]
    neck, state = abstract(lambda: DeconvUp(backbone.channels, backbone.strides, key=KEY))
    assert (neck.channels, neck.strides) == ((64,), (4,))
    maps = tuple(
        jax.ShapeDtypeStruct((1, 64 // s, 96 // s, c), jnp.float32)
        for c, s in zip(backbone.channels, backbone.strides, strict=True)
    )
    (joined,), _ = eqx.filter_eval_shape(neck, maps, state)
    assert joined.shape == (1, 16, 24, 64)
    pairs = list(itertools.pairwise((512, 256, 128, 64)))
    convs = sum(9 * i * o + o + 27 * (9 * i + 1) + 2 * o for i, o in pairs)
    assert parameters(neck) == convs + sum(16 * o * o + 2 * o for _, o in pairs)


# What is refused


def test_refused():
    model, state = abstract(lambda: DLA(SIZE, key=KEY))
    with pytest.raises(ValueError, match=r"images of 48x64 cannot be cut into steps of 32x32 pixels.*32x64|64x64"):
        eqx.filter_eval_shape(model, jax.ShapeDtypeStruct((1, 48, 64, 3), jnp.float32), state)
    with pytest.raises(ValueError, match="DLA size '60' does not exist; choose from 34"):
        dla("60", key=KEY)
    with pytest.raises(ValueError, match="joins two maps or more, and from first_level 5 there is one"):
        DLAUp(CHANNELS, STRIDES, first_level=5, key=KEY)
    with pytest.raises(ValueError, match=r"twice the stride of the one before, got strides \(4, 8, 8\)"):
        DLAUp((1, 2, 3), (4, 8, 8), first_level=0, key=KEY)
    with pytest.raises(ValueError, match="a map of stride 4 cannot be doubled 3 times"):
        DeconvUp((8,), (4,), key=KEY)


@pytest.mark.usefixtures("unchecked")
def test_refused_names():
    with pytest.raises(ValueError, match="conv 'dcn' is unknown; choose from"):
        DLAUp(CHANNELS, STRIDES, conv="dcn", key=KEY)
    with pytest.raises(ValueError, match="norm 'group' is unknown; choose from"):
        DeconvUp(CHANNELS, STRIDES, norm="group", key=KEY)


# timm


def values(state, prefix, model):
    """Values of a tree or leaf of ours, in the order of its leaves, by timm's names."""

    def conv(name, norm):
        yield state[f"{name}.weight"].transpose(2, 3, 1, 0)
        yield from (state[f"{norm}.{each}"] for each in ("weight", "bias", "running_mean", "running_var"))

    if isinstance(model, Tree):
        yield from values(state, f"{prefix}.tree1", model.tree1)
        yield from values(state, f"{prefix}.tree2", model.tree2)
        return
    for block, i in itertools.product(("tree1", "tree2"), (1, 2)):
        yield from conv(f"{prefix}.{block}.conv{i}", f"{prefix}.{block}.bn{i}")
    yield from conv(f"{prefix}.root.conv", f"{prefix}.root.bn")
    if model.projection is not None:
        yield from conv(f"{prefix}.project.0", f"{prefix}.project.1")


@pytest.mark.parity
def test_equal_to_timm(assert_close):
    import torch
    from timm.models.dla import DLA as TimmDLA
    from timm.models.dla import DlaBasic

    theirs = TimmDLA(SIZE.levels, SIZE.channels, block=DlaBasic, num_classes=0).eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, value in theirs.state_dict().items():
            if value.ndim:
                low = 0.5 if name.endswith(("running_var", "bn.weight")) else -0.5
                value.copy_(torch.tensor(rng.uniform(low, low + 1, value.shape)))
    state = {name: value.numpy() for name, value in theirs.state_dict().items()}
    model, _ = abstract(lambda: DLA(SIZE, norm="frozen", key=KEY))

    def norm(name):
        return [state[f"{name}.{each}"] for each in ("weight", "bias", "running_mean", "running_var")]

    leaves = []
    for stage, count in (("base_layer", 1), ("level0", 1), ("level1", 2)):
        for i in range(count):
            leaves += [state[f"{stage}.{3 * i}.weight"].transpose(2, 3, 1, 0), *norm(f"{stage}.{3 * i + 1}")]
    for i, tree in enumerate(model.trees):
        leaves += values(state, f"level{i + 2}", tree)
    model = jax.tree.unflatten(jax.tree.structure(model), [jnp.asarray(each) for each in leaves])
    images = rng.normal(size=(2, 64, 96, 3)).astype(np.float32)
    with torch.no_grad():
        x, expected = theirs.base_layer(torch.tensor(images).permute(0, 3, 1, 2)), []
        for i in range(6):
            x = getattr(theirs, f"level{i}")(x)
            expected.append(x.permute(0, 2, 3, 1).numpy())
    maps, _ = jax.jit(functools.partial(model, state=eqx.nn.State(())))(images)
    assert_close(list(maps), expected, 1e-5)
