"""The affine map."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.layers.init import truncated_normal

Initializer = Callable[[PRNGKeyArray, tuple[int, ...]], Float[Array, "..."]]


class Linear(eqx.Module):
    """``x @ weight + bias`` over the last axis, for any number of leading axes.

    ``weight`` is stored (in, out), so that neither pass transposes it. All leading axes are flattened
    into one: the weight's gradient is then a single two-dimensional product.
    """

    weight: Float[Array, "i o"]
    bias: Float[Array, " o"] | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        init: Initializer = truncated_normal,
        key: PRNGKeyArray,
    ):
        self.weight = init(key, (in_features, out_features))
        self.bias = jnp.zeros((out_features,)) if use_bias else None

    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        y = x.reshape(-1, x.shape[-1]) @ self.weight.astype(x.dtype)
        if self.bias is not None:
            y = y + self.bias.astype(x.dtype)
        return y.reshape(*x.shape[:-1], y.shape[-1])
