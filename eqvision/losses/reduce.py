"""From per-example values to one number: the weighted mean over the whole global batch.

Under ``jax.shard_map`` the sum of values and the sum of weights are both summed over the devices that hold
different examples and then divided once, so one device and eight give the same loss and the same gradient
however the padding is spread. Outside ``shard_map`` the same calls reduce the batch they are given.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from eqvision.ops.collectives import DATA_AXES, global_sum, vary_like


def weighted_mean(
    values: Float[Array, "*n"], weights: Float[Array, "*n"], axis_names: tuple[str, ...] = DATA_AXES
) -> Float[Array, ""]:
    """Mean of ``values`` by ``weights`` over the batch and over the mesh axes that split it; 0 if no weight.

    Raises ValueError as ``weighted_sums``.
    """
    total, weight = weighted_sums(values, weights, axis_names)
    return total / jnp.where(weight == 0, 1.0, weight)


def weighted_sums(
    values: Float[Array, "*n"], weights: Float[Array, "*n"], axis_names: tuple[str, ...] = DATA_AXES
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum of ``values * weights`` and sum of ``weights``: what gradient accumulation adds before it divides.

    An entry of weight 0 adds exactly nothing, even if its value is NaN, and passes a zero gradient to its
    value; ``mask_rows`` on the logits stops NaN gradients inside the loss itself. ``axis_names=()`` leaves
    the sums local to the device; of the axes named, only those over which the sums vary are used. Raises
    ValueError inside ``shard_map(..., check_vma=False)``, which hides what varies.
    """
    require_tracking(axis_names)
    weights = weights.astype(jnp.float32)
    total = (mask_rows(values.astype(jnp.float32), weights) * weights).sum()
    # weights made inside shard_map count once per device, like the values they belong to
    weight = vary_like(weights.sum(), total)
    return global_sum(total, axis_names), global_sum(weight, axis_names)


def mask_rows(x: Shaped[Array, "b ..."], weights: Float[Array, "b ..."]) -> Shaped[Array, "b ..."]:
    """``x`` with zeros in the rows of weight 0, and a zero gradient into them even where it would be NaN.

    ``weights`` cover the leading dimensions of ``x``.
    """
    used = (weights != 0).reshape(weights.shape + (1,) * (x.ndim - weights.ndim))
    return jnp.where(used, x, jnp.zeros((), x.dtype))


def require_tracking(axis_names: tuple[str, ...]) -> None:
    """Raise ValueError where a sum over devices would be taken of what only looks equal on all of them."""
    for axis in axis_names:
        try:
            split = jax.lax.axis_size(axis) > 1
        except NameError:  # not inside a shard_map over this axis: nothing to sum over
            continue
        if split and axis not in jax.typeof(jax.lax.axis_index(axis)).manual_axis_type.varying:
            raise ValueError(
                f"mesh axis {axis!r} has several devices, but JAX does not track which values vary over it, "
                "so the global sum cannot be taken. Use jax.shard_map with check_vma=True (its default), or "
                "pass axis_names=() and sum by hand."
            )
