"""Vision transformer (Dosovitskiy et al. 2021) with the options of AugReg, big_vision, DeiT and DINOv2."""

from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from eqvision.backbones.checks import check_images, check_layer, legal_size
from eqvision.layers import (
    Activation,
    Implementation,
    LayerNorm,
    MLPKind,
    PatchEmbed,
    PositionEmbedding2D,
    Remat,
    SinCos2D,
    TransformerStack,
    dropout,
    fold,
    normal,
)
from eqvision.types import Images, TokenFeatures

PositionKind = Literal["learned", "sincos2d", "sincos2d_big_vision"]


class ViTSize(NamedTuple):
    width: int
    depth: int
    num_heads: int
    mlp_dim: int


# Dosovitskiy et al. 2021 table 1, Touvron et al. 2021 (Ti, S), Zhai et al. 2022 table 2 (g, G), Chen et al. 2022 (e),
# Oquab et al. 2023 table 17 (DINOv2's g, whose MLP is gated); m and betwixt are timm's, xs is ours.
SIZES = {
    "xs": ViTSize(128, 6, 4, 512),
    "ti": ViTSize(192, 12, 3, 768),
    "s": ViTSize(384, 12, 6, 1536),
    "m": ViTSize(512, 12, 8, 2048),
    "betwixt": ViTSize(640, 12, 10, 2560),
    "b": ViTSize(768, 12, 12, 3072),
    "l": ViTSize(1024, 24, 16, 4096),
    "h": ViTSize(1280, 32, 16, 5120),
    "g": ViTSize(1408, 40, 16, 6144),
    "G": ViTSize(1664, 48, 16, 8192),
    "e": ViTSize(1792, 56, 16, 15360),
    "g_dinov2": ViTSize(1536, 40, 24, 4096),
}


class VisionTransformer(eqx.Module):
    """Patches, position embedding, a scanned stack of pre-norm blocks, a final norm.

    The prefix is the class token, DeiT's distillation token and the registers, each where there is one.
    ``class_position`` is the class token's own position embedding: present where the position embedding is
    added after the class token joins (ViT, DeiT, AugReg), absent where it is added before (big_vision); the
    distillation token is alike, and registers have none. ``final_norm=False`` leaves the norm to the head.
    CLIP's image tower has ``pre_norm``, a norm before the first block, and ``patch_bias=False``.
    Images of any height and width that the patch divides are legal: the position embedding is resampled.
    With ``drop_rest`` others are too: what lies behind the last whole patch is not looked at, as a convolution does.
    """

    patch_embed: PatchEmbed
    position: PositionEmbedding2D | SinCos2D
    class_token: Float[Array, " d"] | None
    class_position: Float[Array, " d"] | None
    distillation_token: Float[Array, " d"] | None
    distillation_position: Float[Array, " d"] | None
    registers: Float[Array, "r d"] | None
    pre_norm: LayerNorm | None
    encoder: TransformerStack
    norm: LayerNorm | None
    dropout: float = eqx.field(static=True)
    drop_rest: bool = eqx.field(static=True)
    in_channels: int = eqx.field(static=True)
    channels: tuple[int, ...] = eqx.field(static=True)
    strides: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        size: ViTSize,
        patch_size: int,
        *,
        image_size: int | tuple[int, int] = 224,
        in_channels: int = 3,
        class_token: bool = True,
        distillation_token: bool = False,
        num_registers: int = 0,
        position: PositionKind = "learned",
        position_on_class: bool = True,
        activation: Activation = "gelu",
        mlp: MLPKind = "plain",
        use_qkv_bias: bool = True,
        patch_bias: bool = True,
        pre_norm: bool = False,
        drop_rest: bool = False,
        final_norm: bool = True,
        eps: float = 1e-6,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        implementation: Implementation = "xla",
        remat: Remat = "none",
        unroll: int = 1,
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key, 8)
        grid, width = _grid(image_size, patch_size, drop_rest), size.width
        self.patch_embed = PatchEmbed(in_channels, width, patch_size, use_bias=patch_bias, key=keys[0])
        self.position = _position(position, grid, width, key=keys[1])
        self.class_token = normal(keys[2], (width,), 0.02) if class_token else None
        self.class_position = normal(keys[3], (width,), 0.02) if class_token and position_on_class else None
        self.distillation_token = normal(keys[6], (width,), 0.02) if distillation_token else None
        on_token = distillation_token and position_on_class
        self.distillation_position = normal(keys[7], (width,), 0.02) if on_token else None
        self.registers = normal(keys[4], (num_registers, width), 0.02) if num_registers else None
        self.pre_norm = LayerNorm(width, eps=eps) if pre_norm else None
        self.encoder = TransformerStack(
            size.depth,
            width,
            size.num_heads,
            size.mlp_dim,
            eps=eps,
            activation=activation,
            dropout=dropout,
            drop_path=drop_path,
            layer_scale=layer_scale,
            use_qkv_bias=use_qkv_bias,
            mlp=mlp,
            implementation=implementation,
            remat=remat,
            unroll=unroll,
            key=keys[5],
        )
        self.norm = LayerNorm(width, eps=eps) if final_norm else None
        self.dropout = dropout
        self.drop_rest = drop_rest
        self.in_channels = in_channels
        self.channels = (width,)
        self.strides = (patch_size,)

    def __call__(
        self, images: Images, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[TokenFeatures, eqx.nn.State]:
        tokens, grid = self._embed(images)
        return self._split(self._encoded(tokens, train, key), grid), state

    def visible(
        self, images: Images, keep: Int[Array, "b k"], *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> Float[Array, "b p_and_k d"]:
        """The prefix and the patches ``keep`` alone, each at its own position: what a masked autoencoder encodes.

        ``keep`` counts patches row by row; their tokens come in its order, behind the prefix and the final norm.
        """
        tokens, (rows, columns) = self._embed(images)
        prefix, patches = jnp.split(tokens, [tokens.shape[1] - rows * columns], axis=1)
        seen = jnp.take_along_axis(patches, keep[..., None], axis=1)
        return self._encoded(jnp.concatenate([prefix, seen], axis=1), train, key)

    def intermediates(
        self, images: Images, state: eqx.nn.State, layers: tuple[int, ...], *, normalise: bool = True
    ) -> tuple[TokenFeatures, ...]:
        """Outputs of the blocks ``layers`` (negative: from the end), through the final norm unless told not to.

        Without a final norm, ``normalise`` changes nothing.
        """
        del state
        tokens, grid = self._embed(images)
        outputs = self.encoder.intermediates(tokens)
        chosen = [outputs[check_layer(layer, self.encoder.depth)] for layer in layers]
        return tuple(self._split(self._normalised(x) if normalise else x, grid) for x in chosen)

    def _encoded(self, tokens: Float[Array, "b n d"], train: bool, key: PRNGKeyArray | None) -> Float[Array, "b n d"]:
        tokens = dropout(tokens, self.dropout, train=train, key=fold(key, 0))
        return self._normalised(self.encoder(tokens, train=train, key=fold(key, 1)))

    def _normalised(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return tokens if self.norm is None else self.norm(tokens)

    def _embed(self, images: Images) -> tuple[Float[Array, "b n d"], tuple[int, int]]:
        patch = self.strides[0]
        if self.drop_rest and images.ndim == 4:
            images = images[:, : images.shape[1] // patch * patch, : images.shape[2] // patch * patch]
        check_images(images, self.in_channels, (patch, patch))
        patches = self.patch_embed(images)
        b, h, w, d = patches.shape
        patches = patches + self.position((h, w)).astype(patches.dtype)
        prefix = [jnp.broadcast_to(token.astype(patches.dtype), (b, *token.shape)) for token in self._prefix()]
        tokens = jnp.concatenate([*prefix, patches.reshape(b, h * w, d)], axis=1)
        return tokens if self.pre_norm is None else self.pre_norm(tokens), (h, w)

    def _prefix(self) -> list[Float[Array, "p d"]]:
        prefix = []
        single = (self.class_token, self.class_position), (self.distillation_token, self.distillation_position)
        for token, position in single:
            if token is not None:
                prefix.append((token if position is None else token + position)[None])
        return prefix if self.registers is None else [*prefix, self.registers]

    def _split(self, tokens: Float[Array, "b n d"], grid: tuple[int, int]) -> TokenFeatures:
        b, n, d = tokens.shape
        count = n - grid[0] * grid[1]
        return TokenFeatures(tokens[:, :count], tokens[:, count:].reshape(b, *grid, d))


def _grid(image_size: int | tuple[int, int], patch: int, drop_rest: bool) -> tuple[int, int]:
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if drop_rest:
        height, width = height - height % patch, width - width % patch
    height, width = legal_size((height, width), patch)
    return height // patch, width // patch


def _position(
    kind: PositionKind, grid: tuple[int, int], width: int, *, key: PRNGKeyArray
) -> PositionEmbedding2D | SinCos2D:
    if kind == "learned":
        return PositionEmbedding2D(grid, width, key=key)
    return SinCos2D(width, endpoint=kind == "sincos2d_big_vision")


def vit(
    size: str,
    patch_size: int,
    *,
    image_size: int | tuple[int, int] = 224,
    in_channels: int = 3,
    class_token: bool = True,
    distillation_token: bool = False,
    num_registers: int = 0,
    position: PositionKind = "learned",
    position_on_class: bool = True,
    activation: Activation = "gelu",
    mlp: MLPKind = "plain",
    use_qkv_bias: bool = True,
    patch_bias: bool = True,
    pre_norm: bool = False,
    final_norm: bool = True,
    eps: float = 1e-6,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    layer_scale: float | None = None,
    implementation: Implementation = "xla",
    remat: Remat = "none",
    unroll: int = 1,
    key: PRNGKeyArray,
) -> VisionTransformer:
    """ViT of a named size; the defaults are those of timm and Hugging Face.

    google-research/vision_transformer (AugReg) has ``activation="gelu_tanh"``, Flax's default; big_vision has
    that too, and ``position_on_class=False``: its position embedding is added before a class token joins.
    """
    if size not in SIZES:
        raise ValueError(f"ViT size {size!r} does not exist; choose from {', '.join(SIZES)}")
    return VisionTransformer(
        SIZES[size],
        patch_size,
        image_size=image_size,
        in_channels=in_channels,
        class_token=class_token,
        distillation_token=distillation_token,
        num_registers=num_registers,
        position=position,
        position_on_class=position_on_class,
        activation=activation,
        mlp=mlp,
        use_qkv_bias=use_qkv_bias,
        patch_bias=patch_bias,
        pre_norm=pre_norm,
        final_norm=final_norm,
        eps=eps,
        dropout=dropout,
        drop_path=drop_path,
        layer_scale=layer_scale,
        implementation=implementation,
        remat=remat,
        unroll=unroll,
        key=key,
    )
