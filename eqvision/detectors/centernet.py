"""CenterNet (Zhou et al. 2019, "Objects as Points"): an object is the cell of its centre, and is read from there."""

from typing import Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from eqvision.backbones import dla, hourglass_104, resnet
from eqvision.backbones.resnet import Norm
from eqvision.classifiers import Backbone
from eqvision.heads.centernet import CenterHead
from eqvision.layers import fold
from eqvision.layers.sine_position import size_mask
from eqvision.necks import DeconvUp, DLAUp
from eqvision.necks.conv_block import Convolution
from eqvision.ops.boxes import cxcywh_to_xyxy
from eqvision.ops.heatmap import keep_peaks, read_cells, top_peaks
from eqvision.types import CenterPredictions, Detections, Features, PaddedImages, TokenFeatures

STRIDE = 4  # pixels per cell of every published model


@runtime_checkable
class MapNeck(Protocol):
    """What a CenterNet needs of a neck."""

    channels: tuple[int, ...]
    strides: tuple[int, ...]

    def __call__(
        self, features: Features, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[Features, eqx.nn.State]: ...


class CenterNet(eqx.Module):
    """Backbone, neck (if any), and the head, which reads the last map, or the last of each stack of an hourglass.

    All maps that it reads have the stride ``stride``. Padding is not masked on the way: the loss and
    ``decode_centers`` leave its cells out.
    """

    backbone: Backbone
    neck: MapNeck | None
    head: CenterHead
    stride: int = eqx.field(static=True)

    def __init__(self, backbone: Backbone, neck: MapNeck | None, head: CenterHead):
        """Raises ValueError where head and maps do not fit together."""
        last = backbone if neck is None else neck
        channels, strides = last.channels[-head.stacks :], last.strides[-head.stacks :]
        if channels != (head.in_channels,) * head.stacks or len(set(strides)) > 1:
            raise ValueError(
                f"CenterNet: its head reads {head.stacks} map(s) of {head.in_channels} channels and one stride, and "
                f"the maps of its {'backbone' if neck is None else 'neck'} have {last.channels} channels and strides "
                f"{last.strides}; build the head for the last of these, with stacks=1 unless they are alike"
            )
        self.backbone = backbone
        self.neck = neck
        self.head = head
        self.stride = strides[0]

    def __call__(
        self, inputs: PaddedImages, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[CenterPredictions, eqx.nn.State]:
        """Images of any size that the backbone takes."""
        maps, state = self.backbone(inputs.images, state, train=train, key=fold(key, 0))
        assert not isinstance(maps, TokenFeatures)
        if self.neck is not None:
            maps, state = self.neck(maps, state, train=train, key=fold(key, 1))
        return self.head(maps), state

    def intermediates(
        self, inputs: PaddedImages, state: eqx.nn.State, layers: tuple[int, ...]
    ) -> tuple[Float[Array, "..."] | TokenFeatures, ...]:
        """Features of the backbone's ``layers``."""
        return self.backbone.intermediates(inputs.images, state, layers)


def decode_centers(
    predictions: CenterPredictions,
    input_size: Int[Array, "b 2"],
    size: Int[Array, "b 2"],
    *,
    count: int = 100,
    stride: int = STRIDE,
) -> Detections:
    """The ``count`` highest peaks of the last stack's heatmaps, best first; nothing else is suppressed, or clipped.

    ``input_size`` is height and width of the part of the batch that is image, outside which no peak counts; ``size``
    that of the image that the boxes shall be in: of the original for evaluation. Widths and heights below 0 count
    as 0. ``valid`` is False on rows behind the last peak. In float32.
    """
    logits, sizes, offsets = (each[-1].astype(jnp.float32) for each in predictions)
    height, width = logits.shape[1:3]
    inside = size_mask(input_size, (height * stride, width * stride), (height, width))
    heatmap = jnp.where(inside[..., None], jax.nn.sigmoid(logits), 0.0)
    scores, labels, cells = top_peaks(keep_peaks(heatmap), count)
    centres = cells[..., ::-1] + read_cells(offsets, cells)
    boxes_cxcywh = jnp.concatenate([centres, jnp.maximum(read_cells(sizes, cells), 0.0)], axis=-1)
    scale = stride * size[:, ::-1].astype(jnp.float32) / jnp.maximum(input_size[:, ::-1], 1)
    boxes = cxcywh_to_xyxy(boxes_cxcywh) * jnp.tile(scale, 2)[:, None]
    return Detections(boxes, scores, labels, scores > 0)


def centernet_resnet(
    depth: int = 18,
    *,
    num_classes: int = 80,
    in_channels: int = 3,
    norm: Norm = "batch",
    conv: Convolution = "deformable",
    width: int = 64,
    up_widths: tuple[int, ...] = (256, 128, 64),
    head_width: int = 64,
    key: PRNGKeyArray,
) -> CenterNet:
    """On a ResNet whose last map is doubled three times; published for the depths 18 and 101.

    ``conv="plain"`` has ordinary convolutions in the neck, which are faster, in place of deformable ones. ``width`` is
    that of the ResNet's first stage.
    """
    keys = jax.random.split(key, 3)
    backbone = resnet(depth, in_channels=in_channels, norm=norm, width=width, key=keys[0])
    neck = DeconvUp(backbone.channels, backbone.strides, widths=up_widths, conv=conv, norm=norm, key=keys[1])
    return CenterNet(backbone, neck, CenterHead(neck.channels[0], num_classes, width=head_width, key=keys[2]))


def centernet_r18_dcn(
    *,
    num_classes: int = 80,
    in_channels: int = 3,
    norm: Norm = "batch",
    conv: Convolution = "deformable",
    head_width: int = 64,
    key: PRNGKeyArray,
) -> CenterNet:
    """The smallest of the paper's models: AP 28.1 on COCO, at 512 pixels and without flipping."""
    return centernet_resnet(
        18, num_classes=num_classes, in_channels=in_channels, norm=norm, conv=conv, head_width=head_width, key=key
    )


def centernet_dla34(
    *,
    num_classes: int = 80,
    in_channels: int = 3,
    norm: Norm = "batch",
    conv: Convolution = "deformable",
    head_width: int = 256,
    key: PRNGKeyArray,
) -> CenterNet:
    """On DLA-34 with its own upsampling: AP 37.4. Heights and widths of images are multiples of 32.

    ``conv`` as in ``centernet_resnet``.
    """
    keys = jax.random.split(key, 3)
    backbone = dla("34", in_channels=in_channels, norm=norm, key=keys[0])
    neck = DLAUp(backbone.channels, backbone.strides, conv=conv, norm=norm, key=keys[1])
    return CenterNet(backbone, neck, CenterHead(neck.channels[0], num_classes, width=head_width, key=keys[2]))


def centernet_hourglass104(
    *,
    num_classes: int = 80,
    in_channels: int = 3,
    norm: Norm = "batch",
    head_width: int = 256,
    key: PRNGKeyArray,
) -> CenterNet:
    """On two hourglasses, with a head for each: AP 40.3. It has no deformable convolutions."""
    keys = jax.random.split(key)
    backbone = hourglass_104(in_channels=in_channels, norm=norm, key=keys[0])
    channels = backbone.channels
    head = CenterHead(channels[-1], num_classes, stacks=len(channels), width=head_width, key=keys[1])
    return CenterNet(backbone, None, head)
