"""Gradient clipping: by value, unit by unit relative to the parameters, and by the global norm, in this order."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from eqvision.optim.groups import layer_axes, leaf_name
from eqvision.recipes.config import OptimizerConfig


def clipping(config: OptimizerConfig) -> list[optax.GradientTransformation]:
    """The transformations that the configuration switches on; each is one pass over the gradient."""
    chosen = []
    if config.clip_value is not None:
        chosen.append(optax.clip(config.clip_value))
    if config.clip_adaptive is not None:
        chosen.append(clip_adaptive(config.clip_adaptive))
    if config.clip_norm is not None:
        chosen.append(optax.clip_by_global_norm(config.clip_norm))
    return chosen


def clip_adaptive(ratio: float, *, eps: float = 1e-3) -> optax.GradientTransformation:
    """Adaptive gradient clipping (Brock et al. 2021, equation 3): each unit's gradient norm to ``ratio`` times its own.

    Units are the outputs of linear maps (in, out) and convolutions (h, w, in, out), and whole vectors; stacks have the
    units of each layer. ``eps`` is the least parameter norm that counts, for units which begin at zero. Parameters
    below a field ``head`` are not clipped, since the paper leaves the last layer out.
    """

    def leaf(path: tuple, grad: Array, param: Array) -> Array:
        name = leaf_name(path)
        if "head" in name.split("."):
            return grad
        axes = layer_axes(name, grad.ndim)
        axes = axes[:-1] if len(axes) > 1 else axes
        limit = ratio * jnp.maximum(_norm(param, axes), eps)
        norm = _norm(grad, axes)
        return jnp.where(norm < limit, grad, grad * (limit / jnp.maximum(norm, 1e-6)))

    return optax.stateless(lambda grads, params: jax.tree.map_with_path(leaf, grads, params))


def _norm(x: Float[Array, "..."], axes: tuple[int, ...]) -> Float[Array, "..."]:
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=axes, keepdims=True))
