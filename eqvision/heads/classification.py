"""From features to logits. Logits are float32 whatever the compute type."""

from typing import Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.layers import MLP, Activation, Attention, Initializer, LayerNorm, Linear, truncated_normal
from eqvision.types import Features, TokenFeatures

TokenPool = Literal["token", "mean", "token_mean", "map", "none"]
Logits = Float[Array, "b ... k"]


def zeros(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """The initialiser of a head that starts with equal logits, as BiT and ViT fine-tuning do."""
    del key
    return jnp.zeros(shape)


class MapHead(eqx.Module):
    """Global average of the coarsest map, then a linear layer: the head of ResNets."""

    linear: Linear

    def __init__(self, in_channels: int, num_classes: int, *, init: Initializer = truncated_normal, key: PRNGKeyArray):
        self.linear = Linear(in_channels, num_classes, init=init, key=key)

    def __call__(
        self, features: Features, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "b k"], eqx.nn.State]:
        del train, key
        return self.linear(self.pooled(features)), state

    def pooled(self, features: Features) -> Float[Array, "b d"]:
        """What the linear layer reads, in float32."""
        return jnp.mean(features[-1].astype(jnp.float32), axis=(1, 2))

    def reset(self, num_classes: int, *, key: PRNGKeyArray) -> "MapHead":
        return MapHead(self.linear.weight.shape[0], num_classes, key=key)


class AttentionPool(eqx.Module):
    """Multi-head attention pooling (MAP; Lee et al. 2019, Zhai et al. 2022): one learned query reads all tokens."""

    probe: Float[Array, "1 d"]
    attention: Attention
    norm: LayerNorm
    mlp: MLP

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_dim: int,
        *,
        activation: Activation = "gelu_tanh",
        eps: float = 1e-6,
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key, 3)
        self.probe = truncated_normal(keys[0], (1, width), width**-0.5)
        self.attention = Attention(width, num_heads, key=keys[1])
        self.norm = LayerNorm(width, eps=eps)
        self.mlp = MLP(width, mlp_dim, activation=activation, key=keys[2])

    def __call__(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b d"]:
        probe = jnp.broadcast_to(self.probe.astype(tokens.dtype), (tokens.shape[0], *self.probe.shape))
        pooled = self.attention(probe, tokens)
        return (pooled + self.mlp(self.norm(pooled)))[:, 0]


class TokenHead(eqx.Module):
    """Pools a transformer's tokens and classifies.

    ``token`` reads the class token, ``mean`` averages the patches, ``token_mean`` has the class token and then the
    average (DINOv2's linear heads), ``map`` pools by attention over all tokens, ``none`` gives logits for every
    token, prefix first. ``norm`` normalises what is pooled (timm's ``fc_norm``, for backbones without a final norm).
    ``pre_logits`` is the tanh layer of the original ImageNet-21k ViT.
    """

    pool: TokenPool = eqx.field(static=True)
    map_pool: AttentionPool | None
    norm: LayerNorm | None
    pre_logits: Linear | None
    linear: Linear

    def __init__(
        self,
        width: int,
        num_classes: int,
        *,
        pool: TokenPool = "token",
        map_pool: AttentionPool | None = None,
        norm: LayerNorm | None = None,
        pre_logits: int | None = None,
        init: Initializer = truncated_normal,
        key: PRNGKeyArray,
    ):
        if pool not in get_args(TokenPool):
            raise ValueError(f"pool {pool!r} is unknown; choose from {get_args(TokenPool)}")
        if (pool == "map") != (map_pool is not None):
            raise ValueError("pool='map' needs map_pool=AttentionPool(...), and no other pool takes it")
        keys = jax.random.split(key)
        self.pool = pool
        self.map_pool = map_pool
        self.norm = norm
        width = 2 * width if pool == "token_mean" else width
        self.pre_logits = None if pre_logits is None else Linear(width, pre_logits, key=keys[0])
        self.linear = Linear(width if pre_logits is None else pre_logits, num_classes, init=init, key=keys[1])

    def __call__(
        self, features: TokenFeatures, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[Logits, eqx.nn.State]:
        del train, key
        return self.linear(self.pooled(features)), state

    def pooled(self, features: TokenFeatures) -> Float[Array, "b ... d"]:
        """What the linear layer reads, in float32: behind the pre-logits layer where there is one."""
        pooled = self._pool(features)
        if self.norm is not None:
            pooled = self.norm(pooled)
        if self.pre_logits is not None:
            pooled = jnp.tanh(self.pre_logits(pooled))
        return pooled.astype(jnp.float32)

    def _pool(self, features: TokenFeatures) -> Float[Array, "b ... d"]:
        if self.pool in ("token", "token_mean") and features.prefix.shape[1] == 0:
            raise ValueError(
                f"pool={self.pool!r} reads the class token and the backbone has none; use pool='mean' or 'map'"
            )
        if self.pool == "token":
            return features.prefix[:, 0]
        if self.pool in ("mean", "token_mean"):
            mean = jnp.mean(features.patches.astype(jnp.float32), axis=(1, 2))
            return mean if self.pool == "mean" else jnp.concatenate([features.prefix[:, 0], mean], axis=-1)
        b, h, w, d = features.patches.shape
        tokens = jnp.concatenate([features.prefix, features.patches.reshape(b, h * w, d)], axis=1)
        return tokens if self.map_pool is None else self.map_pool(tokens)

    def reset(self, num_classes: int, *, key: PRNGKeyArray) -> "TokenHead":
        """The same pooling with a new linear layer; pre-logits go with the old head."""
        width = self.linear.weight.shape[0] if self.pre_logits is None else self.pre_logits.weight.shape[0]
        width = width // 2 if self.pool == "token_mean" else width
        return TokenHead(width, num_classes, pool=self.pool, map_pool=self.map_pool, norm=self.norm, key=key)


class DistilledHead(eqx.Module):
    """DeiT's two linear layers (Touvron et al. 2021): of the class token and of the distillation token behind it.

    The logits are the mean of both, in inference and in training.
    """

    linear: Linear
    linear_distilled: Linear

    def __init__(self, width: int, num_classes: int, *, init: Initializer = truncated_normal, key: PRNGKeyArray):
        keys = jax.random.split(key)
        self.linear = Linear(width, num_classes, init=init, key=keys[0])
        self.linear_distilled = Linear(width, num_classes, init=init, key=keys[1])

    def __call__(
        self, features: TokenFeatures, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "b k"], eqx.nn.State]:
        del train, key
        token, distilled = self._tokens(features)
        return (self.linear(token) + self.linear_distilled(distilled)) / 2, state

    def pooled(self, features: TokenFeatures) -> Float[Array, "b d"]:
        """The mean of what the two linear layers read, in float32: timm's features of these models."""
        token, distilled = self._tokens(features)
        return (token + distilled) / 2

    def _tokens(self, features: TokenFeatures) -> tuple[Float[Array, "b d"], Float[Array, "b d"]]:
        if features.prefix.shape[1] < 2:
            raise ValueError(
                f"DistilledHead reads a class token and a distillation token, and the backbone gives "
                f"{features.prefix.shape[1]} prefix tokens; build it with distillation_token=True"
            )
        prefix = features.prefix.astype(jnp.float32)
        return prefix[:, 0], prefix[:, 1]

    def reset(self, num_classes: int, *, key: PRNGKeyArray) -> "DistilledHead":
        return DistilledHead(self.linear.weight.shape[0], num_classes, key=key)
