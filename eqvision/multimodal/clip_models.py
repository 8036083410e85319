"""The CLIP models of Radford et al. 2021: sizes of tables 19 and 20, and what builds them."""

from typing import NamedTuple

import jax
from jaxtyping import PRNGKeyArray

from eqvision.backbones import ClipResNet, ClipText, TextSize, VisionTransformer, ViTSize, legal_size
from eqvision.backbones.resnet import Norm
from eqvision.heads import AttentionMapPool, ClassTokenProjection, EndTokenProjection
from eqvision.layers import Activation, Implementation, Remat
from eqvision.multimodal.clip import Clip

VOCAB_SIZE = 49408
LENGTH = 77


class ClipViTSize(NamedTuple):
    vision: ViTSize
    patch_size: int
    image_size: int
    text: TextSize
    embed_dim: int


class ClipResNetSize(NamedTuple):
    """``depths`` are the blocks of each stage, ``width`` is that of the stem; ``num_heads`` is the pooling's."""

    depths: tuple[int, ...]
    width: int
    num_heads: int
    image_size: int
    text: TextSize
    embed_dim: int


_B, _L = ViTSize(768, 12, 12, 3072), ViTSize(1024, 24, 16, 4096)
_TEXT_512, _TEXT_640 = TextSize(512, 12, 8, 2048), TextSize(640, 12, 10, 2560)
_TEXT_768, _TEXT_1024 = TextSize(768, 12, 12, 3072), TextSize(1024, 12, 16, 4096)

CLIP_VIT_SIZES = {
    "b32": ClipViTSize(_B, 32, 224, _TEXT_512, 512),
    "b16": ClipViTSize(_B, 16, 224, _TEXT_512, 512),
    "l14": ClipViTSize(_L, 14, 224, _TEXT_768, 768),
    "l14_336": ClipViTSize(_L, 14, 336, _TEXT_768, 768),
}

CLIP_RESNET_SIZES = {
    "50": ClipResNetSize((3, 4, 6, 3), 64, 32, 224, _TEXT_512, 1024),
    "101": ClipResNetSize((3, 4, 23, 3), 64, 32, 224, _TEXT_512, 512),
    "50x4": ClipResNetSize((4, 6, 10, 6), 80, 40, 288, _TEXT_640, 640),
    "50x16": ClipResNetSize((6, 8, 18, 8), 96, 48, 384, _TEXT_768, 768),
    "50x64": ClipResNetSize((3, 15, 36, 10), 128, 64, 448, _TEXT_1024, 1024),
}


def clip_vit(
    size: ClipViTSize,
    *,
    image_size: int | tuple[int, int] | None = None,
    in_channels: int = 3,
    vocab_size: int = VOCAB_SIZE,
    length: int = LENGTH,
    end_id: int | None = None,
    activation: Activation = "quick_gelu",
    eps: float = 1e-5,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    attention: Implementation = "xla",
    remat: Remat = "none",
    unroll: int = 1,
    key: PRNGKeyArray,
) -> Clip:
    """CLIP with a vision transformer, of a size of ``CLIP_VIT_SIZES`` or of your own.

    ``end_id`` None finds the end of a text as OpenAI's model does, by the highest id: see ``pool_end``.
    """
    keys = jax.random.split(key, 4)
    tower = VisionTransformer(
        size.vision,
        size.patch_size,
        image_size=size.image_size if image_size is None else image_size,
        in_channels=in_channels,
        patch_bias=False,
        pre_norm=True,
        activation=activation,
        eps=eps,
        dropout=dropout,
        drop_path=drop_path,
        implementation=attention,
        remat=remat,
        unroll=unroll,
        key=keys[0],
    )
    text = ClipText(
        size.text,
        vocab_size=vocab_size,
        length=length,
        activation=activation,
        eps=eps,
        dropout=dropout,
        drop_path=drop_path,
        implementation=attention,
        remat=remat,
        unroll=unroll,
        key=keys[1],
    )
    image_head = ClassTokenProjection(size.vision.width, size.embed_dim, key=keys[2])
    text_head = EndTokenProjection(size.text.width, size.embed_dim, end_id=end_id, key=keys[3])
    return Clip(tower, image_head, text, text_head)


def clip_resnet(
    size: ClipResNetSize,
    *,
    image_size: int | tuple[int, int] | None = None,
    in_channels: int = 3,
    vocab_size: int = VOCAB_SIZE,
    length: int = LENGTH,
    end_id: int | None = None,
    norm: Norm = "batch",
    activation: Activation = "quick_gelu",
    eps: float = 1e-5,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    attention: Implementation = "xla",
    remat: Remat = "none",
    unroll: int = 1,
    key: PRNGKeyArray,
) -> Clip:
    """CLIP with a ResNet, of a size of ``CLIP_RESNET_SIZES`` or of your own.

    The options from ``activation`` on are those of the text tower. Raises ValueError for an image size that 32 does
    not divide.
    """
    keys = jax.random.split(key, 4)
    tower = ClipResNet(size.depths, size.width, in_channels=in_channels, norm=norm, key=keys[0])
    rows, columns = legal_size(size.image_size if image_size is None else image_size, tower.strides[-1])
    text = ClipText(
        size.text,
        vocab_size=vocab_size,
        length=length,
        activation=activation,
        eps=eps,
        dropout=dropout,
        drop_path=drop_path,
        implementation=attention,
        remat=remat,
        unroll=unroll,
        key=keys[1],
    )
    grid = rows // tower.strides[-1], columns // tower.strides[-1]
    image_head = AttentionMapPool(grid, tower.channels[-1], size.embed_dim, size.num_heads, key=keys[2])
    text_head = EndTokenProjection(size.text.width, size.embed_dim, end_id=end_id, key=keys[3])
    return Clip(tower, image_head, text, text_head)
