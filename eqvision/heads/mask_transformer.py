"""Heads of Segmenter (Strudel et al. 2021) on the patches of a vision transformer."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.heads.segmentation import MapLogits
from eqvision.layers import LayerNorm, Linear, TransformerStack, truncated_normal
from eqvision.types import TokenFeatures

DEPTH, HEAD_WIDTH = 2, 64  # blocks of the mask transformer, and channels of each of its heads


class PatchLinearHead(eqx.Module):
    """A linear layer of each patch: Segmenter's "Linear" decoder."""

    linear: Linear

    def __init__(self, width: int, num_classes: int, *, key: PRNGKeyArray):
        self.linear = Linear(width, num_classes, init=truncated_normal, key=key)

    def __call__(
        self, features: TokenFeatures, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[MapLogits, eqx.nn.State]:
        del train, key
        return self.linear(features.patches.astype(jnp.float32)), state

    def reset(self, num_classes: int, *, key: PRNGKeyArray) -> "PatchLinearHead":
        """A fresh head for another number of classes."""
        return PatchLinearHead(self.linear.weight.shape[0], num_classes, key=key)


class MaskTransformerHead(eqx.Module):
    """Patches and a learned embedding of each class through transformer blocks; logits are their scalar products.

    Both are projected and brought to length 1 before, and the logits of all classes normalised behind, as in
    rstrudel/segmenter. ``depth`` blocks (2) have as many heads as the encoder, each of 64 channels, in float32 from the
    projections on.
    """

    projection: Linear
    classes: Float[Array, "k d"]
    blocks: TransformerStack
    norm: LayerNorm
    patch_projection: Float[Array, "d d"]
    class_projection: Float[Array, "d d"]
    mask_norm: LayerNorm

    def __init__(
        self,
        width: int,
        num_classes: int,
        *,
        depth: int = DEPTH,
        num_heads: int | None = None,
        dropout: float = 0.1,
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key, 5)
        heads = width // HEAD_WIDTH if num_heads is None else num_heads
        self.projection = Linear(width, width, init=truncated_normal, key=keys[0])
        self.classes = truncated_normal(keys[1], (num_classes, width))
        self.blocks = TransformerStack(depth, width, heads, 4 * width, eps=1e-5, dropout=dropout, key=keys[2])
        self.norm = LayerNorm(width, eps=1e-5)
        self.patch_projection = truncated_normal(keys[3], (width, width), width**-0.5)
        self.class_projection = truncated_normal(keys[4], (width, width), width**-0.5)
        self.mask_norm = LayerNorm(num_classes, eps=1e-5)

    def __call__(
        self, features: TokenFeatures, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[MapLogits, eqx.nn.State]:
        b, h, w, d = features.patches.shape
        patches = self.projection(features.patches.reshape(b, h * w, d))
        classes = jnp.broadcast_to(self.classes.astype(patches.dtype), (b, *self.classes.shape))
        x = self.norm(self.blocks(jnp.concatenate([patches, classes], axis=1), train=train, key=key))
        x = x.astype(jnp.float32)
        patches, classes = x[:, : h * w] @ self.patch_projection, x[:, h * w :] @ self.class_projection
        masks = jnp.einsum("bnd,bkd->bnk", _unit(patches), _unit(classes))
        return self.mask_norm(masks).reshape(b, h, w, -1), state

    def reset(self, num_classes: int, *, key: PRNGKeyArray) -> "MaskTransformerHead":
        """The same blocks with fresh embeddings of the classes and a fresh last norm."""
        classes = truncated_normal(key, (num_classes, self.classes.shape[1]))
        fresh = (classes, LayerNorm(num_classes, eps=1e-5))
        return eqx.tree_at(lambda head: (head.classes, head.mask_norm), self, fresh)


def _unit(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """Vectors of length 1; the smallest length that counts keeps gradients finite."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))
