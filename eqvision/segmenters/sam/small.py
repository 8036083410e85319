"""Segment Anything of our own making for small images and few of them, trained from scratch on a CPU."""

from jaxtyping import PRNGKeyArray

from eqvision.backbones import ViTSize
from eqvision.layers import Implementation, Remat
from eqvision.segmenters.sam.model import SAM, sam

SIZE = ViTSize(width=128, depth=4, num_heads=4, mlp_dim=512)
PATCH, WINDOW, GLOBAL = 8, 6, (1, 3)


def sam_small(
    *,
    num_classes: int = 3,
    image_size: int | tuple[int, int] = 96,
    in_channels: int = 3,
    drop_path: float = 0.0,
    attention: Implementation = "xla",
    remat: Remat = "none",
    key: PRNGKeyArray,
) -> SAM:
    """A ViT of 4 blocks of width 128 on patches of 8 pixels, and a decoder of width 64; masks have a cell every 2.

    ``num_classes`` is the number of masks of a prompt that may mean several things.
    """
    return sam(
        SIZE,
        PATCH,
        image_size=image_size,
        global_blocks=GLOBAL,
        window=WINDOW,
        in_channels=in_channels,
        width=64,
        num_masks=num_classes,
        num_heads=4,
        mlp_dim=256,
        quality_width=64,
        drop_path=drop_path,
        attention=attention,
        remat=remat,
        key=key,
    )
