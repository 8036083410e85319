"""Mesh axes seen from inside ``jax.shard_map``: which ones a value varies over, and sums over just those.

Under ``shard_map`` with its checks on (the default), JAX tracks for every value the mesh axes on which
devices hold different data. Layers and losses read that instead of being told which axes exist, so the
same model runs on one device, under plain ``jit`` and under ``shard_map`` without a setting.
"""

from typing import TypeVar

import jax
from jax import lax
from jaxtyping import Array

DATA_AXES = ("data", "fsdp")  # the mesh axes over which the batch is split

T = TypeVar("T")


def varying_axes(x: Array, among: tuple[str, ...] = DATA_AXES) -> tuple[str, ...]:
    """Those of the axes ``among`` over which ``x`` differs between devices; empty outside ``shard_map``."""
    return tuple(axis for axis in among if axis in jax.typeof(x).manual_axis_type.varying)


def vary_like(tree: T, x: Array) -> T:
    """Mark ``tree`` as varying over every axis that ``x`` varies over.

    A hand-written gradient (``jax.custom_vjp``) must get parameters and activations of the same kind; the
    transpose of this marking is the sum of the parameter's gradient over devices.
    """
    target = jax.typeof(x).manual_axis_type.varying

    def mark(leaf: Array) -> Array:
        missing = tuple(sorted(target - jax.typeof(leaf).manual_axis_type.varying))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(mark, tree)


def global_sum(x: Array, among: tuple[str, ...] = DATA_AXES) -> Array:
    """Sum over the devices that hold different values of ``x``; ``x`` itself where there is only one."""
    axes = varying_axes(x, among)
    return lax.psum(x, axes) if axes else x
