"""SigLIP (Zhai et al. 2023): CLIP's composition with attention pooling, texts without a causal mask, and a bias."""

from typing import NamedTuple

import jax
from jaxtyping import PRNGKeyArray

from eqvision.backbones import ClipText, TextSize, VisionTransformer, ViTSize
from eqvision.heads import AttentionPoolEmbedding, LastTokenProjection
from eqvision.layers import Activation, Implementation, Remat
from eqvision.multimodal.clip import Clip


class SiglipSize(NamedTuple):
    """The vectors are as wide as the image tower."""

    vision: ViTSize
    patch_size: int
    image_size: int
    text: TextSize


# big_vision's siglip_replication configurations and model cards; so400m is of Alabdulmohsin et al. 2023.
SIGLIP_SIZES = {
    "b16": SiglipSize(ViTSize(768, 12, 12, 3072), 16, 224, TextSize(768, 12, 12, 3072)),
    "l16": SiglipSize(ViTSize(1024, 24, 16, 4096), 16, 256, TextSize(1024, 24, 16, 4096)),
    "so400m14": SiglipSize(ViTSize(1152, 27, 16, 4304), 14, 384, TextSize(1152, 27, 16, 4304)),
}


def siglip(
    size: SiglipSize,
    *,
    image_size: int | tuple[int, int] | None = None,
    in_channels: int = 3,
    vocab_size: int = 32000,
    length: int = 64,
    attend_padding: bool = True,
    activation: Activation = "gelu_tanh",
    eps: float = 1e-6,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    attention: Implementation = "xla",
    remat: Remat = "none",
    unroll: int = 1,
    key: PRNGKeyArray,
) -> Clip:
    """SigLIP of a size of ``SIGLIP_SIZES`` or of your own; scale and bias start as in the paper, section 3.2.

    Its largest model has patches of 14 pixels and images of 384, of which it sees 378 (``drop_rest``).

    It reads a text at the last place: fill texts up to ``length``. ``attend_padding`` as in ``ClipText``.
    """
    keys = jax.random.split(key, 4)
    vision = size.vision
    tower = VisionTransformer(
        vision,
        size.patch_size,
        image_size=size.image_size if image_size is None else image_size,
        in_channels=in_channels,
        class_token=False,
        drop_rest=True,
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
        causal=False,
        attend_padding=attend_padding,
        activation=activation,
        eps=eps,
        dropout=dropout,
        drop_path=drop_path,
        implementation=attention,
        remat=remat,
        unroll=unroll,
        key=keys[1],
    )
    image_head = AttentionPoolEmbedding(
        vision.width, vision.num_heads, vision.mlp_dim, activation=activation, eps=eps, key=keys[2]
    )
    text_head = LastTokenProjection(size.text.width, vision.width, key=keys[3])
    return Clip(tower, image_head, text, text_head, scale=10.0, bias=-10.0, max_scale=None)
