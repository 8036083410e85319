"""Heads of DETR-like detectors: a class and a box for every query, and DETR's panoptic masks."""

import math
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from eqvision.layers import Conv, GroupNorm, Linear, uniform, xavier_uniform
from eqvision.layers.torch_init import torch_linear
from eqvision.ops.torch_resize import resize_nearest


class BoxMLP(eqx.Module):
    """Linear layers with ReLU between them; the last gives four numbers, of which the sigmoid is a box."""

    layers: tuple[Linear, ...]

    def __init__(self, width: int, *, depth: int = 3, key: PRNGKeyArray):
        widths = (*(width for _ in range(depth)), 4)
        keys = jax.random.split(key, depth)
        self.layers = tuple(torch_linear(widths[i], widths[i + 1], key=keys[i]) for i in range(depth))

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... 4"]:
        """Before the sigmoid, in float32."""
        x = x.astype(jnp.float32)
        for i, layer in enumerate(self.layers):
            x = layer(jax.nn.relu(x) if i else x)
        return x


class SetPredictionHead(eqx.Module):
    """DETR's head: ``num_classes`` logits and, last, one for no object; a box by an MLP of three layers."""

    classes: Linear
    boxes: BoxMLP

    def __init__(self, width: int, num_classes: int, *, key: PRNGKeyArray):
        keys = jax.random.split(key)
        self.classes = torch_linear(width, num_classes + 1, key=keys[0])
        self.boxes = BoxMLP(width, key=keys[1])

    def __call__(self, queries: Float[Array, "... d"]) -> tuple[Float[Array, "... k"], Float[Array, "... 4"]]:
        """Logits, and boxes (cxcywh in [0, 1] of the part that is image), both float32."""
        queries = queries.astype(jnp.float32)
        return self.classes(queries), jax.nn.sigmoid(self.boxes(queries))

    def reset(self, num_classes: int, *, key: PRNGKeyArray) -> "SetPredictionHead":
        """The same boxes with fresh classes."""
        classes = torch_linear(self.classes.weight.shape[0], num_classes + 1, key=key)
        return eqx.tree_at(lambda head: head.classes, self, classes)


class AttentionMaps(eqx.Module):
    """Where each query looks: softmax of query and key products over all places and heads together."""

    query: Linear
    key: Linear
    num_heads: int = eqx.field(static=True)

    def __init__(self, width: int, num_heads: int, *, key: PRNGKeyArray):
        keys = jax.random.split(key)
        self.query = Linear(width, width, init=xavier_uniform, key=keys[0])
        self.key = Linear(width, width, init=xavier_uniform, key=keys[1])
        self.num_heads = num_heads

    def __call__(
        self, queries: Float[Array, "b q d"], memory: Float[Array, "b h w d"], mask: Bool[Array, "b h w"]
    ) -> Float[Array, "b q h w n"]:
        """Zero where ``mask`` is False; float32."""
        query, key = (x.reshape(*x.shape[:-1], self.num_heads, -1) for x in (self.query(queries), self.key(memory)))
        scale = query.shape[-1] ** -0.5
        logits = jnp.einsum("bqnd,bhwnd->bqhwn", query * scale, key, preferred_element_type=jnp.float32)
        inside = mask[:, None, :, :, None]
        weights = jax.nn.softmax(jnp.where(inside, logits, jnp.finfo(jnp.float32).min), axis=(2, 3, 4))
        return jnp.where(inside, weights, 0.0)


class ConvGroupNorm(eqx.Module):
    """3x3 convolution with bias, group norm, ReLU."""

    conv: Conv
    norm: GroupNorm

    def __init__(self, in_channels: int, out_channels: int, *, key: PRNGKeyArray):
        self.conv = _conv(in_channels, out_channels, 3, key=key)
        self.norm = GroupNorm(out_channels, num_groups=min(8, out_channels))

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h w o"]:
        return jax.nn.relu(self.norm(self.conv(x)))


class FPNStage(eqx.Module):
    """The backbone's next finer map is added to what there is, which grows to its size, and refined."""

    adapter: Conv
    refine: ConvGroupNorm

    def __init__(self, map_channels: int, in_channels: int, out_channels: int, *, key: PRNGKeyArray):
        keys = jax.random.split(key)
        self.adapter = _conv(map_channels, in_channels, 1, key=keys[0])
        self.refine = ConvGroupNorm(in_channels, out_channels, key=keys[1])

    def __call__(self, x: Float[Array, "bq h w i"], finer: Float[Array, "b h2 w2 c"]) -> Float[Array, "bq h2 w2 o"]:
        adapted = self.adapter(finer)
        # The same for all queries of an image, so it is repeated after the convolution and not before it.
        adapted = jnp.repeat(adapted, x.shape[0] // finer.shape[0], axis=0)
        return self.refine(adapted + resize_nearest(x, (finer.shape[1], finer.shape[2])))


class MaskInputs(NamedTuple):
    """What the mask head reads besides the queries: the map before and behind the encoder, and finer maps."""

    projected: Float[Array, "b h w d"]
    memory: Float[Array, "b h w d"]
    mask: Bool[Array, "b h w"]
    """True on the image."""
    finer: tuple[Float[Array, "b _ _ _"], ...]
    """The three next finer maps of the backbone, coarse to fine."""


class PanopticMaskHead(eqx.Module):
    """A mask for every query (Carion et al. 2020, section 4.4): attention maps, refined with the backbone's finer maps.

    Its layers are facebookresearch/detr's ``MHAttentionMap`` and ``MaskHeadSmallConv``. Group norms see the padding
    too, so masks depend on it a little, there as here. Memory grows with queries times the finest map.
    """

    attention: AttentionMaps
    first: ConvGroupNorm
    second: ConvGroupNorm
    stages: tuple[FPNStage, ...]
    out: Conv

    def __init__(self, width: int, num_heads: int, map_channels: tuple[int, ...], *, key: PRNGKeyArray):
        """``map_channels`` are those of the three finer maps, coarse to fine. Raises ValueError for other numbers."""
        if len(map_channels) != 3 or width % 16 or (width + num_heads) % 8:
            raise ValueError(
                f"PanopticMaskHead needs three finer maps, a width that 16 divides and width + num_heads that 8 "
                f"divides; got {len(map_channels)} maps, width {width}, num_heads {num_heads}"
            )
        keys = jax.random.split(key, 7)
        widths = [width // 2**i for i in (1, 2, 3, 4)]
        self.attention = AttentionMaps(width, num_heads, key=keys[0])
        self.first = ConvGroupNorm(width + num_heads, width + num_heads, key=keys[1])
        self.second = ConvGroupNorm(width + num_heads, widths[0], key=keys[2])
        self.stages = tuple(FPNStage(map_channels[i], widths[i], widths[i + 1], key=keys[3 + i]) for i in range(3))
        self.out = _conv(widths[3], 1, 3, key=keys[6])

    def __call__(self, queries: Float[Array, "b q d"], inputs: MaskInputs) -> Float[Array, "b q h2 w2"]:
        """Logits, float32, at the size of the finest map."""
        maps = self.attention(queries, inputs.memory, inputs.mask).astype(inputs.projected.dtype)
        b, q, h, w, n = maps.shape
        projected = jnp.repeat(inputs.projected, q, axis=0)
        x = self.second(self.first(jnp.concatenate([projected, maps.reshape(b * q, h, w, n)], axis=-1)))
        for stage, finer in zip(self.stages, inputs.finer, strict=True):
            x = stage(x, finer)
        masks = self.out(x).astype(jnp.float32)
        return masks.reshape(b, q, *masks.shape[1:3])


def _conv(in_channels: int, out_channels: int, kernel_size: int, *, key: PRNGKeyArray) -> Conv:
    """He-uniform with gain 1 and no bias to begin with, as published."""
    limit = math.sqrt(3 / (in_channels * kernel_size**2))
    return Conv(
        in_channels,
        out_channels,
        kernel_size,
        padding=kernel_size // 2,
        use_bias=True,
        init=lambda key, shape: uniform(key, shape, limit),
        key=key,
    )
