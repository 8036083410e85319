"""Deformable convolution against a plain float64 loop, ordinary convolution, torch, and offsets by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvision.layers import Conv, DeformConv
from eqvision.ops import deform_conv

apply = jax.jit(deform_conv, static_argnames=("stride", "padding", "dilation", "block_size", "remat"))
WIDE = {"stride": 1, "padding": 1, "dilation": 1}
STRIDED = {"stride": 2, "padding": 2, "dilation": 2}


def convolved_size(size, kernel, *, stride, padding, dilation):
    return [(n + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for n, k in zip(size, kernel, strict=True)]


def random_case(rng, options, *, groups=2, kernel=(3, 3), size=(5, 6), channels=(4, 3), spread=2.0):
    """Float64: map, offsets, mask and weight; some points lie outside."""
    x = rng.normal(size=(2, *size, channels[0]))
    out = (2, *convolved_size(size, kernel, **options), groups, kernel[0] * kernel[1])
    offsets = rng.normal(size=(*out, 2)) * spread
    return x, offsets, rng.uniform(size=out), rng.normal(size=(*kernel, *channels))


def to_jax(case):
    return tuple(jnp.asarray(x, jnp.float32) for x in case)


def by_loops(x, offsets, mask, weight, *, stride, padding, dilation):
    """The definition, one point after the other."""
    result = np.zeros((*mask.shape[:3], weight.shape[-1]))
    part = x.shape[-1] // mask.shape[3]
    for n, i, j, g, k in np.ndindex(*mask.shape):
        row, column = divmod(k, weight.shape[1])
        y = i * stride - padding + row * dilation + offsets[n, i, j, g, k, 0]
        at = j * stride - padding + column * dilation + offsets[n, i, j, g, k, 1]
        own = slice(g * part, (g + 1) * part)
        result[n, i, j] += mask[n, i, j, g, k] * bilinear(x[n, :, :, own], y, at) @ weight[row, column, own]
    return result


def bilinear(cells, y, x):
    total = np.zeros(cells.shape[-1])
    for row, column in np.ndindex(*cells.shape[:2]):
        total += max(0.0, 1 - abs(y - row)) * max(0.0, 1 - abs(x - column)) * cells[row, column]
    return total


# At once; in blocks of three output cells of each image, the last of which is short.
@pytest.mark.parametrize(
    ("options", "block_size"),
    [(STRIDED, 8), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((STRIDED, None), (WIDE, 8)))],
)
def test_equals_the_definition(rng, assert_close, options, block_size):
    case = random_case(rng, options)
    assert_close(apply(*to_jax(case), block_size=block_size, **options), by_loops(*case, **options), 2e-6)


def test_without_offsets_it_is_a_convolution(rng, assert_close):
    """A window of 3 x 1, stride 2 and padding 1."""
    options = {"stride": 2, "padding": 1, "dilation": 1}
    x, offsets, mask, weight = to_jax(random_case(rng, options, groups=1, kernel=(3, 1)))
    expected = jax.lax.conv_general_dilated(
        x, weight, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert_close(apply(x, offsets * 0, mask * 0 + 1, weight, **options), expected, 2e-6)


def test_offsets_are_y_then_x():
    """A window of one cell moves the map: down by one reads the row below, by half between both."""
    x = jnp.arange(12, dtype=jnp.float32).reshape(1, 3, 4, 1)
    mask, weight = jnp.ones((1, 3, 4, 1, 1)), jnp.ones((1, 1, 1, 1))
    offset = jnp.broadcast_to(jnp.asarray([1.0, 0.0]), (1, 3, 4, 1, 1, 2))
    expected = [[4, 5, 6, 7], [8, 9, 10, 11], [0, 0, 0, 0]]
    np.testing.assert_allclose(apply(x, offset, mask, weight)[0, :, :, 0], expected, atol=1e-5)
    offset = jnp.broadcast_to(jnp.asarray([0.0, -0.5]), (1, 3, 4, 1, 1, 2))
    expected = [[0, 0.5, 1.5, 2.5], [2, 4.5, 5.5, 6.5], [4, 8.5, 9.5, 10.5]]
    np.testing.assert_allclose(apply(x, offset, mask, weight)[0, :, :, 0], expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("block_size", "remat"), [(8, True), (None, True), (8, False)])
def test_gradients_are_the_differences(rng, assert_close, block_size, remat):
    case = random_case(rng, WIDE)
    towards = rng.normal(size=(2, 5, 6, 3))

    def dot(*case):
        return jnp.sum(deform_conv(*case, block_size=block_size, remat=remat, **WIDE) * towards)

    gradients = jax.jit(jax.grad(dot, argnums=(0, 1, 2, 3)))(*to_jax(case))
    for number in range(4):
        direction = rng.normal(size=case[number].shape)
        sides = []
        for sign in (1e-6, -1e-6):
            moved = [x + sign * direction if i == number else x for i, x in enumerate(case)]
            sides.append(np.sum(by_loops(*moved, **WIDE) * towards))
        assert_close(np.sum(np.asarray(gradients[number], np.float64) * direction), (sides[0] - sides[1]) / 2e-6, 1e-5)


@pytest.mark.slow
def test_blocks_bound_the_memory_of_the_gradient():
    """CenterNet's last deformable layer at 512 x 512 pixels reads 9 x 64 channels in each of 128 x 128 cells."""
    shapes = [(1, 128, 128, 64), (1, 128, 128, 1, 9, 2), (1, 128, 128, 1, 9), (3, 3, 64, 64)]
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def temporaries(block_size):
        def total(*inputs):
            return jnp.sum(deform_conv(*inputs, padding=1, block_size=block_size) ** 2)

        compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3))).lower(*inputs).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(2048) < 0.35 * temporaries(None)


class TestLayer:
    def test_the_offset_convolution_starts_at_zero(self, key):
        layer = DeformConv(4, 6, groups=2, key=key)
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(layer.conv_offset_mask))
        assert layer.conv_offset_mask.weight.shape == (3, 3, 4, 54)
        assert 0.1 < np.max(np.abs(layer.weight)) <= 1 / 6

    @pytest.mark.slow
    def test_fresh_it_is_half_a_convolution(self, key, rng, assert_close):
        layer = DeformConv(4, 6, dilation=2, groups=2, key=key)
        x = jnp.asarray(rng.normal(size=(1, 7, 8, 4)), jnp.float32)
        conv = Conv(4, 6, 3, padding=2, dilation=2, init=lambda key, shape: 0.5 * layer.weight, key=key)
        assert_close(jax.jit(DeformConv.__call__)(layer, x), conv(x), 2e-6)

    def test_channels_of_the_offset_convolution(self, key, rng, assert_close):
        """Of 3 * groups * 9 channels the first two thirds are (y, x) of each group and point, the last third masks."""
        layer = DeformConv(4, 3, groups=2, stride=2, key=key)
        layer = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), layer)
        x = jnp.asarray(rng.normal(size=(2, 5, 6, 4)), jnp.float32)
        channels = np.asarray(layer.conv_offset_mask(x), np.float64)
        offsets = np.stack([channels[..., 0:36:2], channels[..., 1:36:2]], axis=-1).reshape(2, 3, 3, 2, 9, 2)
        mask = 1 / (1 + np.exp(-channels[..., 36:])).reshape(2, 3, 3, 2, 9)
        expected = by_loops(np.asarray(x), offsets, mask, np.asarray(layer.weight), stride=2, padding=1, dilation=1)
        assert_close(jax.jit(DeformConv.__call__)(layer, x), expected + np.asarray(layer.bias), 1e-5)

    def test_bfloat16(self, key):
        x = jnp.ones((1, 4, 4, 4), jnp.bfloat16)
        assert jax.eval_shape(DeformConv(4, 6, key=key), x).dtype == jnp.bfloat16

    def test_groups_must_fit(self, key):
        with pytest.raises(ValueError, match="DeformConv: 5 channels cannot be split into 2 groups"):
            DeformConv(5, 4, groups=2, key=key)


def test_errors_say_what_does_not_fit(rng, unchecked):
    x, offsets, mask, weight = to_jax(random_case(rng, WIDE))
    with pytest.raises(ValueError, match=r"expected \(2, 3, 3, 2, 9, 2\) and \(2, 3, 3, 2, 9\)"):
        deform_conv(x, offsets, mask, weight, stride=2, padding=1)
    with pytest.raises(ValueError, match=r"stride 0, dilation 1 and block_size 4096 must be at least 1"):
        deform_conv(x, offsets, mask, weight, stride=0)
    with pytest.raises(ValueError, match=r"a weight \(3, 3, 4, 3\) and 2 groups do not fit a map of 3 channels"):
        deform_conv(x[..., :3], offsets, mask, weight, padding=1)


@pytest.mark.parity
def test_torch_grid_sample_and_product(rng, assert_close):
    """Each point's samples by torch, and the sum over points of mask times their product with the weight."""
    torch = pytest.importorskip("torch")
    case = random_case(rng, STRIDED, groups=1, size=(9, 11), spread=3.0)
    x, offsets, mask, weight = case
    maps, total = torch.tensor(x).permute(0, 3, 1, 2), 0.0
    for point, (row, column) in enumerate(np.ndindex(3, 3)):
        starts = np.stack(np.mgrid[: mask.shape[1], : mask.shape[2]], axis=-1) * 2 - 2
        places = starts + np.array([row, column]) * 2 + offsets[:, :, :, 0, point]
        grid = torch.tensor((places[..., ::-1] + 0.5) / [11, 9] * 2 - 1)
        samples = torch.nn.functional.grid_sample(maps, grid, align_corners=False).permute(0, 2, 3, 1).numpy()
        total = total + mask[:, :, :, 0, point, None] * samples @ weight[row, column]
    assert_close(apply(*to_jax(case), **STRIDED), total, 2e-6)
