"""Deformable DETR (Zhu et al. 2021): a detector whose attention reads a few points of a pyramid's maps.

The numbers are those of fundamentalvision/Deformable-DETR, which published ResNet-50 with one level (39.4 AP on COCO
val2017; 41.5 with DC5), four levels (44.5), box refinement (46.2), and two stages (46.9).
"""

import math
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from eqvision.backbones import resnet
from eqvision.backbones.resnet import Norm
from eqvision.classifiers import Backbone
from eqvision.heads.per_layer import PerLayerHead
from eqvision.layers import Conv, GroupNorm, Implementation, LayerNorm, Linear, Remat, fold, normal, xavier_uniform
from eqvision.layers.deformable_transformer import (
    DeformableDecoder,
    DeformableEncoder,
    Masks,
    flatten_levels,
    flatten_masks,
    pixel_centres,
)
from eqvision.layers.detr_transformer import EPS
from eqvision.layers.sine_position import sine_position, size_mask
from eqvision.types import Features, PaddedImages, SetPredictions, SetProposals, TokenFeatures

TEMPERATURE = 1e4
# A logit whose sigmoid is 1 without gradient. The original has infinity, whose backward pass is 0 * inf = NaN in JAX.
OUTSIDE = 1e4


class LevelProjection(eqx.Module):
    """A convolution to the transformer's width and group normalisation (32 groups) over the whole map, padding too."""

    conv: Conv
    norm: GroupNorm

    def __init__(self, in_channels: int, width: int, kernel_size: int = 1, *, stride: int = 1, key: PRNGKeyArray):
        padding = kernel_size // 2
        options = {"stride": stride, "padding": padding, "use_bias": True, "init": xavier_uniform}
        self.conv = Conv(in_channels, width, kernel_size, **options, key=key)
        self.norm = GroupNorm(width, num_groups=32)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 d"]:
        return self.norm(self.conv(x))


class Queries(NamedTuple):
    """What the decoder starts from: features and position of each query, and a point (2) or a box (4) in [0, 1]."""

    content: Float[Array, "b q d"]
    position: Float[Array, "b q d"]
    reference: Float[Array, "b q _"]
    proposals: SetProposals | None


class LearnedQueries(eqx.Module):
    """Queries that are equal for all images; a linear layer turns the position into the reference point."""

    position: Float[Array, "q d"]
    content: Float[Array, "q d"]
    reference: Linear

    def __init__(self, count: int, width: int, *, key: PRNGKeyArray):
        keys = jax.random.split(key, 3)
        self.position = normal(keys[0], (count, width))
        self.content = normal(keys[1], (count, width))
        self.reference = Linear(width, 2, init=xavier_uniform, key=keys[2])

    def __call__(self, memory: Features, masks: Masks, head: PerLayerHead) -> Queries:
        del masks, head
        batch, dtype = memory[0].shape[0], memory[0].dtype
        point = jax.nn.sigmoid(self.reference(self.position))  # float32 whatever the compute type
        content, position, point = (
            jnp.broadcast_to(x, (batch, *x.shape)) for x in (self.content, self.position, point)
        )
        return Queries(content.astype(dtype), position.astype(dtype), point, None)


class ProposedQueries(eqx.Module):
    """Two stages (appendix A.4): the encoder proposes a box at every place, and the best ``count`` become queries.

    The choice and the boxes chosen are constants to the gradient. The score is the logit of the first class, which
    training makes that of any object. Places on padding, and within 1 % of the border, are not excluded from the
    choice: as in the original they score as the norm's bias does, and their box is the corner (1, 1, 1, 1).
    """

    project: Linear
    norm: LayerNorm
    embed: Linear
    embed_norm: LayerNorm
    count: int = eqx.field(static=True)

    def __init__(self, count: int, width: int, *, key: PRNGKeyArray):
        keys = jax.random.split(key)
        self.project = Linear(width, width, init=xavier_uniform, key=keys[0])
        self.norm = LayerNorm(width, eps=EPS)
        self.embed = Linear(2 * width, 2 * width, init=xavier_uniform, key=keys[1])
        self.embed_norm = LayerNorm(2 * width, eps=EPS)
        self.count = count

    def __call__(self, memory: Features, masks: Masks, head: PerLayerHead) -> Queries:
        tokens = flatten_levels(memory)
        if tokens.shape[1] < self.count:
            sizes = ", ".join(f"{x.shape[1]}x{x.shape[2]}" for x in memory)
            raise ValueError(
                f"{self.count} proposals are asked for, and maps of {sizes} have {tokens.shape[1]} places; "
                "use larger images or fewer queries"
            )
        logits, box_logits, valid = self.propose(tokens, masks, head)
        best = lax.top_k(logits[..., 0], self.count)[1]
        chosen = lax.stop_gradient(jnp.take_along_axis(box_logits, best[..., None], axis=1))
        boxes = jax.nn.sigmoid(chosen)
        embedded = sine_boxes(boxes, 2 * tokens.shape[-1]).astype(tokens.dtype)
        position, content = jnp.split(self.embed_norm(self.embed(embedded)), 2, axis=-1)
        return Queries(content, position, boxes, SetProposals(logits, jax.nn.sigmoid(box_logits), valid))

    def propose(
        self, tokens: Float[Array, "b s d"], masks: Masks, head: PerLayerHead
    ) -> tuple[Float[Array, "b s k"], Float[Array, "b s 4"], Bool[Array, "b s"]]:
        """Class logits and logits of a box at every place, and whether it is one that a box is proposed at."""
        grid, valid = grid_boxes(masks)
        tokens = self.norm(self.project(jnp.where(valid[..., None], tokens, 0))).astype(jnp.float32)
        classes, change = head.last()
        inner = jnp.where(valid[..., None], grid, 0.5)
        box_logits = jnp.where(valid[..., None], change(tokens) + jnp.log(inner / (1 - inner)), OUTSIDE)
        return classes(tokens), box_logits, valid


def grid_boxes(masks: Masks) -> tuple[Float[Array, "b s 4"], Bool[Array, "b s"]]:
    """A box at every place, its sides 0.05 of the image on the first level and doubling, and whether all four numbers
    are in (0.01, 0.99) and the place is image."""
    centres = pixel_centres(masks)
    counts = [mask.shape[1] * mask.shape[2] for mask in masks]
    side = jnp.concatenate([jnp.full((count,), 0.05 * 2.0**level) for level, count in enumerate(counts)])
    sides = jnp.broadcast_to(side[:, None], centres.shape)
    boxes = jnp.concatenate([centres, sides], axis=-1)
    inside = jnp.all((boxes > 0.01) & (boxes < 0.99), axis=-1)
    return boxes, inside & flatten_masks(masks)


def sine_boxes(boxes: Float[Array, "b q 4"], width: int) -> Float[Array, "b q w"]:
    """Sine and cosine of each coordinate, alternating: ``width / 4`` numbers for x, then y, width and height."""
    each = width // 4
    frequency = TEMPERATURE ** (2 * (jnp.arange(each) // 2) / each)
    angle = boxes[..., None] * (2 * math.pi) / frequency
    pairs = jnp.stack([jnp.sin(angle[..., 0::2]), jnp.cos(angle[..., 1::2])], axis=-1)
    return pairs.reshape(*boxes.shape[:2], width)


class DeformableDETR(eqx.Module):
    """Backbone, projections to one width, encoder, decoder, heads. Classes are sigmoids, without background.

    The coarsest maps of the backbone are read, at most three, and strided convolutions make further levels of them.
    """

    backbone: Backbone
    projections: tuple[LevelProjection, ...]
    level_embed: Float[Array, "l d"]
    encoder: DeformableEncoder
    queries: LearnedQueries | ProposedQueries
    decoder: DeformableDecoder
    head: PerLayerHead

    def __init__(
        self,
        backbone: Backbone,
        *,
        num_classes: int = 91,
        num_queries: int = 300,
        num_levels: int = 4,
        refine: bool = False,
        two_stage: bool = False,
        width: int = 256,
        num_heads: int = 8,
        mlp_dim: int = 1024,
        encoder_depth: int = 6,
        decoder_depth: int = 6,
        num_points: int = 4,
        dropout: float = 0.1,
        attention: Implementation = "xla",
        remat: Remat = "none",
        unroll: int = 1,
        key: PRNGKeyArray,
    ):
        """The defaults are the paper's with four levels; ``num_levels=1`` is its single-scale model.

        ``refine`` gives every decoder layer its own heads and lets it look where the box of the layer before lies.
        ``two_stage`` takes the queries from proposals of the encoder. ``attention`` is the implementation of the
        decoder's self-attention, ``remat`` what the backward pass of each encoder and decoder layer computes again.

        Raises ValueError for two stages without refinement, and for a width that is not a multiple of 32.
        """
        if two_stage and not refine:
            raise ValueError("two_stage=True needs refine=True: the decoder starts from boxes and moves them")
        if width % 32:
            raise ValueError(f"width {width} is not a multiple of 32, the groups of the projections' norms")
        keys = jax.random.split(key, 6)
        sizes = (width, num_heads, mlp_dim)
        options = {"num_levels": num_levels, "num_points": num_points, "dropout": dropout}
        options |= {"remat": remat, "unroll": unroll}
        self.backbone = backbone
        self.projections = _projections(backbone.channels, num_levels, width, key=keys[0])
        self.level_embed = normal(keys[1], (num_levels, width))
        self.encoder = DeformableEncoder(encoder_depth, *sizes, **options, key=keys[2])
        build = ProposedQueries if two_stage else LearnedQueries
        self.queries = build(num_queries, width, key=keys[3])
        self.decoder = DeformableDecoder(
            decoder_depth, *sizes, refine=refine, implementation=attention, **options, key=keys[4]
        )
        heads = decoder_depth + two_stage if refine else 1
        self.head = PerLayerHead(width, num_classes, heads, small_boxes=not two_stage, key=keys[5])

    def __call__(
        self,
        inputs: PaddedImages,
        state: eqx.nn.State,
        *,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> tuple[SetPredictions, eqx.nn.State]:
        """Images of any size, as long as the backbone takes it."""
        features, state = self.backbone(inputs.images, state, train=train, key=fold(key, 0))
        maps = self.project(features)
        return self.predict(maps, self.masks(inputs, maps), train=train, key=key), state

    def predict(
        self, maps: Features, masks: Masks, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> SetPredictions:
        """From the projected levels. What stands at padded places is read by nothing."""
        memory = self.encoder(maps, self.positions(maps, masks), masks, train=train, key=fold(key, 1))
        queries = self.queries(memory, masks, self.head)
        decoded = self.decoder(
            queries.content,
            queries.position,
            queries.reference,
            memory,
            masks,
            self.head.first(self.decoder.depth),
            train=train,
            key=fold(key, 2),
        )
        return SetPredictions(self.head.logits(decoded.hidden), decoded.boxes_cxcywh, queries.proposals)

    def project(self, features: Features | TokenFeatures) -> Features:
        """The levels that the transformer sees. The first extra one is made from the backbone's last map as it is,
        each further one from the level before."""
        pyramid = (features.patches,) if isinstance(features, TokenFeatures) else features
        taken = min(len(self.projections), 3, len(pyramid))
        maps = [project(x) for project, x in zip(self.projections, pyramid[-taken:], strict=False)]
        source = pyramid[-1]
        for project in self.projections[taken:]:
            source = project(source)
            maps.append(source)
        return tuple(maps)

    def masks(self, inputs: PaddedImages, maps: Features) -> Masks:
        """True on the places of each level that are image."""
        _, height, width, _ = inputs.images.shape
        return tuple(size_mask(inputs.size, (height, width), (x.shape[1], x.shape[2])) for x in maps)

    def positions(self, maps: Features, masks: Masks) -> Features:
        """Sine of the place in the image part, and a learned vector for the level."""
        width = self.level_embed.shape[1]
        sines = [sine_position(mask, width, offset=-0.5) for mask in masks]
        return tuple((sine + level).astype(maps[0].dtype) for sine, level in zip(sines, self.level_embed, strict=True))


def _projections(
    channels: tuple[int, ...], num_levels: int, width: int, *, key: PRNGKeyArray
) -> tuple[LevelProjection, ...]:
    taken = min(num_levels, 3, len(channels))
    keys = jax.random.split(key, num_levels)
    levels = [LevelProjection(inputs, width, key=keys[i]) for i, inputs in enumerate(channels[-taken:])]
    inputs = channels[-1]
    for i in range(taken, num_levels):
        levels.append(LevelProjection(inputs, width, 3, stride=2, key=keys[i]))
        inputs = width
    return tuple(levels)


def deformable_detr(
    depth: int = 50,
    *,
    num_classes: int = 91,
    num_queries: int = 300,
    num_levels: int = 4,
    refine: bool = False,
    two_stage: bool = False,
    dc5: bool = False,
    in_channels: int = 3,
    norm: Norm = "frozen",
    backbone_width: int = 64,
    width: int = 256,
    num_heads: int = 8,
    mlp_dim: int = 1024,
    encoder_depth: int = 6,
    decoder_depth: int = 6,
    num_points: int = 4,
    dropout: float = 0.1,
    attention: Implementation = "xla",
    remat: Remat = "none",
    unroll: int = 1,
    key: PRNGKeyArray,
) -> DeformableDETR:
    """Deformable DETR on a ResNet of ``depth``; for the options see ``DeformableDETR``.

    ``dc5`` keeps the last stage at stride 16 by dilation. ``norm="frozen"`` fixes the backbone's batch norms, which
    makes sense with pretrained weights only; ``batch`` trains them. ``backbone_width`` is that of the ResNet's stem.
    ``num_classes`` 91 are the ids of COCO.
    """
    keys = jax.random.split(key)
    return DeformableDETR(
        resnet(depth, in_channels=in_channels, norm=norm, dilate_last=dc5, width=backbone_width, key=keys[0]),
        num_classes=num_classes,
        num_queries=num_queries,
        num_levels=num_levels,
        refine=refine,
        two_stage=two_stage,
        width=width,
        num_heads=num_heads,
        mlp_dim=mlp_dim,
        encoder_depth=encoder_depth,
        decoder_depth=decoder_depth,
        num_points=num_points,
        dropout=dropout,
        attention=attention,
        remat=remat,
        unroll=unroll,
        key=keys[1],
    )
