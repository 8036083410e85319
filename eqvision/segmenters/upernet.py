"""UPerNet (Xiao et al. 2018) on ResNet, Swin and ConvNeXt, as mmsegmentation and transformers build it."""

import jax
from jaxtyping import PRNGKeyArray

from eqvision.backbones import convnext, resnet, swin
from eqvision.backbones.resnet import Norm
from eqvision.backbones.swin import WindowRule
from eqvision.classifiers import Backbone, Neck
from eqvision.heads.segmentation import ConvHead
from eqvision.heads.upernet import UPerNetHead
from eqvision.layers import Activation, Implementation, Remat
from eqvision.necks.map_of_patches import MapNorms
from eqvision.segmenters.segmenter import Segmenter

CLASSES = 150  # of ADE20K
AUXILIARY_WIDTH = 256


def upernet_resnet(
    depth: int = 50,
    *,
    num_classes: int = CLASSES,
    in_channels: int = 3,
    norm: Norm = "batch",
    width: int = 64,
    head_width: int = 512,
    auxiliary: bool = False,
    key: PRNGKeyArray,
) -> Segmenter:
    """On a ResNet v1.5. ``auxiliary`` adds the second head of the published models, on the third map."""
    keys = jax.random.split(key)
    backbone = resnet(depth, in_channels=in_channels, norm=norm, width=width, key=keys[0])
    return _upernet(backbone, None, num_classes, head_width, auxiliary, keys[1])


def upernet_convnext(
    size: str,
    *,
    num_classes: int = CLASSES,
    in_channels: int = 3,
    version: int = 1,
    activation: Activation = "gelu",
    drop_path: float = 0.4,
    remat: Remat = "none",
    unroll: int | bool = 1,
    head_width: int = 512,
    auxiliary: bool = False,
    key: PRNGKeyArray,
) -> Segmenter:
    """On ConvNeXt, with a layer norm behind each stage. ``drop_path`` is that of the published tiny and base models.

    ``auxiliary`` as of ``upernet_resnet``.
    """
    keys = jax.random.split(key)
    backbone = convnext(
        size,
        version=version,
        in_channels=in_channels,
        activation=activation,
        drop_path=drop_path,
        remat=remat,
        unroll=unroll,
        key=keys[0],
    )
    return _upernet(backbone, MapNorms(backbone.channels, eps=1e-6), num_classes, head_width, auxiliary, keys[1])


def upernet_swin(
    size: str,
    window: int = 7,
    *,
    num_classes: int = CLASSES,
    in_channels: int = 3,
    window_rule: WindowRule = "torchvision",
    activation: Activation = "gelu",
    eps: float = 1e-5,
    dropout: float = 0.0,
    drop_path: float = 0.3,
    attention: Implementation = "xla",
    remat: Remat = "none",
    unroll: int = 1,
    head_width: int = 512,
    auxiliary: bool = False,
    key: PRNGKeyArray,
) -> Segmenter:
    """On Swin, with a layer norm behind each stage. ``drop_path`` and ``auxiliary`` as of ``upernet_convnext``."""
    keys = jax.random.split(key)
    backbone = swin(
        size,
        window,
        in_channels=in_channels,
        window_rule=window_rule,
        activation=activation,
        eps=eps,
        dropout=dropout,
        drop_path=drop_path,
        implementation=attention,
        remat=remat,
        unroll=unroll,
        key=keys[0],
    )
    return _upernet(backbone, MapNorms(backbone.channels, eps=1e-5), num_classes, head_width, auxiliary, keys[1])


def _upernet(
    backbone: Backbone, neck: Neck | None, num_classes: int, width: int, auxiliary: bool, key: PRNGKeyArray
) -> Segmenter:
    keys = jax.random.split(key)
    head = UPerNetHead(backbone.channels, num_classes, width=width, key=keys[0])
    if not auxiliary:
        return Segmenter(backbone, neck, head)
    options = {"width": AUXILIARY_WIDTH, "level": 2, "dropout": 0.0}
    second = ConvHead(backbone.channels[2], num_classes, **options, key=keys[1])
    return Segmenter(backbone, neck, head, (second,))
