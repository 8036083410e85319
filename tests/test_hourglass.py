"""Hourglass-104: its size, maps of any image, what each hourglass reads, and what is refused."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvision.backbones import HourglassSize, StackedHourglass, hourglass_104
from eqvision.backbones.hourglass import Hourglass

KEY = jax.random.key(0)
SIZE = HourglassSize((4, 6, 8), (1, 2, 1), stem=3, width=5)


@functools.cache
def abstract(build):
    """Model and state as shapes."""
    return eqx.filter_eval_shape(eqx.nn.make_with_state(build), key=KEY)


def tiny(*, stacks=2, key):
    return StackedHourglass(SIZE, stacks, norm="frozen", key=key)


def test_parameter_count():
    """What CenterNet's own code counts without its heads; two of CornerNet's hourglasses of five halvings."""
    model, _ = abstract(hourglass_104)
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == 187_700_352
    assert (model.channels, model.strides) == ((256, 256), (4, 4))


def test_depths_of_an_hourglass():
    model, _ = abstract(hourglass_104)
    depths, inner = [], model.hourglasses[0]
    while isinstance(inner, Hourglass):
        depths.append([[block.out_channels for block in blocks] for blocks in (inner.up, inner.down, inner.back)])
        inner = inner.inner
    assert [block.out_channels for block in inner] == [512] * 4
    assert depths[0] == [[256, 256], [256, 256], [256, 256]]
    assert depths[1] == [[256, 256], [384, 384], [384, 256]]
    assert depths[4] == [[384, 384], [512, 512], [512, 384]]


@pytest.mark.parametrize(
    ("side", "map_side"), [pytest.param((64, 32), (16, 8), marks=pytest.mark.slow), ((50, 75), (13, 19))]
)
def test_images_of_any_size(side, map_side):
    model, state = abstract(tiny)
    images = jax.ShapeDtypeStruct((2, *side, 3), jnp.float32)
    maps, _ = eqx.filter_eval_shape(model, images, state)
    assert [x.shape for x in maps] == [(2, *map_side, 5)] * 2


def test_intermediates():
    model, state = abstract(tiny)
    images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    with pytest.raises(ValueError, match=r"layer 2 does not exist, the backbone has layers 0\.\.1"):
        eqx.filter_eval_shape(lambda m, x, s: m.intermediates(x, s, (2,)), model, images, state)


@pytest.mark.slow
def test_the_second_hourglass_reads_the_first():
    model, state = abstract(tiny)
    rng = np.random.default_rng(0)
    # Positive numbers everywhere, so that no ReLU closes.
    model = jax.tree.map(lambda x: jnp.asarray(rng.uniform(0.1, 0.3, x.shape), jnp.float32), model)
    images = jnp.ones((1, 20, 28, 3))

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def gradients(model):
        return [jax.grad(lambda m, i=i: jnp.sum(m(images, state)[0][i]))(model) for i in range(2)]

    first, second = gradients(model)

    def reached(tree):
        return all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(weights(tree)))

    def weights(tree):
        return [x for x in jax.tree.leaves(tree) if x.ndim == 4]

    assert reached(first.hourglasses[0])
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((first.hourglasses[1], first.links, first.outputs[1])))
    assert reached(second)


def test_refused():
    with pytest.raises(ValueError, match=r"channels \(4, 6\) and blocks \(1,\)"):
        StackedHourglass(HourglassSize((4, 6), (1,)), key=KEY)
    with pytest.raises(ValueError, match="stacks 0 is no number of hourglasses"):
        StackedHourglass(SIZE, 0, key=KEY)
