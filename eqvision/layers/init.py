"""Parameter initialisers.

Random numbers are drawn in power-of-two buckets by one compiled function a bucket, then cut to shape: an
eager draw otherwise compiles once for every new shape, which took ten seconds for ResNet-50. The values
are the same eagerly, under ``jit`` and under ``eval_shape``.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

Shape = tuple[int, ...]


@functools.partial(jax.jit, static_argnums=1)
def _normal_bucket(key: PRNGKeyArray, size: int) -> Float[Array, " n"]:
    return jax.random.normal(key, (size,))


@functools.partial(jax.jit, static_argnums=1)
def _truncated_bucket(key: PRNGKeyArray, size: int) -> Float[Array, " n"]:
    return jax.random.truncated_normal(key, -2.0, 2.0, (size,))


@functools.partial(jax.jit, static_argnums=1)
def _uniform_bucket(key: PRNGKeyArray, size: int) -> Float[Array, " n"]:
    return jax.random.uniform(key, (size,), minval=-1.0, maxval=1.0)


def _bucket(shape: Shape) -> int:
    return 1 << max(6, math.ceil(math.log2(max(1, math.prod(shape)))))


@functools.partial(jax.jit, static_argnums=1)
def _cut(values: Float[Array, " n"], shape: Shape, scale: Float[Array, ""]) -> Float[Array, "..."]:
    return values[: math.prod(shape)].reshape(shape) * scale


def normal(key: PRNGKeyArray, shape: Shape, std: float = 1.0) -> Float[Array, "..."]:
    """Normal with standard deviation ``std``."""
    return _cut(_normal_bucket(key, _bucket(shape)), shape, jnp.float32(std))


def truncated_normal(key: PRNGKeyArray, shape: Shape, std: float = 0.02) -> Float[Array, "..."]:
    """Normal cut at two standard deviations; ``std`` is that of the normal before the cut, as in timm."""
    return _cut(_truncated_bucket(key, _bucket(shape)), shape, jnp.float32(std))


def uniform(key: PRNGKeyArray, shape: Shape, limit: float) -> Float[Array, "..."]:
    """Uniform in [-limit, limit]."""
    return _cut(_uniform_bucket(key, _bucket(shape)), shape, jnp.float32(limit))


def xavier_uniform(key: PRNGKeyArray, shape: Shape) -> Float[Array, "..."]:
    """Glorot and Bengio 2010; fan in and fan out are the last two axes, times the window of a convolution."""
    window = math.prod(shape[:-2])
    return uniform(key, shape, math.sqrt(6.0 / (window * (shape[-2] + shape[-1]))))


def lecun_normal(key: PRNGKeyArray, shape: Shape) -> Float[Array, "..."]:
    """Truncated normal of variance 1 / fan in, the default of Flax."""
    # 0.8796 is the standard deviation of a unit normal cut at two.
    return truncated_normal(key, shape, math.sqrt(1.0 / math.prod(shape[:-1])) / 0.87962566103423978)


def he_normal_fan_out(key: PRNGKeyArray, shape: Shape) -> Float[Array, "..."]:
    """He et al. 2015 by fan out, as torchvision initialises the convolutions of ResNets."""
    return normal(key, shape, math.sqrt(2.0 / (math.prod(shape[:-2]) * shape[-1])))
