"""Arrays for tests of layers: random ones, float64 copies, and the way to torch and back."""

import jax
import jax.numpy as jnp
import numpy as np


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def to_float64(tree):
    """Call within ``jax.enable_x64``."""
    cast = lambda leaf: leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf  # noqa: E731
    return jax.tree.map(cast, tree)


def shaken(tree, scale=0.1):
    """The layer with noise on every parameter, so that biases are not zero and norm weights not one."""
    leaves, structure = jax.tree.flatten(tree)
    noisy = [leaf + scale * draw(*leaf.shape, seed=number) for number, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, noisy)


def to_torch(x, requires_grad=False):
    """Channels first."""
    import torch

    first = np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1))
    return torch.from_numpy(first).requires_grad_(requires_grad)


def from_torch(x):
    return np.moveaxis(x.detach().numpy(), 1, -1)
