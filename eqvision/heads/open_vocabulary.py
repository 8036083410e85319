"""Heads of open-vocabulary detectors: a class by likeness to a query, a box and its objectness at each place.

OWL-ViT: Minderer et al. 2022; the second version and its objectness: Minderer et al. 2023. Facts from
scenic/projects/owl_vit (layers.py, utils.py) and transformers' modeling_owlvit.py and modeling_owlv2.py.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from eqvision.layers import Activation, Linear, activate, normal, xavier_uniform

NOT_ASKED = -1e6  # logits of queries that ask for nothing, as in Scenic; transformers has float32's lowest number
PRIOR = 0.01  # probability of an object that a fresh head gives to everything


class GeluMLP(eqx.Module):
    """Three linear layers with GELU between them, the last one zero to begin with; in float32.

    ``activation`` is ``gelu`` in transformers and ``gelu_tanh``, Flax's default, in Scenic.
    """

    layers: tuple[Linear, ...]
    activation: Activation = eqx.field(static=True)

    def __init__(self, width: int, out: int, *, activation: Activation = "gelu", key: PRNGKeyArray):
        keys = jax.random.split(key, 3)
        first, second = (Linear(width, width, init=xavier_uniform, key=keys[i]) for i in range(2))
        self.layers = (first, second, Linear(width, out, init=_zeros, key=keys[2]))
        self.activation = activation

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... o"]:
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        for i, layer in enumerate(self.layers):
            x = layer(activate(x, self.activation) if i else x)
        return x


class QueryClassHead(eqx.Module):
    """The cosine of each place and each query, with a shift and a scale that the place decides."""

    embed: Linear
    shift: Linear
    scale: Linear

    def __init__(self, width: int, embed_dim: int, *, std: float = 1e-6, factor: float = 1.0, key: PRNGKeyArray):
        """``std`` is how large ``embed`` is to begin with, and ``factor``, 1 or more, what cosines are multiplied with.

        The defaults are published, for towers that were trained as a CLIP. Fresh ones learn sooner with a ``factor`` of
        10, as in CLIP, and weights of usual size.
        """
        keys = jax.random.split(key, 3)
        self.embed = Linear(width, embed_dim, init=lambda key, shape: normal(key, shape, std), key=keys[0])
        # the shift is multiplied with the factor too: its own part of a logit stays as it is
        shift = Linear(width, 1, init=lambda key, shape: xavier_uniform(key, shape) / factor, key=keys[1])
        prior = jnp.full((1,), math.log(PRIOR / (1 - PRIOR)) / factor)
        self.shift = eqx.tree_at(lambda layer: layer.bias, shift, prior)
        scale = Linear(width, 1, init=xavier_uniform, key=keys[2])
        self.scale = eqx.tree_at(lambda layer: layer.bias, scale, jnp.full((1,), factor - 1.0))

    def __call__(
        self, x: Float[Array, "b n d"], queries: Float[Array, "b q e"], asked: Bool[Array, "b q"]
    ) -> Float[Array, "b n q"]:
        """Logits, float32; ``NOT_ASKED`` where ``asked`` is False. What queries hold there changes nothing."""
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        queries = jnp.where(asked[..., None], queries.astype(x.dtype), 0)
        # Not in lower precision, which matrix units of accelerators would take for float32.
        cosine = jnp.einsum("bnd,bqd->bnq", _unit(self.embed(x)), _unit(queries), precision=lax.Precision.HIGHEST)
        logits = (cosine + self.shift(x)) * (jax.nn.elu(self.scale(x)) + 1)
        return jnp.where(asked[:, None, :], logits, NOT_ASKED)


class OpenVocabularyHead(eqx.Module):
    """Class, box and, in the second version, objectness of each place.

    Boxes are learned as differences, before the sigmoid, from one of a cell's size with its centre at the cell's lower
    right corner. The objectness head sends no gradient into the features.
    """

    classes: QueryClassHead
    boxes: GeluMLP
    objectness: GeluMLP | None

    def __init__(
        self,
        width: int,
        embed_dim: int,
        *,
        objectness: bool = False,
        activation: Activation = "gelu",
        class_std: float = 1e-6,
        class_factor: float = 1.0,
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key, 3)
        self.classes = QueryClassHead(width, embed_dim, std=class_std, factor=class_factor, key=keys[0])
        self.boxes = GeluMLP(width, 4, activation=activation, key=keys[1])
        self.objectness = GeluMLP(width, 1, activation=activation, key=keys[2]) if objectness else None

    def boxes_cxcywh(self, patches: Float[Array, "b h w d"]) -> Float[Array, "b n 4"]:
        """In [0, 1] of the image, float32, row by row."""
        b, h, w, d = patches.shape
        return jax.nn.sigmoid(self.boxes(patches.reshape(b, h * w, d)) + box_bias(h, w))

    def object_logits(self, patches: Float[Array, "b h w d"]) -> Float[Array, "b n"] | None:
        """Of any object, float32; None in the first version."""
        b, h, w, d = patches.shape
        if self.objectness is None:
            return None
        return self.objectness(lax.stop_gradient(patches).reshape(b, h * w, d))[..., 0]


def box_bias(rows: int, columns: int) -> Float[np.ndarray, "n 4"]:
    """Boxes before the sigmoid of a head that says nothing: see ``OpenVocabularyHead``. Row by row."""
    y, x = np.meshgrid(np.arange(1, rows + 1) / rows, np.arange(1, columns + 1) / columns, indexing="ij")
    boxes = np.stack([x, y, np.full(x.shape, 1 / columns), np.full(x.shape, 1 / rows)], axis=-1).reshape(-1, 4)
    # Kept off the ends, as published.
    return (np.log(boxes + 1e-4) - np.log1p(1e-4 - boxes)).astype(np.float32)


def _unit(x: Float[Array, "... e"]) -> Float[Array, "... e"]:
    """Of length one but for 1e-6 that is added to the norm, as published; zeros stay zeros, with finite gradients."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    return x / (norm + 1e-6)


def _zeros(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
    del key
    return jnp.zeros(shape)
