"""Segmenters on a vision transformer: Segmenter (Strudel et al. 2021) and SETR-naive (Zheng et al. 2021)."""

from typing import Literal, get_args

import jax
from jaxtyping import PRNGKeyArray

from eqvision.backbones import VisionTransformer, vit
from eqvision.heads.mask_transformer import MaskTransformerHead, PatchLinearHead
from eqvision.heads.segmentation import ConvHead
from eqvision.layers import Activation, Implementation, Remat
from eqvision.necks.map_of_patches import PatchMap
from eqvision.segmenters.segmenter import Segmenter

Decoder = Literal["linear", "mask"]
SETR_WIDTH = 256  # Zheng et al. 2021, section 3.3


def vit_segmenter(
    size: str,
    patch_size: int,
    *,
    decoder: Decoder,
    num_classes: int = 150,
    image_size: int | tuple[int, int] = 512,
    in_channels: int = 3,
    activation: Activation = "gelu",
    num_heads: int | None = None,
    dropout: float = 0.0,
    drop_path: float = 0.1,
    attention: Implementation = "xla",
    remat: Remat = "none",
    unroll: int = 1,
    key: PRNGKeyArray,
) -> Segmenter:
    """Segmenter with a linear head or a mask transformer of two blocks, in ``num_heads`` (None: of 64 channels each).

    The 150 classes are ADE20K's. Images of any size: they are filled with zeros to whole patches. ``drop_path`` 0.1 in
    the encoder, and dropout 0.1 in the mask transformer, as published. Raises ValueError for another decoder.
    """
    if decoder not in get_args(Decoder):
        raise ValueError(f"decoder {decoder!r} is unknown; choose from {get_args(Decoder)}")
    keys = jax.random.split(key)
    backbone = vit(
        size,
        patch_size,
        image_size=_whole(image_size, patch_size),
        in_channels=in_channels,
        activation=activation,
        dropout=dropout,
        drop_path=drop_path,
        implementation=attention,
        remat=remat,
        unroll=unroll,
        key=keys[0],
    )
    width = backbone.channels[-1]
    if decoder == "linear":
        return Segmenter(backbone, None, PatchLinearHead(width, num_classes, key=keys[1]), multiple=patch_size)
    head = MaskTransformerHead(width, num_classes, num_heads=num_heads, key=keys[1])
    return Segmenter(backbone, None, head, multiple=patch_size)


def setr_naive(
    size: str = "l",
    patch_size: int = 16,
    *,
    num_classes: int = 150,
    image_size: int | tuple[int, int] = 512,
    in_channels: int = 3,
    activation: Activation = "gelu",
    dropout: float = 0.0,
    drop_path: float = 0.0,
    attention: Implementation = "xla",
    remat: Remat = "none",
    unroll: int = 1,
    key: PRNGKeyArray,
) -> Segmenter:
    """SETR-naive: a ViT, a 1x1 convolution to 256 channels with batch norm and ReLU, and one to the classes."""
    keys = jax.random.split(key)
    backbone: VisionTransformer = vit(
        size,
        patch_size,
        image_size=_whole(image_size, patch_size),
        in_channels=in_channels,
        activation=activation,
        dropout=dropout,
        drop_path=drop_path,
        implementation=attention,
        remat=remat,
        unroll=unroll,
        key=keys[0],
    )
    head = ConvHead(backbone.channels[-1], num_classes, width=SETR_WIDTH, kernel_size=1, dropout=0.0, key=keys[1])
    return Segmenter(backbone, PatchMap(), head, multiple=patch_size)


def _whole(image_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    """The size filled up to whole patches, as images are."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return -(-height // patch_size) * patch_size, -(-width // patch_size) * patch_size
