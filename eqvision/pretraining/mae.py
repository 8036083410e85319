"""Masked autoencoders (He et al. 2022): a ViT sees a quarter of the patches, a small decoder draws the others."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from eqvision.backbones import VisionTransformer, legal_size, vit
from eqvision.layers import (
    Activation,
    Implementation,
    LayerNorm,
    Linear,
    Remat,
    SinCos2D,
    TransformerStack,
    fold,
    normal,
    xavier_uniform,
)
from eqvision.types import MaskedImages


class Masking(NamedTuple):
    """Which of ``n`` patches are seen: the places ``keep`` of the ``k`` seen ones, in the order that the encoder has
    them; for each patch its place among the seen and then the masked ones; and True on those that are masked."""

    keep: Int[Array, "b k"]
    restore: Int[Array, "b n"]
    mask: Bool[Array, "b n"]


class MAEOutputs(NamedTuple):
    """Predicted pixels of every patch (``ops.patch_pixels``), of use where ``mask`` is True."""

    pixels: Float[Array, "b n p"]
    mask: Bool[Array, "b n"]


def draw_noise(keys: Key[Array, " b"], count: int) -> Float[Array, "b {count}"]:
    """The noise of ``MaskedImages`` for ``count`` patches, from a key for each image (``keys.image_keys``)."""
    return jax.vmap(lambda key: jax.random.uniform(key, (count,)))(keys)


def masking_of(noise: Float[Array, "b n"], ratio: float) -> Masking:
    """The patches with the least noise are seen, as many as are left without ``ratio`` of them, rounded down."""
    count = noise.shape[1]
    order = jnp.argsort(noise, axis=1)
    restore = jnp.argsort(order, axis=1)
    kept = int(count * (1 - ratio))
    return Masking(order[:, :kept], restore, restore >= kept)


class MAEDecoder(eqx.Module):
    """Narrow blocks over all patches: those that were encoded, and one learned token in place of each masked one."""

    embed: Linear
    mask_token: Float[Array, " d"]
    position: SinCos2D
    stack: TransformerStack
    norm: LayerNorm
    project: Linear

    def __init__(
        self,
        in_features: int,
        pixels: int,
        *,
        width: int = 512,
        depth: int = 8,
        num_heads: int = 16,
        activation: Activation = "gelu",
        use_qkv_bias: bool = True,
        eps: float = 1e-6,
        implementation: Implementation = "xla",
        remat: Remat = "none",
        unroll: int = 1,
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key, 4)
        self.embed = Linear(in_features, width, init=xavier_uniform, key=keys[0])
        self.mask_token = normal(keys[1], (width,), 0.02)
        self.position = SinCos2D(width)
        self.stack = TransformerStack(
            depth,
            width,
            num_heads,
            4 * width,
            eps=eps,
            activation=activation,
            use_qkv_bias=use_qkv_bias,
            implementation=implementation,
            remat=remat,
            unroll=unroll,
            key=keys[2],
        )
        self.norm = LayerNorm(width, eps=eps)
        self.project = Linear(width, pixels, init=xavier_uniform, key=keys[3])

    def __call__(
        self,
        tokens: Float[Array, "b _ i"],
        restore: Int[Array, "b n"],
        grid: tuple[int, int],
        *,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "b n p"]:
        """Pixels of all patches, from the encoder's class token and seen patches."""
        known = self.embed(tokens)
        b, count, width = known.shape
        missing = restore.shape[1] + 1 - count
        masked = jnp.broadcast_to(self.mask_token.astype(known.dtype), (b, missing, width))
        patches = jnp.concatenate([known[:, 1:], masked], axis=1)
        patches = jnp.take_along_axis(patches, restore[..., None], axis=1)
        patches = patches + self.position(grid).reshape(-1, width).astype(known.dtype)
        hidden = self.stack(jnp.concatenate([known[:, :1], patches], axis=1), train=train, key=key)
        return self.project(self.norm(hidden)[:, 1:])


class MAE(eqx.Module):
    """Encoder and decoder of a masked autoencoder; ``backbone`` is what pre-training is for.

    Positions are fixed sin-cos tables, so that images of any size that the patch divides are legal; ``image_size`` is
    what the model was made for. ``mask_ratio`` of the patches are masked.
    """

    backbone: VisionTransformer
    decoder: MAEDecoder
    mask_ratio: float = eqx.field(static=True)
    image_size: tuple[int, int] = eqx.field(static=True)

    @property
    def patch_size(self) -> int:
        return self.backbone.strides[0]

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the patches of such images."""
        return image_size[0] // self.patch_size, image_size[1] // self.patch_size

    def __call__(
        self, inputs: MaskedImages, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[MAEOutputs, eqx.nn.State]:
        """Raises ValueError for noise that is not one number for each patch."""
        grid = self.grid((inputs.images.shape[1], inputs.images.shape[2]))
        if inputs.noise.shape[1] != grid[0] * grid[1]:
            raise ValueError(
                f"noise of {inputs.noise.shape[1]} numbers for {grid[0]}x{grid[1]} patches of "
                f"{self.patch_size} pixels; expected one for each patch"
            )
        masking = masking_of(inputs.noise, self.mask_ratio)
        tokens = self.backbone.visible(inputs.images, masking.keep, train=train, key=fold(key, 0))
        pixels = self.decoder(tokens, masking.restore, grid, train=train, key=fold(key, 1))
        return MAEOutputs(pixels, masking.mask), state


def masked_autoencoder(
    size: str,
    patch_size: int,
    *,
    image_size: int | tuple[int, int] = 224,
    in_channels: int = 3,
    mask_ratio: float = 0.75,
    decoder_width: int = 512,
    decoder_depth: int = 8,
    decoder_heads: int = 16,
    activation: Activation = "gelu",
    use_qkv_bias: bool = True,
    eps: float = 1e-6,
    drop_path: float = 0.0,
    attention: Implementation = "xla",
    remat: Remat = "none",
    unroll: int = 1,
    key: PRNGKeyArray,
) -> MAE:
    """A ViT of a named size as encoder; the decoder is that of facebookresearch/mae unless told otherwise.

    ``eps`` is that of all layer norms: 1e-6 there, 1e-12 in transformers. Raises ValueError for a share of masked
    patches outside [0, 1), or one that leaves no patch to see.
    """
    size_of_image = legal_size(image_size, patch_size)
    _check_ratio(mask_ratio, size_of_image[0] // patch_size * (size_of_image[1] // patch_size))
    keys = jax.random.split(key, 3)
    computed = {"activation": activation, "use_qkv_bias": use_qkv_bias, "eps": eps, "remat": remat, "unroll": unroll}
    backbone = vit(
        size,
        patch_size,
        image_size=size_of_image,
        in_channels=in_channels,
        position="sincos2d",
        position_on_class=False,
        drop_path=drop_path,
        implementation=attention,
        **computed,
        key=keys[0],
    )
    decoder = MAEDecoder(
        backbone.channels[0],
        patch_size * patch_size * in_channels,
        width=decoder_width,
        depth=decoder_depth,
        num_heads=decoder_heads,
        implementation=attention,
        **computed,
        key=keys[1],
    )
    return MAE(_with_flat_patches(backbone, keys[2]), decoder, mask_ratio, size_of_image)


def _check_ratio(ratio: float, patches: int) -> None:
    if not 0 <= ratio < 1 or int(patches * (1 - ratio)) < 1:
        raise ValueError(
            f"mask_ratio {ratio} of {patches} patches leaves none to see; expected at least 0, and less than 1 so that "
            "a patch is left (0.75 as published)"
        )


def _with_flat_patches(backbone: VisionTransformer, key: PRNGKeyArray) -> VisionTransformer:
    """The embedding of patches is initialised as the matrix that it is, not as a convolution."""
    shape = backbone.patch_embed.weight.shape
    weight = xavier_uniform(key, (shape[0] * shape[1] * shape[2], shape[3])).reshape(shape)
    return eqx.tree_at(lambda model: model.patch_embed.weight, backbone, weight)


# He et al. 2022, section 4, and one of our own making for small images on processors.
MAES: dict[str, Callable[..., MAE]] = {
    "mae_vit_b16": partial(masked_autoencoder, "b", 16),
    "mae_vit_l16": partial(masked_autoencoder, "l", 16),
    "mae_vit_h14": partial(masked_autoencoder, "h", 14),
    "mae_vit_xs4": partial(masked_autoencoder, "xs", 4, decoder_width=64, decoder_depth=2, decoder_heads=4),
}
