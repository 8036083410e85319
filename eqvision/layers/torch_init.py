"""Layers that start as ``torch.nn`` starts them: uniform in 1/sqrt(fan in), the biases too."""

import math

import equinox as eqx
import jax
from jaxtyping import PRNGKeyArray

from eqvision.layers.conv import Conv
from eqvision.layers.init import uniform
from eqvision.layers.linear import Linear


def torch_linear(in_features: int, out_features: int, *, key: PRNGKeyArray) -> Linear:
    """``torch.nn.Linear`` as it is before training."""
    weight, bias = jax.random.split(key)
    limit = 1 / math.sqrt(in_features)
    linear = Linear(in_features, out_features, init=lambda key, shape: uniform(key, shape, limit), key=weight)
    return eqx.tree_at(lambda each: each.bias, linear, uniform(bias, (out_features,), limit))


def torch_conv(in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, key: PRNGKeyArray) -> Conv:
    """``torch.nn.Conv2d`` with a bias and symmetric padding of half the window, as it is before training."""
    weight, bias = jax.random.split(key)
    limit = 1 / math.sqrt(in_channels * kernel_size**2)
    conv = Conv(
        in_channels,
        out_channels,
        kernel_size,
        stride=stride,
        padding=kernel_size // 2,
        use_bias=True,
        init=lambda key, shape: uniform(key, shape, limit),
        key=weight,
    )
    return eqx.tree_at(lambda each: each.bias, conv, uniform(bias, (out_channels,), limit))
