"""Segment Anything (Kirillov et al. 2023): an image is encoded once, and prompts ask for masks in it."""

import functools
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.backbones import SIZES, VitDet, ViTSize
from eqvision.backbones.vitdet import GLOBAL_BLOCKS
from eqvision.heads.prompted_mask import BLOCK_EPS, PromptedMaskHead
from eqvision.layers import ABSENT, Implementation, PromptEncoder, Remat
from eqvision.necks import SimplePyramid
from eqvision.types import Images, MaskPredictions, MaskPrompts, PromptedImages

FeatureMap = Float[Array, "b gh gw d"]


class SAM(eqx.Module):
    """Image encoder (ViTDet without class token, and a neck), prompt encoder, mask decoder.

    The neck, a 1x1 and a 3x3 convolution with layer norms, is the level of ViTDet's pyramid that keeps the size.
    Images are normalised and padded with zeros to the size that the weights are for, as ``prepare_image`` does it.
    """

    backbone: VitDet
    neck: SimplePyramid
    prompts: PromptEncoder
    head: PromptedMaskHead

    def __init__(
        self,
        backbone: VitDet,
        *,
        width: int = 256,
        num_masks: int = 3,
        mask_channels: int = 16,
        decoder_depth: int = 2,
        num_heads: int = 8,
        mlp_dim: int = 2048,
        quality_width: int = 256,
        eps: float = BLOCK_EPS,
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key, 3)
        self.backbone = backbone
        strides = (backbone.strides[-1],)
        self.neck = SimplePyramid(
            backbone.channels, backbone.strides, width, out_strides=strides, pool=False, key=keys[0]
        )
        self.prompts = PromptEncoder(width, mask_channels=mask_channels, key=keys[1])
        self.head = PromptedMaskHead(
            width,
            num_masks=num_masks,
            depth=decoder_depth,
            num_heads=num_heads,
            mlp_dim=mlp_dim,
            quality_width=quality_width,
            eps=eps,
            key=keys[2],
        )

    def __call__(
        self,
        inputs: PromptedImages,
        state: eqx.nn.State,
        *,
        multimask: bool = True,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> tuple[MaskPredictions, eqx.nn.State]:
        features, state = self.encode(inputs.images, state, train=train, key=key)
        return choose_masks(self.decode(features, inputs.prompts), multimask=multimask), state

    def encode(
        self, images: Images, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[FeatureMap, eqx.nn.State]:
        """Features of images, all that prompts need of them."""
        features, state = self.backbone(images, state, train=train, key=key)
        (features,), state = self.neck(features, state, train=train)
        return features, state

    def decode(self, features: FeatureMap, prompts: MaskPrompts) -> MaskPredictions:
        """All masks of each prompt, ``num_masks`` + 1; see ``choose_masks``. Absent points change nothing."""
        grid, stride = (features.shape[1], features.shape[2]), self.backbone.strides[-1]
        tokens = self.prompts.tokens(prompts.points, prompts.labels, (stride * grid[0], stride * grid[1]))
        added = self.prompts.map(prompts.masks, prompts.has_mask, grid, features.dtype)
        shape = (*prompts.labels.shape[:2], *features.shape[1:])
        prompted = jnp.broadcast_to(features[:, None] + added, shape)
        return self.head(prompted, self.prompts.position.grid(*grid), tokens, prompts.labels != ABSENT)


def choose_masks(predictions: MaskPredictions, *, multimask: bool) -> MaskPredictions:
    """The masks for prompts that may mean several things (a click), or the one for those that mean one (a box)."""
    part = slice(1, None) if multimask else slice(0, 1)
    return MaskPredictions(predictions.logits[:, :, part], predictions.iou[:, :, part])


def sam(
    size: str | ViTSize,
    patch_size: int = 16,
    *,
    image_size: int | tuple[int, int] = 1024,
    global_blocks: tuple[int, ...] | None = None,
    window: int = 14,
    in_channels: int = 3,
    width: int = 256,
    num_masks: int = 3,
    mask_channels: int = 16,
    num_heads: int = 8,
    mlp_dim: int = 2048,
    quality_width: int = 256,
    eps: float = BLOCK_EPS,
    drop_path: float = 0.0,
    attention: Implementation = "xla",
    remat: Remat = "none",
    key: PRNGKeyArray,
) -> SAM:
    """SAM with an image encoder of size b, l or h: 93.7, 312 and 641 million parameters.

    ``eps`` is that of the decoder's blocks, 1e-5 in the official code and 1e-6 in transformers. Raises ValueError for
    another size.
    """
    if isinstance(size, str) and size not in GLOBAL_BLOCKS:
        raise ValueError(f"SAM size {size!r} does not exist; choose from {', '.join(GLOBAL_BLOCKS)}")
    if isinstance(size, ViTSize) and global_blocks is None:
        raise ValueError(
            "SAM: an encoder of its own ViTSize needs global_blocks=..., the blocks that see the whole map"
        )
    keys = jax.random.split(key)
    backbone = VitDet(
        SIZES[size] if isinstance(size, str) else size,
        patch_size,
        image_size=image_size,
        position_size=image_size,
        window=window,
        global_blocks=GLOBAL_BLOCKS[str(size)] if global_blocks is None else global_blocks,
        drop_path=drop_path,
        in_channels=in_channels,
        implementation=attention,
        remat=remat,
        key=keys[0],
    )
    return SAM(
        backbone,
        width=width,
        num_masks=num_masks,
        mask_channels=mask_channels,
        num_heads=num_heads,
        mlp_dim=mlp_dim,
        quality_width=quality_width,
        eps=eps,
        key=keys[1],
    )


sam_vit_b: Callable[..., SAM] = functools.partial(sam, "b")
sam_vit_l: Callable[..., SAM] = functools.partial(sam, "l")
sam_vit_h: Callable[..., SAM] = functools.partial(sam, "h")


def prompted_sam(
    size: str,
    *,
    num_classes: int = 3,
    image_size: int | tuple[int, int] = 1024,
    in_channels: int = 3,
    eps: float = BLOCK_EPS,
    drop_path: float = 0.0,
    attention: Implementation = "xla",
    remat: Remat = "none",
    key: PRNGKeyArray,
) -> SAM:
    """``sam`` as a row of the zoo, where ``num_classes`` is the number of masks of a prompt that may mean several
    things."""
    return sam(
        size,
        image_size=image_size,
        in_channels=in_channels,
        num_masks=num_classes,
        eps=eps,
        drop_path=drop_path,
        attention=attention,
        remat=remat,
        key=key,
    )
