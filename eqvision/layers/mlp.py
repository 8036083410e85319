"""Feed-forward blocks of transformers."""

from typing import Literal, get_args

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.layers.drop import dropout, fold
from eqvision.layers.init import xavier_uniform
from eqvision.layers.linear import Initializer, Linear

Activation = Literal["gelu", "gelu_tanh", "relu", "silu", "quick_gelu", "tanh"]


def activate(x: Float[Array, "..."], activation: Activation) -> Float[Array, "..."]:
    """``gelu`` is exact (erf), as in PyTorch; ``gelu_tanh`` is the approximation that Flax and JAX default to.

    They differ by up to 5e-4, and a checkpoint works with one of them.
    """
    if activation == "gelu":
        return jax.nn.gelu(x, approximate=False)
    if activation == "gelu_tanh":
        return jax.nn.gelu(x, approximate=True)
    if activation == "relu":
        return jax.nn.relu(x)
    if activation == "silu":
        return jax.nn.silu(x)
    if activation == "quick_gelu":
        return x * jax.nn.sigmoid(1.702 * x)
    if activation == "tanh":
        return jax.numpy.tanh(x)
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
        dropout: float = 0.0,
        init: Initializer = xavier_uniform,
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key)
        self.fc1 = Linear(width, mlp_dim, init=init, key=keys[0])
        self.fc2 = Linear(mlp_dim, width if out_width is None else out_width, init=init, key=keys[1])
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
