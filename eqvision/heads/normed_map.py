"""The head of ConvNeXt: the pooled map is normalised before it is classified."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.layers import Initializer, LayerNorm, Linear, truncated_normal
from eqvision.types import Features


class NormedMapHead(eqx.Module):
    """Global average of the coarsest map, layer norm, then a linear layer. Logits are float32.

    ``eps`` is the norm's: 1e-6 in the original and timm, 1e-12 in transformers.
    """

    norm: LayerNorm
    linear: Linear

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        eps: float = 1e-6,
        init: Initializer = truncated_normal,
        key: PRNGKeyArray,
    ):
        self.norm = LayerNorm(in_channels, eps=eps)
        self.linear = Linear(in_channels, num_classes, init=init, key=key)

    def __call__(
        self, features: Features, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "b k"], eqx.nn.State]:
        del train, key
        return self.linear(self.pooled(features)), state

    def pooled(self, features: Features) -> Float[Array, "b d"]:
        """What the linear layer reads, in float32: behind the norm."""
        return self.norm(jnp.mean(features[-1].astype(jnp.float32), axis=(1, 2)))

    def reset(self, num_classes: int, *, key: PRNGKeyArray) -> "NormedMapHead":
        """The same norm with a new linear layer."""
        linear = Linear(self.linear.weight.shape[0], num_classes, key=key)
        return eqx.tree_at(lambda head: head.linear, self, linear)
