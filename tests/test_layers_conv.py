"""Convolutions, pooling and patches: equal to PyTorch, TensorFlow's padding and plain formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import draw, from_torch, shaken, to_torch
from jax import lax

from eqvision.layers import (
    Conv,
    PatchEmbed,
    PatchEmbed3D,
    StandardizedConv,
    average_pool,
    convolve,
    max_pool,
)

# --- convolution and pooling ----------------------------------------------------------------------------------------

CONVOLUTIONS = {
    "3x3": (3, {"padding": 1}),
    "3x3 stride 2": (3, {"padding": 1, "stride": 2}),
    "7x7 stride 2": (7, {"padding": 3, "stride": 2}),
    "valid": (3, {"padding": "VALID"}),
    "two groups": (3, {"padding": 1, "groups": 2}),
    "depthwise": (5, {"padding": 2, "groups": 8, "stride": 2}),
    "dilated": (3, {"padding": 2, "dilation": 2}),
    "dilated groups with stride": (3, {"padding": 3, "dilation": 3, "groups": 4, "stride": 2}),
    "explicit": (3, {"padding": ((1, 2), (0, 3)), "stride": 2}),
    "1x1": (1, {}),
    "1x1 stride 2": (1, {"padding": 0, "stride": 2}),
    "1x1 groups": (1, {"padding": 0, "groups": 4}),
    "1x1 padded": (1, {"padding": 1, "stride": 2}),
}


def torch_convolve(x, weight, bias=None, *, padding=0, **options):
    """torch's conv2d for our layouts, with explicit padding (top, bottom), (left, right)."""
    import torch

    if isinstance(padding, str):
        padding = 0
    if isinstance(padding, int):
        padding = ((padding, padding), (padding, padding))
    padded = torch.nn.functional.pad(to_torch(x), (*padding[1], *padding[0]))
    kernel = torch.from_numpy(np.array(weight).transpose(3, 2, 0, 1).copy())
    bias = None if bias is None else torch.from_numpy(np.array(bias))
    return from_torch(torch.nn.functional.conv2d(padded, kernel, bias, **options))


@pytest.mark.parity
@pytest.mark.parametrize("name", list(CONVOLUTIONS))
def test_convolution_equals_torch(assert_close, key, name):
    size, options = CONVOLUTIONS[name]
    layer = shaken(Conv(8, 16, size, use_bias=True, key=key, **options))
    x = draw(2, 11, 10, 8)
    assert_close(layer(jnp.asarray(x)), torch_convolve(x, layer.weight, layer.bias, **options), 1e-6)


def same_padding(length, size, stride, dilation):
    """TensorFlow's rule: enough that the output has ceil(length / stride), the odd one at the end."""
    total = max((math.ceil(length / stride) - 1) * stride + (size - 1) * dilation + 1 - length, 0)
    return total // 2, total - total // 2


SAME = [(3, 2, 1), (4, 1, 1), (7, 2, 1), (3, 3, 1), (3, 2, 2), (1, 2, 1)]


@pytest.mark.parity
@pytest.mark.parametrize(("size", "stride", "dilation"), SAME)
def test_same_padding_is_that_of_tensorflow(assert_close, key, size, stride, dilation):
    layer = Conv(3, 4, size, stride=stride, dilation=dilation, key=key)
    x = draw(2, 9, 8, 3)
    padding = tuple(same_padding(length, size, stride, dilation) for length in (9, 8))
    y = layer(jnp.asarray(x))
    assert y.shape == (2, math.ceil(9 / stride), math.ceil(8 / stride), 4)
    assert_close(y, torch_convolve(x, layer.weight, padding=padding, stride=stride, dilation=dilation), 1e-6)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", ["SAME", "VALID", 0, ((0, 0), (0, 0))])
def test_1x1_convolution_as_matrix_product_equals_xla(assert_close, stride, padding):
    """Output and gradients; sizes that the stride does not divide."""
    x, weight = jnp.asarray(draw(2, 7, 8, 5)), jnp.asarray(draw(1, 1, 5, 6, seed=1))
    explicit = ((0, 0), (0, 0)) if padding == 0 else padding

    def plain(x, weight):
        return lax.conv_general_dilated(
            x, weight, (stride, stride), explicit, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def ours(x, weight):
        return convolve(x, weight, stride=stride, padding=padding)

    cotangent = jnp.asarray(draw(*plain(x, weight).shape, seed=2))

    def both(function):
        y, pullback = jax.vjp(function, x, weight)
        return y, pullback(cotangent)

    assert_close(both(ours), both(plain), 1e-6)
    assert "dot_general" in str(jax.make_jaxpr(ours)(x, weight))


@pytest.mark.parity
@pytest.mark.parametrize(("stride", "padding", "groups"), [(1, 1, 1), (2, ((0, 1), (0, 1)), 2)])
@pytest.mark.parametrize("eps", [1e-10, 1e-5])
def test_standardized_convolution_equals_torch(assert_close, key, eps, stride, padding, groups):
    options = {"stride": stride, "padding": padding, "groups": groups}
    layer = shaken(StandardizedConv(6, 8, 3, use_bias=True, eps=eps, key=key, **options), scale=0.5)
    weight = np.asarray(layer.weight, np.float64).reshape(-1, 8)
    weight = (weight - weight.mean(axis=0)) / np.sqrt(weight.var(axis=0) + eps)
    x = draw(2, 8, 8, 6)
    weight = weight.reshape(layer.weight.shape)
    expected = torch_convolve(x.astype(np.float64), weight, np.float64(layer.bias), **options)
    assert_close(layer(jnp.asarray(x)), expected, 1e-6)


@pytest.mark.parity
@pytest.mark.parametrize(("window", "stride", "padding"), [(2, 2, 0), (3, 2, 1), (3, 1, 1)])
def test_pooling_equals_torch(assert_close, window, stride, padding):
    import torch

    x = draw(2, 9, 8, 3) - 10.0  # negative, so that padding with zeros would win
    y = max_pool(jnp.asarray(x), window, stride=stride, padding=padding)
    assert_close(y, from_torch(torch.nn.functional.max_pool2d(to_torch(x), window, stride, padding)), 0.0)
    y = average_pool(jnp.asarray(x), window, stride=stride)
    assert_close(y, from_torch(torch.nn.functional.avg_pool2d(to_torch(x), window, stride)), 1e-6)


@pytest.mark.parametrize("padding", ["SAME", ((0, 1), (1, 0))])
def test_max_pool_keeps_the_type_and_padding_never_wins(padding):
    y = max_pool(jnp.full((1, 4, 4, 1), -3.0, jnp.bfloat16), 3, stride=2, padding=padding)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y.astype(np.float32), -3.0)


@pytest.mark.parametrize(("channels", "groups"), [((6, 8), 4), ((8, 6), 4)])
def test_convolution_refuses_groups_of_unequal_size(key, channels, groups):
    with pytest.raises(ValueError, match=f"{channels[0]} -> {channels[1]} channels cannot be split into 4 groups"):
        Conv(*channels, 3, groups=groups, key=key)
    with pytest.raises(ValueError, match=f"{channels[0]} -> {channels[1]} channels cannot be split into 4 groups"):
        StandardizedConv(*channels, 3, groups=groups, key=key)


# --- patches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch_size", [4, (2, 3)])
def test_patch_embed_equals_a_strided_convolution(assert_close, key, patch_size):
    layer, x = shaken(PatchEmbed(3, 7, patch_size, key=key)), jnp.asarray(draw(2, 8, 12, 3))
    dimensions = ("NHWC", "HWIO", "NHWC")
    expected = lax.conv_general_dilated(x, layer.weight, layer.patch_size, "VALID", dimension_numbers=dimensions)
    assert_close(layer(x), expected + layer.bias, 1e-6)


def test_patch_embed_3d_equals_a_strided_convolution(assert_close, key):
    layer, x = shaken(PatchEmbed3D(3, 7, (2, 4, 3), key=key)), jnp.asarray(draw(2, 4, 8, 6, 3))
    dimensions = ("NTHWC", "THWIO", "NTHWC")
    expected = lax.conv_general_dilated(x, layer.weight, layer.patch_size, "VALID", dimension_numbers=dimensions)
    assert_close(layer(x), expected + layer.bias, 1e-6)


def test_patches_that_do_not_fit_are_refused(key):
    with pytest.raises(ValueError, match="images of 9x8 cannot be cut into patches of 4x4"):
        PatchEmbed(3, 7, 4, key=key)(jnp.zeros((1, 9, 8, 3)))
    with pytest.raises(ValueError, match="video of 5x8x8 cannot be cut into tubelets of 2x4x4"):
        PatchEmbed3D(3, 7, (2, 4, 4), key=key)(jnp.zeros((1, 5, 8, 8, 3)))
