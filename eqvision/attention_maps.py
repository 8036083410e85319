"""Where a vision transformer looks: the attention of its classifying query over the patches, and its rollout."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from eqvision.backbones import HybridViT, VisionTransformer
from eqvision.classifiers import Classifier
from eqvision.layers import TransformerBlock
from eqvision.types import Images

Weights = Float[Array, "layers heads n n"]  # layer, head, query, key; each row sums to 1


class AttentionMaps(NamedTuple):
    """Shares of attention on the grid of patches.

    ``heads`` is what the query gives to each patch in every layer and head; what it gives to the class token and
    registers is left out, so the sum of a map is at most 1. ``rollout`` is the share of each patch in the query's
    last representation, over all layers.
    """

    heads: Float[np.ndarray, "layers heads rows columns"]
    rollout: Float[np.ndarray, "rows columns"]
    query: str


def attention_maps(model: Classifier, images: Images) -> AttentionMaps:
    """Maps of one (normalised) image, ``images`` of shape [1 h w c].

    The query is the class token where the model has one, else the mean over all patches as queries. Raises
    ValueError for a model without a transformer over patches.
    """
    transformer = _transformer(model)
    weights, grid = _weights(model, images)
    first = weights.shape[-1] - grid[0] * grid[1]  # class token and registers come before the patches
    has_class = transformer.class_token is not None
    heads, rolled = _from_query(weights, first, has_class), _from_query(rollout(weights), first, has_class)
    query = "class token" if has_class else "patches (mean)"
    return AttentionMaps(_maps(heads, first, grid), _maps(rolled, first, grid), query)


def attention_weights(model: Classifier, images: Images) -> Float[Array, "layers b heads n n"]:
    """Softmax weights of every block in inference, in float32. Raises as ``attention_maps``."""
    return _block_weights(_transformer(model), _tokens(model, images)[0])


def rollout(weights: Weights) -> Float[Array, "n n"]:
    """Attention rollout (Abnar & Zuidema 2020, section 3): layer by layer, half the mean over heads, half the residual.

    Row i holds the shares of the input tokens in token i after the last layer; it sums to 1.
    """
    size = weights.shape[-1]
    mixed = 0.5 * jnp.mean(weights, axis=1) + 0.5 * jnp.eye(size)
    return jax.lax.scan(lambda product, layer: (layer @ product, None), jnp.eye(size), mixed)[0]


def _transformer(model: Classifier) -> VisionTransformer:
    backbone = model.backbone
    if isinstance(backbone, HybridViT):
        return backbone.vit
    if isinstance(backbone, VisionTransformer):
        return backbone
    raise ValueError(
        f"attention maps need a vision transformer (vit_*, deit_*, hybrid ViTs), but this model's backbone is "
        f"{type(backbone).__name__}, which has no attention over patches"
    )


@eqx.filter_jit
def _weights(model: Classifier, images: Images) -> tuple[Weights, tuple[int, int]]:
    tokens, grid = _tokens(model, images)
    return _block_weights(_transformer(model), tokens)[:, 0], grid


def _tokens(model: Classifier, images: Images) -> tuple[Float[Array, "b n d"], tuple[int, int]]:
    backbone = model.backbone
    maps = backbone.stem(images) if isinstance(backbone, HybridViT) else images
    return _transformer(model)._embed(maps)


def _block_weights(transformer: VisionTransformer, tokens: Float[Array, "b n d"]) -> Float[Array, "layers b heads n n"]:
    def run(x: Float[Array, "b n d"], block: TransformerBlock):
        return block(x), _softmax(block, block.norm1(x) if block.norm_order == "pre" else x)

    return jax.lax.scan(run, tokens, transformer.encoder.blocks)[1]


def _softmax(block: TransformerBlock, x: Float[Array, "b n d"]) -> Float[Array, "b heads n n"]:
    """The weights that ``layers.attention`` computes and does not keep."""
    layer, (b, n, d) = block.attention, x.shape
    width = d // layer.num_heads
    query, key = (project(x).reshape(b, n, layer.num_heads, width) for project in (layer.query, layer.key))
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    return jax.nn.softmax(logits * width**-0.5)


def _from_query(weights: Float[Array, "*lead n n"], first: int, has_class: bool) -> Float[Array, "*lead n"]:
    return weights[..., 0, :] if has_class else jnp.mean(weights[..., first:, :], axis=-2)


def _maps(rows: Float[Array, "*lead n"], first: int, grid: tuple[int, int]) -> Float[np.ndarray, "*lead rows columns"]:
    patches = np.asarray(rows[..., first:])
    return patches.reshape(*patches.shape[:-1], *grid)
