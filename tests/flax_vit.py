"""A ViT in Flax with the parameter names of Google's three code bases: the oracle of test_pretrained_vit_google.py.

Written from the facts in vit_jax/models_vit.py (google-research/vision_transformer), big_vision/models/vit.py and
scenic/projects/baselines/vit.py: names, shapes, and the order of operations. Flax's own layers do the rest.
"""

from dataclasses import field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

LINEN = {"norm2": "LayerNorm_1", "attention": "MultiHeadDotProductAttention_0", "mlp": "MlpBlock_0"}
PRE_LINEN = {"norm2": "LayerNorm_2", "attention": "MultiHeadDotProductAttention_1", "mlp": "MlpBlock_3"}


class Mlp(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x):
        hidden = nn.gelu(nn.Dense(self.hidden, name="Dense_0")(x))
        return nn.Dense(x.shape[-1], name="Dense_1")(hidden)


class Block(nn.Module):
    heads: int
    hidden: int
    names: Any = field(default_factory=lambda: LINEN)

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(name="LayerNorm_0")(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, name=self.names["attention"])(y, y)
        y = nn.LayerNorm(name=self.names["norm2"])(x)
        x = x + Mlp(self.hidden, name=self.names["mlp"])(y)
        return x, x


class Encoder(nn.Module):
    """Positions are learned here in vision_transformer and Scenic, and outside in big_vision."""

    depth: int
    heads: int
    hidden: int
    positions: bool
    stacked: bool
    names: Any = field(default_factory=lambda: LINEN)

    @nn.compact
    def __call__(self, x):
        if self.positions:
            x = Positions(name="posembed_input")(x)
        if self.stacked:
            scanned = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth)
            x, outputs = scanned(self.heads, self.hidden, name="encoderblock")(x)
        else:
            outputs = []
            for layer in range(self.depth):
                x, output = Block(self.heads, self.hidden, self.names, name=f"encoderblock_{layer}")(x)
                outputs.append(output)
        return nn.LayerNorm(name="encoder_norm")(x), outputs


class Positions(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + self.param("pos_embedding", nn.initializers.normal(0.02), (1, *x.shape[1:]))


class MapHead(nn.Module):
    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x):
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, x.shape[-1]))
        probe = jnp.broadcast_to(probe, (len(x), *probe.shape[1:]))
        x = nn.MultiHeadDotProductAttention(self.heads, name="MultiHeadDotProductAttention_0")(probe, x)
        return (x + Mlp(self.hidden, name="MlpBlock_0")(nn.LayerNorm(name="LayerNorm_0")(x)))[:, 0]


class FlaxViT(nn.Module):
    """``positions``: ``inside`` the encoder and on the class token, ``outside`` and before it, or ``sincos``."""

    width: int = 32
    depth: int = 3
    heads: int = 2
    hidden: int = 64
    patch: int = 8
    classes: int = 5
    pool: str = "token"
    positions: str = "inside"
    stacked: bool = False
    pre_logits: int | None = None
    head: str = "head"
    names: Any = field(default_factory=lambda: LINEN)

    @nn.compact
    def __call__(self, images):
        """Logits and the outputs of all blocks."""
        patch = (self.patch, self.patch)
        x = nn.Conv(self.width, patch, strides=patch, padding="VALID", name="embedding")(images)
        b, h, w, d = x.shape
        x = x.reshape(b, h * w, d)
        if self.positions == "outside":
            x = x + self.param("pos_embedding", nn.initializers.normal(0.02), (1, h * w, d))
        if self.positions == "sincos":
            x = x + sincos(h, w, d)
        if self.pool == "token":
            token = self.param("cls", nn.initializers.normal(0.02), (1, 1, d))
            x = jnp.concatenate([jnp.broadcast_to(token, (b, 1, d)), x], axis=1)
        sizes = (self.depth, self.heads, self.hidden)
        inside = self.positions == "inside"
        x, outputs = Encoder(*sizes, inside, self.stacked, self.names, name="Transformer")(x)
        x = self._pool(x)
        if self.pre_logits is not None:
            x = nn.tanh(nn.Dense(self.pre_logits, name="pre_logits")(x))
        return nn.Dense(self.classes, name=self.head)(x), outputs

    def _pool(self, x):
        if self.pool == "map":
            return MapHead(self.heads, self.hidden, name="MAPHead_0")(x)
        return x[:, 0] if self.pool == "token" else x.mean(axis=1)


def sincos(rows: int, columns: int, width: int) -> jax.Array:
    """big_vision's table: the slowest of ``width / 4`` frequencies is one over the temperature itself."""
    frequencies = 10_000.0 ** -jnp.linspace(0, 1, width // 4)
    row, column = np.mgrid[:rows, :columns]
    angles = [place.reshape(-1, 1) * frequencies for place in (column, row)]
    return jnp.concatenate([wave(angle) for angle in angles for wave in (jnp.sin, jnp.cos)], axis=1)[None]


def random_parameters(model: nn.Module, images, seed: int = 0) -> dict[str, np.ndarray]:
    """Random numbers for all parameters, by names joined with ``/``; scales of norms lie around one."""
    shapes = flatten_dict(jax.eval_shape(model.init, jax.random.key(0), images)["params"], sep="/")
    rng = np.random.default_rng(seed)
    drawn = {name: 0.2 * rng.standard_normal(leaf.shape, np.float32) for name, leaf in sorted(shapes.items())}
    return {name: 1 + value if name.endswith("scale") else value for name, value in drawn.items()}


def run(model: nn.Module, parameters: dict[str, np.ndarray], images):
    """Logits and the outputs of all blocks, of parameters by joined names."""
    return model.apply({"params": unflatten_dict(parameters, sep="/")}, images)
