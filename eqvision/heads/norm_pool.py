"""Norm, average, linear layer: for pyramids whose last map comes without a final norm."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.layers import Initializer, LayerNorm, Linear, truncated_normal
from eqvision.types import Features


class NormPoolHead(eqx.Module):
    """Layer norm of every place of the coarsest map, their average, then a linear layer: the head of Swin."""

    norm: LayerNorm
    linear: Linear

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        norm: LayerNorm | None = None,
        eps: float = 1e-5,
        init: Initializer = truncated_normal,
        key: PRNGKeyArray,
    ):
        self.norm = LayerNorm(in_channels, eps=eps) if norm is None else norm
        self.linear = Linear(in_channels, num_classes, init=init, key=key)

    def __call__(
        self, features: Features, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "b k"], eqx.nn.State]:
        del train, key
        return self.linear(self.pooled(features)), state

    def pooled(self, features: Features) -> Float[Array, "b d"]:
        """What the linear layer reads, in float32."""
        return jnp.mean(self.norm(features[-1].astype(jnp.float32)), axis=(1, 2))

    def reset(self, num_classes: int, *, key: PRNGKeyArray) -> "NormPoolHead":
        """The same norm with a new linear layer."""
        return NormPoolHead(self.linear.weight.shape[0], num_classes, norm=self.norm, key=key)
