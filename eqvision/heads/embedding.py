"""From the features of a tower to one vector of the space that images and texts share (CLIP, SigLIP)."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.backbones.clip_text import pool_end
from eqvision.heads.classification import AttentionPool
from eqvision.layers import (
    Activation,
    Initializer,
    Linear,
    PositionEmbedding2D,
    attention,
    normal,
)
from eqvision.types import Features, TextTokens, TokenFeatures


class ClassTokenProjection(eqx.Module):
    """CLIP's ViT: a projection without bias of the class token, behind the backbone's final norm."""

    linear: Linear

    def __init__(self, width: int, embed_dim: int, *, key: PRNGKeyArray):
        self.linear = Linear(width, embed_dim, use_bias=False, init=_scaled(width), key=key)

    def __call__(self, features: TokenFeatures) -> Float[Array, "b e"]:
        if features.prefix.shape[1] == 0:
            raise ValueError("ClassTokenProjection reads the class token and the backbone has none: class_token=True")
        return self.linear(features.prefix[:, 0])


class EndTokenProjection(eqx.Module):
    """CLIP's text: a projection without bias of the end token; see ``pool_end`` for ``end_id``."""

    linear: Linear
    end_id: int | None = eqx.field(static=True)

    def __init__(self, width: int, embed_dim: int, *, end_id: int | None = None, key: PRNGKeyArray):
        self.linear = Linear(width, embed_dim, use_bias=False, init=_scaled(width), key=key)
        self.end_id = end_id

    def __call__(self, features: Float[Array, "b n d"], text: TextTokens) -> Float[Array, "b e"]:
        return self.linear(pool_end(features, text, end_id=self.end_id))


class AttentionMapPool(eqx.Module):
    """CLIP's ResNets: the mean of the coarsest map asks all its cells and itself (section 2.4), then a projection.

    Cells and mean have learned positions; those of the cells are resampled for a map of another size.
    """

    mean_position: Float[Array, " d"]
    position: PositionEmbedding2D
    query: Linear
    key: Linear
    value: Linear
    out: Linear
    num_heads: int = eqx.field(static=True)

    def __init__(self, grid: tuple[int, int], width: int, embed_dim: int, num_heads: int, *, key: PRNGKeyArray):
        if width % num_heads:
            raise ValueError(f"AttentionMapPool: width {width} cannot be split into {num_heads} heads of equal size")
        keys, init = jax.random.split(key, 6), _scaled(width)
        self.mean_position = normal(keys[0], (width,), width**-0.5)
        self.position = PositionEmbedding2D(grid, width, std=width**-0.5, key=keys[1])
        self.query = Linear(width, width, init=init, key=keys[2])
        self.key = Linear(width, width, init=init, key=keys[3])
        self.value = Linear(width, width, init=init, key=keys[4])
        self.out = Linear(width, embed_dim, init=init, key=keys[5])
        self.num_heads = num_heads

    def __call__(self, features: Features) -> Float[Array, "b e"]:
        x = features[-1]
        b, h, w, d = x.shape
        mean = jnp.mean(x.astype(jnp.float32), axis=(1, 2)).astype(x.dtype) + self.mean_position.astype(x.dtype)
        cells = (x + self.position((h, w)).astype(x.dtype)).reshape(b, h * w, d)
        tokens = jnp.concatenate([mean[:, None], cells], axis=1)
        query, key, value = self.query(mean[:, None]), self.key(tokens), self.value(tokens)
        mixed = attention(*(y.reshape(b, -1, self.num_heads, d // self.num_heads) for y in (query, key, value)))
        return self.out(mixed.reshape(b, d))


class AttentionPoolEmbedding(eqx.Module):
    """SigLIP's images: attention pooling over all tokens and nothing behind it."""

    pool: AttentionPool

    def __init__(
        self, width: int, num_heads: int, mlp_dim: int, *, activation: Activation, eps: float, key: PRNGKeyArray
    ):
        self.pool = AttentionPool(width, num_heads, mlp_dim, activation=activation, eps=eps, key=key)

    def __call__(self, features: TokenFeatures) -> Float[Array, "b d"]:
        b, h, w, d = features.patches.shape
        return self.pool(jnp.concatenate([features.prefix, features.patches.reshape(b, h * w, d)], axis=1))


class LastTokenProjection(eqx.Module):
    """SigLIP's texts: a linear layer with bias of the last place, which is padding in all but the longest texts.

    Texts must therefore be filled up to the length that the model was trained with.
    """

    linear: Linear

    def __init__(self, width: int, embed_dim: int, *, key: PRNGKeyArray):
        self.linear = Linear(width, embed_dim, init=_scaled(width), key=key)

    def __call__(self, features: Float[Array, "b n d"], text: TextTokens) -> Float[Array, "b e"]:
        del text
        return self.linear(features[:, -1])


def _scaled(width: int) -> Initializer:
    return lambda key, shape: normal(key, shape, width**-0.5)
