"""Feed-forward blocks of transformers."""

import math
from typing import Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.layers.drop import dropout, fold
from eqvision.layers.init import xavier_uniform
from eqvision.layers.linear import Initializer, Linear

Activation = Literal["gelu", "gelu_tanh", "relu", "silu", "quick_gelu", "tanh"]


@jax.custom_jvp
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Exact GELU (Hendrycks and Gimpel 2016), by the error function.

    The derivative is written out so that the backward pass keeps one array for it and not the three that
    differentiating the formula keeps: in a scanned ViT these are a third of what is stored for each block.
    """
    # By erf as in torch: XLA:CPU's erfc, which jax.nn.gelu takes, costs a tenth of the MLP's forward pass.
    return 0.5 * x * (1 + lax.erf(x * math.sqrt(0.5)))


@gelu.defjvp
def _gelu_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    below = 0.5 * (1 + lax.erf(x * math.sqrt(0.5)))  # the normal distribution function
    density = jnp.exp(-0.5 * jnp.square(x)) * (1 / math.sqrt(2 * math.pi))
    return gelu(x), t * (below + x * density)


@jax.custom_jvp
def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU by a hyperbolic tangent, the default of Flax and JAX; its derivative is written out as in ``gelu``."""
    return jax.nn.gelu(x, approximate=True)


@gelu_tanh.defjvp
def _gelu_tanh_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    tanh = jnp.tanh(scale * (x + cubic * x**3))
    slope = scale * (1 + 3 * cubic * jnp.square(x))
    return gelu_tanh(x), t * 0.5 * (1 + tanh + x * (1 - jnp.square(tanh)) * slope)


def activate(x: Float[Array, "..."], activation: Activation) -> Float[Array, "..."]:
    """``gelu`` is exact (erf), as in PyTorch; ``gelu_tanh`` is the approximation that Flax and JAX default to.

    They differ by up to 5e-4, and a checkpoint works with one of them.
    """
    if activation == "gelu":
        return gelu(x)
    if activation == "gelu_tanh":
        return gelu_tanh(x)
    if activation == "relu":
        return jax.nn.relu(x)
    if activation == "silu":
        return jax.nn.silu(x)
    if activation == "quick_gelu":
        return x * jax.nn.sigmoid(1.702 * x)
    if activation == "tanh":
        return jnp.tanh(x)
    raise ValueError(f"activation {activation!r} is unknown; choose from {get_args(Activation)}")


class MLP(eqx.Module):
    """Linear, activation, linear; dropout after both, as in Scenic and AugReg."""

    fc1: Linear
    fc2: Linear
    activation: Activation = eqx.field(static=True)
    dropout: float = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        mlp_dim: int,
        *,
        out_width: int | None = None,
        activation: Activation = "gelu",
        use_bias: bool = True,
        dropout: float = 0.0,
        init: Initializer = xavier_uniform,
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key)
        out_width = width if out_width is None else out_width
        self.fc1 = Linear(width, mlp_dim, use_bias=use_bias, init=init, key=keys[0])
        self.fc2 = Linear(mlp_dim, out_width, use_bias=use_bias, init=init, key=keys[1])
        self.activation = activation
        self.dropout = dropout

    def __call__(
        self, x: Float[Array, "... d"], *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> Float[Array, "... o"]:
        hidden = activate(self.fc1(x), self.activation)
        hidden = dropout(hidden, self.dropout, train=train, key=fold(key, 0))
        return dropout(self.fc2(hidden), self.dropout, train=train, key=fold(key, 1))


class GatedMLP(eqx.Module):
    """Shazeer 2020: ``fc2(activation(gate(x)) * fc1(x))``; SwiGLU with ``silu``, GEGLU with a gelu."""

    gate: Linear
    fc1: Linear
    fc2: Linear
    activation: Activation = eqx.field(static=True)
    dropout: float = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        mlp_dim: int,
        *,
        activation: Activation = "silu",
        use_bias: bool = True,
        dropout: float = 0.0,
        init: Initializer = xavier_uniform,
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key, 3)
        self.gate = Linear(width, mlp_dim, use_bias=use_bias, init=init, key=keys[0])
        self.fc1 = Linear(width, mlp_dim, use_bias=use_bias, init=init, key=keys[1])
        self.fc2 = Linear(mlp_dim, width, use_bias=use_bias, init=init, key=keys[2])
        self.activation = activation
        self.dropout = dropout

    def __call__(
        self, x: Float[Array, "... d"], *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> Float[Array, "... d"]:
        hidden = activate(self.gate(x), self.activation) * self.fc1(x)
        hidden = dropout(hidden, self.dropout, train=train, key=fold(key, 0))
        return dropout(self.fc2(hidden), self.dropout, train=train, key=fold(key, 1))
