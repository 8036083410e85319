"""Adafactor as big_vision trains large ViTs with it: factored second moments, no relative step sizes, bf16 momentum."""

from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from eqvision.optim.groups import layer_axes, leaf_name


class FactoredState(NamedTuple):
    """Number of updates and second moments; a leaf is None in the trees that do not hold its moments."""

    count: Int[Array, ""]
    row: PyTree
    column: PyTree
    full: PyTree


def scale_by_adafactor(
    *,
    min_dim_size_to_factor: int = 32,
    decay_rate: float = 0.8,
    decay_offset: int = 0,
    beta2_cap: float = 0.999,
    clipping_threshold: float | None = None,
    momentum: float | None = 0.9,
    momentum_dtype: DTypeLike = jnp.bfloat16,
    eps: float = 1e-30,
) -> optax.GradientTransformation:
    """big_vision's variant of Adafactor (Shazeer & Stern 2018), from Zhai et al. 2022, section 3.4; its defaults.

    The decay of the second moment is ``min(beta2_cap, 1 - (step + 1 - decay_offset) ** -decay_rate)``; Zhai et al.
    train ViT-g with the cap 0.999, UViM with 0.95. ``clipping_threshold`` limits the root mean square of each
    layer's update; 1 in Shazeer & Stern, off in big_vision, which clips the global norm of the gradient to 1.
    The moments of a parameter are factored over its two largest axes where both have ``min_dim_size_to_factor`` or
    more. Each layer of a stack is factored for itself, so a stack gives the updates of its layers.
    """
    parts = [scale_by_factored_moments(min_dim_size_to_factor, decay_rate, decay_offset, beta2_cap, eps)]
    if clipping_threshold is not None:
        parts.append(clip_by_layer_rms(clipping_threshold))
    if momentum:
        parts.append(optax.ema(momentum, debias=False, accumulator_dtype=momentum_dtype))
    return optax.chain(*parts)


def scale_by_factored_moments(
    min_dim_size_to_factor: int, decay_rate: float, decay_offset: int, beta2_cap: float, eps: float
) -> optax.GradientTransformation:
    """Divide by the root of the second moment, kept as means over rows and columns of large matrices."""

    def axes_of(path: tuple, leaf: Array) -> tuple[int, int] | None:
        return _factored_axes(leaf_name(path), leaf.shape, min_dim_size_to_factor)

    def init(params: optax.Params) -> FactoredState:
        def zeros(number: int) -> optax.Params:
            return jax.tree.map_with_path(lambda path, p: _zeros(p, axes_of(path, p), number), params)

        return FactoredState(jnp.zeros((), jnp.int32), zeros(0), zeros(1), zeros(2))

    def update(updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None):
        del params
        state = cast(FactoredState, state)
        number = jnp.asarray(state.count - decay_offset, jnp.float32) + 1
        beta2 = jnp.minimum(beta2_cap, 1 - number**-decay_rate)

        def leaf(path: tuple, grad: Array, row: Array | None, column: Array | None, full: Array | None) -> _Moved:
            axes = axes_of(path, grad)
            if axes is None:
                full = _average(full, jnp.square(grad) + eps, beta2)
                return _Moved(grad * jax.lax.rsqrt(full), None, None, full)
            return _factored(grad, row, column, axes, beta2, eps)

        moved = jax.tree.map_with_path(leaf, updates, state.row, state.column, state.full)
        updates, *moments = (_pick(moved, number) for number in range(4))
        return updates, FactoredState(jnp.asarray(optax.safe_increment(state.count)), *moments)

    return optax.GradientTransformation(init, update)


class _Moved(NamedTuple):
    """A leaf's update and its new moments."""

    update: Array
    row: Array | None
    column: Array | None
    full: Array | None


def _pick(tree: PyTree, number: int) -> PyTree:
    return jax.tree.map(lambda moved: moved[number], tree, is_leaf=lambda node: isinstance(node, _Moved))


def _average(moment: Array | None, value: Array, beta2: Float[Array, ""]) -> Array:
    assert moment is not None, "the state was made for parameters of other shapes"
    return (beta2 * moment + (1 - beta2) * value).astype(moment.dtype)


def _factored(
    grad: Array, row: Array | None, column: Array | None, axes: tuple[int, int], beta2: Float[Array, ""], eps: float
) -> _Moved:
    smaller, larger = axes
    square = jnp.square(grad) + eps
    row = _average(row, jnp.mean(square, axis=larger), beta2)
    column = _average(column, jnp.mean(square, axis=smaller), beta2)
    # The axis `smaller` of the gradient lies one to the left in `row` where `larger` came before it.
    mean = jnp.mean(row, axis=smaller - (larger < smaller), keepdims=True)
    by_row = jnp.expand_dims(jax.lax.rsqrt(row / mean), larger)
    return _Moved(grad * by_row * jnp.expand_dims(jax.lax.rsqrt(column), smaller), row, column, None)


def _factored_axes(name: str, shape: tuple[int, ...], minimum: int) -> tuple[int, int] | None:
    """The two largest axes of a layer, the smaller first; None where the moments are kept whole."""
    axes = sorted(layer_axes(name, len(shape)), key=lambda axis: shape[axis])
    if len(axes) < 2 or shape[axes[-2]] < minimum:
        return None
    return axes[-2], axes[-1]


def _zeros(param: Array, axes: tuple[int, int] | None, number: int) -> Array | None:
    """The initial moment of tree ``number``: row (without the larger axis), column (without the smaller), full."""
    if axes is None:
        return jnp.zeros_like(param) if number == 2 else None
    if number == 2:
        return None
    dropped = axes[1 - number]
    return jnp.zeros(param.shape[:dropped] + param.shape[dropped + 1 :], param.dtype)


def clip_by_layer_rms(threshold: float) -> optax.GradientTransformation:
    """Scale each layer's update down to the root mean square ``threshold``."""

    def leaf(path: tuple, update: Array) -> Array:
        axes = layer_axes(leaf_name(path), update.ndim)
        rms = jnp.sqrt(jnp.mean(jnp.square(update), axis=axes, keepdims=True))
        return update / jnp.maximum(1.0, rms / threshold)

    return optax.stateless(lambda updates, params: jax.tree.map_with_path(leaf, updates))
