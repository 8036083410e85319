"""A CLIP of our own making, small enough to be trained from scratch on a CPU in minutes."""

from jaxtyping import PRNGKeyArray

from eqvision.backbones import ViTSize
from eqvision.backbones.clip_text import TextSize
from eqvision.multimodal.clip import Clip
from eqvision.multimodal.clip_models import ClipViTSize, clip_vit

CLIP_TINY = ClipViTSize(ViTSize(64, 3, 4, 128), 4, 8, TextSize(64, 2, 4, 128), 32)


def clip_tiny(
    *,
    image_size: int | tuple[int, int] = 8,
    in_channels: int = 1,
    vocab_size: int = 256,
    length: int = 12,
    end_id: int | None = None,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    key: PRNGKeyArray,
) -> Clip:
    """Patches of 4 pixels and three blocks for images, two blocks for texts, vectors of 32 numbers."""
    return clip_vit(
        CLIP_TINY,
        image_size=image_size,
        in_channels=in_channels,
        vocab_size=vocab_size,
        length=length,
        end_id=end_id,
        activation="gelu",
        dropout=dropout,
        drop_path=drop_path,
        key=key,
    )
