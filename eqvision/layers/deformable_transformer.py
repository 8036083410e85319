"""The transformer of Deformable DETR (Zhu et al. 2021): every attention to the image reads a few points of each level.

Maps are tuples of levels, fine to coarse; masks are True on the part that is image. Reference points are (x, y) and
boxes (centre x, centre y, width, height), in [0, 1] of the part that is image. Multiplied by ``valid_ratios`` they are
in [0, 1] of the padded map, which is what ``DeformableAttention`` takes.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from eqvision.layers.attention import Attention, Implementation
from eqvision.layers.deformable_attention import DeformableAttention
from eqvision.layers.detr_transformer import EPS, check_stack, detr_attention, detr_mlp
from eqvision.layers.drop import check_rate, dropout, fold
from eqvision.layers.mlp import MLP
from eqvision.layers.norm import LayerNorm
from eqvision.layers.transformer import Remat, rematerialised
from eqvision.ops.collectives import vary_like
from eqvision.types import Features

Masks = tuple[Bool[Array, "b _ _"], ...]


@runtime_checkable
class BoxHead(Protocol):
    """What turns a query into the change of its box: four numbers that are added before the sigmoid."""

    def __call__(self, x: Float[Array, "... d"], /) -> Float[Array, "... 4"]: ...


class DeformableEncoderLayer(eqx.Module):
    """Deformable attention of every place to all levels, and an MLP; each sum is normalised (post-norm)."""

    attention: DeformableAttention
    norm1: LayerNorm
    mlp: MLP
    norm2: LayerNorm
    dropout: float = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_dim: int,
        *,
        num_levels: int = 4,
        num_points: int = 4,
        dropout: float = 0.1,
        key: PRNGKeyArray,
    ):
        check_rate("dropout", dropout)
        keys = jax.random.split(key)
        self.attention = DeformableAttention(
            width, num_heads, num_levels=num_levels, num_points=num_points, key=keys[0]
        )
        self.norm1 = LayerNorm(width, eps=EPS)
        self.mlp = detr_mlp(width, mlp_dim, "relu", dropout, key=keys[1])
        self.norm2 = LayerNorm(width, eps=EPS)
        self.dropout = dropout

    def __call__(
        self,
        x: Float[Array, "b s d"],
        position: Float[Array, "b s d"],
        reference: Float[Array, "b s l 2"],
        masks: Masks,
        *,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "b s d"]:
        maps = split_levels(x, masks)
        y = self.attention(x + position, reference, maps, masks)
        x = self.norm1(x + dropout(y, self.dropout, train=train, key=fold(key, 0)))
        return self.norm2(x + self.mlp(x, train=train, key=fold(key, 1)))


class DeformableDecoderLayer(eqx.Module):
    """Self-attention among the queries, deformable attention to the image, and an MLP; post-norm.

    ``norm1`` stands behind the self-attention, ``norm2`` behind the attention to the image (in the original code it
    is the other way round), ``norm3`` behind the MLP.
    """

    self_attention: Attention
    norm1: LayerNorm
    cross_attention: DeformableAttention
    norm2: LayerNorm
    mlp: MLP
    norm3: LayerNorm
    dropout: float = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_dim: int,
        *,
        num_levels: int = 4,
        num_points: int = 4,
        dropout: float = 0.1,
        implementation: Implementation = "xla",
        key: PRNGKeyArray,
    ):
        check_rate("dropout", dropout)
        keys = jax.random.split(key, 3)
        self.self_attention = detr_attention(width, num_heads, dropout, implementation, key=keys[0])
        self.norm1 = LayerNorm(width, eps=EPS)
        self.cross_attention = DeformableAttention(
            width, num_heads, num_levels=num_levels, num_points=num_points, key=keys[1]
        )
        self.norm2 = LayerNorm(width, eps=EPS)
        self.mlp = detr_mlp(width, mlp_dim, "relu", dropout, key=keys[2])
        self.norm3 = LayerNorm(width, eps=EPS)
        self.dropout = dropout

    def __call__(
        self,
        x: Float[Array, "b q d"],
        position: Float[Array, "b q d"],
        reference: Float[Array, "b q l _"],
        maps: Features,
        masks: Masks,
        *,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "b q d"]:
        query = x + position
        x = self.norm1(x + self.self_attention(query, query, x, train=train, key=fold(key, 0)))
        y = self.cross_attention(x + position, reference, maps, masks)
        x = self.norm2(x + dropout(y, self.dropout, train=train, key=fold(key, 1)))
        return self.norm3(x + self.mlp(x, train=train, key=fold(key, 2)))


class DeformableEncoder(eqx.Module):
    """``depth`` equal layers with stacked parameters, scanned. ``remat`` and ``unroll`` as in ``TransformerStack``."""

    layers: DeformableEncoderLayer
    depth: int = eqx.field(static=True)
    remat: Remat = eqx.field(static=True)
    unroll: int = eqx.field(static=True)

    def __init__(
        self,
        depth: int,
        width: int,
        num_heads: int,
        mlp_dim: int,
        *,
        num_levels: int = 4,
        num_points: int = 4,
        dropout: float = 0.1,
        remat: Remat = "none",
        unroll: int = 1,
        key: PRNGKeyArray,
    ):
        check_stack("DeformableEncoder", depth, remat)

        def layer(key: PRNGKeyArray) -> DeformableEncoderLayer:
            return DeformableEncoderLayer(
                width, num_heads, mlp_dim, num_levels=num_levels, num_points=num_points, dropout=dropout, key=key
            )

        self.layers = eqx.filter_vmap(layer)(jax.random.split(key, depth))
        self.depth = depth
        self.remat = remat
        self.unroll = unroll

    def __call__(
        self,
        maps: Features,
        positions: Features,
        masks: Masks,
        *,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> Features:
        """The same maps with what each place has read from the others."""
        position, reference = flatten_levels(positions), pixel_references(masks)

        def run(x, layer, index):
            return layer(x, position, reference, masks, train=train, key=fold(key, index))

        body = rematerialised(run, self.remat if train else "none")
        layers = (self.layers, jnp.arange(self.depth))
        x = lax.scan(lambda x, layer: (body(x, *layer), None), flatten_levels(maps), layers, unroll=self.unroll)[0]
        return split_levels(x, masks)


class Decoded(NamedTuple):
    """Queries behind each of ``l`` layers, and the boxes that they stand for."""

    hidden: Float[Array, "l b q d"]
    boxes_cxcywh: Float[Array, "l b q 4"]


class DeformableDecoder(eqx.Module):
    """``depth`` equal layers with stacked parameters, scanned. ``remat`` and ``unroll`` as in ``TransformerStack``.

    With ``refine`` every layer looks where the box of the layer before lies (iterative box refinement, section 4 of
    the paper); no gradient flows from one layer's box to the next. Else all look at the same reference points.
    """

    layers: DeformableDecoderLayer
    depth: int = eqx.field(static=True)
    num_points: int = eqx.field(static=True)
    refine: bool = eqx.field(static=True)
    remat: Remat = eqx.field(static=True)
    unroll: int = eqx.field(static=True)

    def __init__(
        self,
        depth: int,
        width: int,
        num_heads: int,
        mlp_dim: int,
        *,
        num_levels: int = 4,
        num_points: int = 4,
        dropout: float = 0.1,
        refine: bool = False,
        implementation: Implementation = "xla",
        remat: Remat = "none",
        unroll: int = 1,
        key: PRNGKeyArray,
    ):
        check_stack("DeformableDecoder", depth, remat)

        def layer(key: PRNGKeyArray) -> DeformableDecoderLayer:
            return DeformableDecoderLayer(
                width,
                num_heads,
                mlp_dim,
                num_levels=num_levels,
                num_points=num_points,
                dropout=dropout,
                implementation=implementation,
                key=key,
            )

        self.layers = eqx.filter_vmap(layer)(jax.random.split(key, depth))
        self.depth = depth
        self.num_points = num_points
        self.refine = refine
        self.remat = remat
        self.unroll = unroll

    def __call__(
        self,
        content: Float[Array, "b q d"],
        position: Float[Array, "b q d"],
        reference: Float[Array, "b q _"],
        maps: Features,
        masks: Masks,
        box_head: BoxHead,
        *,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> Decoded:
        """``reference`` holds points (2) or boxes (4). ``box_head`` is one for all layers, or with ``refine`` a
        stack of one for each."""
        content, position, reference = vary_like((content, position, reference), maps[0])
        ratios = valid_ratios(masks)

        def run(x, sampling, layer, index):
            return layer(x, position, sampling, maps, masks, train=train, key=fold(key, index))

        body = rematerialised(run, self.remat if train else "none")
        if self.refine:
            return self._refined(body, content, reference, ratios, masks, box_head)
        sampling = at_levels(reference, ratios)

        def step(x, layer):
            x = body(x, sampling, *layer)
            return x, x

        hidden = lax.scan(step, content, self._scanned(), unroll=self.unroll)[1]
        return Decoded(hidden, moved_boxes(box_head(hidden), reference))

    def _refined(self, body, content, reference, ratios, masks, box_heads) -> Decoded:
        def step(carry, scanned):
            x, boxes, sampling = carry
            layer, box_head = scanned
            x = body(x, sampling, *layer)
            boxes = moved_boxes(box_head(x), boxes)
            fixed = lax.stop_gradient(boxes)
            return (x, fixed, at_levels(fixed, ratios)), (x, boxes)

        start = (content, *self._start(reference, ratios, masks))
        return Decoded(*lax.scan(step, start, (self._scanned(), box_heads), unroll=self.unroll)[1])

    def _start(self, reference, ratios, masks):
        """Boxes before the first layer, and where it looks.

        A point becomes a box so that all layers are equal. Half the side is what the head's number is added to, since
        it is 0 before the sigmoid. And 2 * points pixels of each level are the side with which offsets count pixels,
        as they do from a point: the attention multiplies them by side / (2 * points).
        """
        sampling = at_levels(reference, ratios)
        if reference.shape[-1] == 4:
            return reference, sampling
        sides = jnp.array([[2 * self.num_points / length for length in mask.shape[:0:-1]] for mask in masks])
        boxes = jnp.concatenate([reference, jnp.full_like(reference, 0.5)], axis=-1)
        return boxes, jnp.concatenate([sampling, jnp.broadcast_to(sides, sampling.shape)], axis=-1)

    def _scanned(self):
        return self.layers, jnp.arange(self.depth)


def flatten_levels(maps: Features) -> Float[Array, "b s d"]:
    """All places of all levels, level after level and row after row."""
    return jnp.concatenate([x.reshape(x.shape[0], -1, x.shape[-1]) for x in maps], axis=1)


def flatten_masks(masks: Masks) -> Bool[Array, "b s"]:
    """The same of masks."""
    return jnp.concatenate([mask.reshape(mask.shape[0], -1) for mask in masks], axis=1)


def split_levels(x: Float[Array, "b s d"], masks: Masks) -> Features:
    """The way back, to maps of the masks' heights and widths."""
    maps, start = [], 0
    for mask in masks:
        end = start + mask.shape[1] * mask.shape[2]
        maps.append(x[:, start:end].reshape(*mask.shape, x.shape[-1]))
        start = end
    return tuple(maps)


def valid_sizes(masks: Masks) -> Float[Array, "b l 2"]:
    """Width and height of each level's image part, at least 1: a row that pads the batch has none, and no NaN."""
    sizes = [jnp.stack([jnp.sum(mask[:, 0, :], axis=1), jnp.sum(mask[:, :, 0], axis=1)], axis=-1) for mask in masks]
    return jnp.maximum(jnp.stack(sizes, axis=1), 1).astype(jnp.float32)


def valid_ratios(masks: Masks) -> Float[Array, "b l 2"]:
    """Which part of each level's width and height is image."""
    return valid_sizes(masks) / jnp.array([mask.shape[:0:-1] for mask in masks], jnp.float32)


def pixel_references(masks: Masks) -> Float[Array, "b s l 2"]:
    """The centre of every place, on every level: relative to the image part, times that level's valid ratio."""
    return (pixel_centres(masks)[:, :, None] * valid_ratios(masks)[:, None]).astype(jnp.float32)


def pixel_centres(masks: Masks) -> Float[Array, "b s 2"]:
    """The centre (x, y) of every place, in [0, 1] of the image part; above 1 on padding."""
    sizes, centres = valid_sizes(masks), []
    for level, mask in enumerate(masks):
        y, x = jnp.meshgrid(*(jnp.arange(length) + 0.5 for length in mask.shape[1:]), indexing="ij")
        centres.append(jnp.stack([x.reshape(-1), y.reshape(-1)], axis=-1) / sizes[:, level, None])
    return jnp.concatenate(centres, axis=1)


def at_levels(reference: Float[Array, "b q c"], ratios: Float[Array, "b l 2"]) -> Float[Array, "b q l c"]:
    """Points or boxes of the image part -> of each level's padded map."""
    ratios = ratios if reference.shape[-1] == 2 else jnp.concatenate([ratios, ratios], axis=-1)
    return reference[:, :, None] * ratios[:, None]


def inverse_sigmoid(x: Float[Array, "..."], eps: float = 1e-5) -> Float[Array, "..."]:
    """The logit, with both fractions at least ``eps``: finite on [0, 1] and outside."""
    x = jnp.clip(x, 0, 1)
    return jnp.log(jnp.maximum(x, eps) / jnp.maximum(1 - x, eps))


def moved_boxes(change: Float[Array, "*l b q 4"], reference: Float[Array, "b q _"]) -> Float[Array, "*l b q 4"]:
    """Boxes: the change is added to the logits of a reference box, or to those of a point's two coordinates."""
    known = inverse_sigmoid(reference)
    if known.shape[-1] == 2:
        known = jnp.concatenate([known, jnp.zeros_like(known)], axis=-1)
    return jax.nn.sigmoid(change + known)
