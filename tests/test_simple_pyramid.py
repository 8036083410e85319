"""ViTDet's pyramid: shapes and counts, transposed convolutions, what is refused, and the same written with torch."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvision.layers import ConvTranspose
from eqvision.necks import SimplePyramid

KEY = jax.random.key(0)


def abstract(channels=(8,), strides=(16,), width=6, **options):
    def build():
        return SimplePyramid(channels, strides, width, **options, key=KEY)

    return eqx.filter_eval_shape(eqx.nn.make_with_state(build))


def noise(tree):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), tree)


def plain_transpose(x, weight, stride, padding):
    """What each cell puts down, one after the other."""
    (b, h, w, _), (k, _, _, o) = x.shape, weight.shape
    out = np.zeros((b, (h - 1) * stride + k, (w - 1) * stride + k, o))
    for i, j in np.ndindex(h, w):
        out[:, i * stride : i * stride + k, j * stride : j * stride + k] += np.einsum(
            "bi,hwio->bhwo", x[:, i, j], weight
        )
    return out[:, padding : out.shape[1] - padding, padding : out.shape[2] - padding]


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(2, 2, 0), (4, 2, 1), (3, 2, 0), (3, 1, 1)])
def test_transposed_convolution(assert_close, kernel, stride, padding):
    layer = noise(eqx.filter_eval_shape(lambda: ConvTranspose(3, 4, kernel, stride=stride, padding=padding, key=KEY)))
    x = np.random.default_rng(1).normal(size=(2, 3, 4, 3)).astype(np.float32)
    expected = plain_transpose(x, np.asarray(layer.weight), stride, padding) + np.asarray(layer.bias)
    assert_close(layer(jnp.asarray(x)), expected, 1e-5)


def test_transposed_convolution_in_groups(assert_close):
    layer = noise(eqx.filter_eval_shape(lambda: ConvTranspose(4, 6, 4, stride=2, padding=1, groups=2, key=KEY)))
    x = np.random.default_rng(1).normal(size=(2, 3, 4, 4)).astype(np.float32)
    weight = np.asarray(layer.weight)
    halves = [plain_transpose(x[..., 2 * g : 2 * g + 2], weight[..., 3 * g : 3 * g + 3], 2, 1) for g in range(2)]
    assert_close(layer(jnp.asarray(x)), np.concatenate(halves, axis=-1) + np.asarray(layer.bias), 1e-5)


def test_transposed_convolution_refused():
    with pytest.raises(ValueError, match="3 -> 4 channels cannot be split into 2 groups"):
        ConvTranspose(3, 4, 2, stride=2, groups=2, key=KEY)
    with pytest.raises(ValueError, match="padding 2 must be at least 0 and below the window 2"):
        ConvTranspose(3, 4, 2, stride=2, padding=2, key=KEY)


def test_levels():
    grid = (5, 4)
    neck, state = abstract()
    maps, _ = eqx.filter_eval_shape(neck, (jnp.zeros((2, *grid, 8)),), state)
    h, w = grid
    half = (h // 2, w // 2)
    assert [x.shape[1:3] for x in maps] == [
        (4 * h, 4 * w),
        (2 * h, 2 * w),
        grid,
        half,
        (-(-half[0] // 2), -(-half[1] // 2)),
    ]
    assert (neck.channels, neck.strides) == ((6,) * 5, (4, 8, 16, 32, 64))


def test_parameter_count_of_vitdet_b():
    d, width = 768, 256
    ups = (d * d // 2 * 4 + d // 2) * 2 + 2 * (d // 2) + (d // 2) * (d // 4) * 4 + d // 4
    convs = (d // 4 + d // 2 + d + d) * width + 4 * (9 * width**2 + 4 * width)
    neck, _ = abstract((d,), (16,), width)
    assert sum(x.size for x in jax.tree.leaves(neck)) == ups + convs


def test_of_several_maps_the_last_is_read():
    neck, state = abstract((3, 8), (8, 16), out_strides=(16, 32), pool=False)
    assert neck.strides == (16, 32)
    maps, _ = eqx.filter_eval_shape(neck, (jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, 4, 4, 8))), state)
    assert [x.shape for x in maps] == [(1, 4, 4, 6), (1, 2, 2, 6)]


def test_refused():
    with pytest.raises(ValueError, match="stride 64 cannot be made from one of stride 16; possible are 4, 8, 16, 32"):
        SimplePyramid((8,), (16,), out_strides=(32, 64), key=KEY)
    with pytest.raises(ValueError, match=r"twice the stride of the one before, got strides \(4, 16\)"):
        SimplePyramid((8,), (16,), out_strides=(4, 16), key=KEY)
    with pytest.raises(ValueError, match=r"1 channels \(8,\) and 2 strides \(8, 16\) were given"):
        SimplePyramid((8,), (8, 16), key=KEY)
    neck, state = abstract()
    with pytest.raises(ValueError, match=r"built for maps of \(8,\) channels and got \(9,\)"):
        eqx.filter_eval_shape(neck, (jnp.zeros((1, 4, 4, 9)),), state)


@pytest.mark.parity
def test_equal_to_torchs_layers(assert_close):
    """The levels written with torch's own layers, from the paper's section 3 and its appendix."""
    import torch
    from torch.nn import functional as f

    neck, state = abstract()
    neck = noise(neck)
    x = np.random.default_rng(1).normal(size=(2, 5, 6, 8)).astype(np.float32)

    def tensor(leaf):
        return torch.tensor(np.asarray(leaf))

    def norm(y, layer):
        y = f.layer_norm(y.permute(0, 2, 3, 1), y.shape[1:2], tensor(layer.weight), tensor(layer.bias), 1e-6)
        return y.permute(0, 3, 1, 2)

    def up(y, layer):
        return f.conv_transpose2d(y, tensor(layer.weight).permute(2, 3, 0, 1), tensor(layer.bias), stride=2)

    def conv(y, layer):
        return f.conv2d(y, tensor(layer.conv.weight).permute(3, 2, 0, 1), padding=layer.conv.weight.shape[0] // 2)

    one = torch.tensor(x).permute(0, 3, 1, 2)
    first = neck.levels[0]
    maps = [up(f.gelu(norm(up(one, first.up[0]), first.up_norm)), first.up[1]), up(one, neck.levels[1].up[0])]
    maps = [*maps, one, f.max_pool2d(one, 2)]
    for i, level in enumerate(neck.levels):
        maps[i] = norm(conv(norm(conv(maps[i], level.reduce), level.reduce.norm), level.output), level.output.norm)
    maps.append(f.max_pool2d(maps[-1], 1, 2))
    outputs, _ = jax.jit(lambda y: neck((y,), state))(x)
    assert_close(list(outputs), [y.permute(0, 2, 3, 1).numpy() for y in maps], 1e-5)
