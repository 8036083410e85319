"""Segmenters on dilated ResNets: FCN (Long et al. 2015), DeepLabV3 and DeepLabV3+ (Chen et al. 2017, 2018)."""

import jax
from jaxtyping import PRNGKeyArray

from eqvision.backbones import resnet
from eqvision.backbones.resnet import Norm
from eqvision.heads.deeplab import DeepLabV3Head, DeepLabV3PlusHead
from eqvision.heads.segmentation import ConvHead
from eqvision.segmenters.segmenter import Segmenter

QUARTER = 4  # torchvision's FCN heads are a quarter as wide as what they read


def fcn_resnet(
    depth: int = 50,
    *,
    num_classes: int = 21,
    in_channels: int = 3,
    norm: Norm = "batch",
    width: int = 64,
    auxiliary: bool = False,
    key: PRNGKeyArray,
) -> Segmenter:
    """torchvision's FCN: a ResNet of stride 8, whose last two stages are dilated, a 3x3 and a 1x1 convolution.

    The 21 classes are those of Pascal VOC, with background. ``auxiliary`` adds torchvision's second head, on the third
    stage. ``width`` is that of the ResNet's first stage. Raises ValueError for a ResNet without bottlenecks.
    """
    keys = jax.random.split(key, 3)
    backbone = resnet(depth, in_channels=in_channels, norm=norm, dilated_stages=2, width=width, key=keys[0])
    channels = backbone.channels
    head = ConvHead(channels[-1], num_classes, width=channels[-1] // QUARTER, key=keys[1])
    return Segmenter(backbone, None, head, _auxiliary(channels, num_classes, keys[2]) if auxiliary else ())


def deeplabv3_resnet(
    depth: int = 50,
    *,
    num_classes: int = 21,
    in_channels: int = 3,
    norm: Norm = "batch",
    width: int = 64,
    head_width: int = 256,
    auxiliary: bool = False,
    key: PRNGKeyArray,
) -> Segmenter:
    """torchvision's DeepLabV3, at stride 8 with dilations of 12, 24 and 36; options as of ``fcn_resnet``."""
    keys = jax.random.split(key, 3)
    backbone = resnet(depth, in_channels=in_channels, norm=norm, dilated_stages=2, width=width, key=keys[0])
    head = DeepLabV3Head(backbone.channels[-1], num_classes, width=head_width, key=keys[1])
    return Segmenter(backbone, None, head, _auxiliary(backbone.channels, num_classes, keys[2]) if auxiliary else ())


def deeplabv3plus_resnet(
    depth: int = 50,
    *,
    num_classes: int = 21,
    in_channels: int = 3,
    norm: Norm = "batch",
    width: int = 64,
    head_width: int = 256,
    key: PRNGKeyArray,
) -> Segmenter:
    """DeepLabV3+ at stride 16 (one dilated stage; dilations of 6, 12 and 18), with the first stage's map of stride 4.

    Options as of ``fcn_resnet``. The paper's ResNet also dilates inside the last stage by 2, 4, 8 ("multi-grid"); this
    one has a dilation of 2 there.
    """
    keys = jax.random.split(key)
    backbone = resnet(depth, in_channels=in_channels, norm=norm, dilated_stages=1, width=width, key=keys[0])
    channels = backbone.channels
    head = DeepLabV3PlusHead(channels[-1], channels[0], num_classes, width=head_width, key=keys[1])
    return Segmenter(backbone, None, head)


def _auxiliary(channels: tuple[int, ...], num_classes: int, key: PRNGKeyArray) -> tuple[ConvHead, ...]:
    return (ConvHead(channels[-2], num_classes, width=channels[-2] // QUARTER, level=-2, key=key),)
