"""The loss of masked autoencoders (He et al. 2022): the squared error of the pixels of masked patches."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

NORM_EPS = 1e-6  # of facebookresearch/mae, models_mae.py


def normalised_pixels(targets: Float[Array, "b n p"]) -> Float[Array, "b n p"]:
    """Each patch with mean 0 and variance 1 (He et al. 2022, table 1d); the variance is divided by p - 1."""
    mean, std = patch_moments(targets)
    return (targets - mean) / std


def patch_moments(targets: Float[Array, "b n p"]) -> tuple[Float[Array, "b n 1"], Float[Array, "b n 1"]]:
    """What ``normalised_pixels`` subtracts and divides by."""
    mean = targets.mean(axis=-1, keepdims=True)
    return mean, jnp.sqrt(targets.var(axis=-1, keepdims=True, ddof=1) + NORM_EPS)


def masked_pixel_loss(
    predicted: Float[Array, "b n p"], targets: Float[Array, "b n p"], mask: Bool[Array, "b n"], *, normalise: bool
) -> Float[Array, " b"]:
    """For each image the mean squared error over the pixels of the patches with ``mask``; 0 where there is none.

    In float32. ``normalise`` compares with the normalised pixels of each patch. No gradient reaches the targets.
    """
    targets = jax.lax.stop_gradient(targets.astype(jnp.float32))
    targets = normalised_pixels(targets) if normalise else targets
    errors = jnp.square(predicted.astype(jnp.float32) - targets).mean(axis=-1)
    used = mask.astype(jnp.float32)
    return (errors * used).sum(axis=-1) / jnp.maximum(used.sum(axis=-1), 1.0)
