"""MLP-Mixer (Tolstikhin et al. 2021): MLPs over positions and over channels in turn, no attention."""

import functools
from typing import NamedTuple, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.backbones.checks import check_images, check_layer, legal_size
from eqvision.layers import (
    MLP,
    Activation,
    LayerNorm,
    PatchEmbed,
    Remat,
    drop_path,
    fold,
    lecun_normal,
    rematerialised,
)
from eqvision.types import Images, TokenFeatures


class MixerSize(NamedTuple):
    width: int
    depth: int
    token_dim: int
    channel_dim: int


# Tolstikhin et al. 2021, table 1; the table has S and B at patch 32 and 16, L at 32 and 16, H at 14.
MIXER_SIZES = {
    "s": MixerSize(512, 8, 256, 2048),
    "b": MixerSize(768, 12, 384, 3072),
    "l": MixerSize(1024, 24, 512, 4096),
    "h": MixerSize(1280, 32, 640, 5120),
}


class MixerBlock(eqx.Module):
    """An MLP across positions, the same for every channel, then one across channels; norms come first."""

    norm1: LayerNorm
    token_mlp: MLP
    norm2: LayerNorm
    channel_mlp: MLP

    def __init__(
        self,
        positions: int,
        size: MixerSize,
        *,
        eps: float = 1e-6,
        activation: Activation = "gelu_tanh",
        dropout: float = 0.0,
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key)
        mlp = functools.partial(MLP, activation=activation, dropout=dropout, init=lecun_normal)
        self.norm1 = LayerNorm(size.width, eps=eps)
        self.token_mlp = mlp(positions, size.token_dim, key=keys[0])
        self.norm2 = LayerNorm(size.width, eps=eps)
        self.channel_mlp = mlp(size.width, size.channel_dim, key=keys[1])

    def __call__(
        self,
        x: Float[Array, "b n d"],
        *,
        drop_path_rate: float | Float[Array, ""] = 0.0,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "b n d"]:
        y = self.token_mlp(self.norm1(x).swapaxes(1, 2), train=train, key=fold(key, 0)).swapaxes(1, 2)
        x = x + drop_path(y, drop_path_rate, train=train, key=fold(key, 1))
        y = self.channel_mlp(self.norm2(x), train=train, key=fold(key, 2))
        return x + drop_path(y, drop_path_rate, train=train, key=fold(key, 3))


class Mixer(eqx.Module):
    """Patches, a scanned stack of mixer blocks, a final norm; the prefix of its features is empty.

    Token mixing has a weight for every position, so only images of the size it was built for are legal.
    ``remat`` and ``unroll`` are those of ``TransformerStack``; ``drop_path`` rises linearly from 0 in the
    first block to the given rate in the last.
    """

    patch_embed: PatchEmbed
    blocks: MixerBlock
    norm: LayerNorm
    depth: int = eqx.field(static=True)
    drop_path: float = eqx.field(static=True)
    remat: Remat = eqx.field(static=True)
    unroll: int = eqx.field(static=True)
    image_size: tuple[int, int] = eqx.field(static=True)
    in_channels: int = eqx.field(static=True)
    channels: tuple[int, ...] = eqx.field(static=True)
    strides: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        size: MixerSize,
        patch_size: int,
        *,
        image_size: int | tuple[int, int] = 224,
        in_channels: int = 3,
        activation: Activation = "gelu_tanh",
        eps: float = 1e-6,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        remat: Remat = "none",
        unroll: int = 1,
        key: PRNGKeyArray,
    ):
        if remat not in get_args(Remat):
            raise ValueError(f"remat {remat!r} is unknown; choose from {get_args(Remat)}")
        self.image_size = legal_size(image_size, patch_size)
        positions = (self.image_size[0] // patch_size) * (self.image_size[1] // patch_size)
        keys = jax.random.split(key)
        self.patch_embed = PatchEmbed(in_channels, size.width, patch_size, key=keys[0])
        block = functools.partial(MixerBlock, positions, size, eps=eps, activation=activation, dropout=dropout)
        self.blocks = eqx.filter_vmap(lambda key: block(key=key))(jax.random.split(keys[1], size.depth))
        self.norm = LayerNorm(size.width, eps=eps)
        self.depth = size.depth
        self.drop_path = drop_path
        self.remat = remat
        self.unroll = unroll
        self.in_channels = in_channels
        self.channels = (size.width,)
        self.strides = (patch_size,)

    def __call__(
        self, images: Images, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[TokenFeatures, eqx.nn.State]:
        tokens, grid = self._embed(images)
        run = functools.partial(self._block, train=train, key=key)
        body = rematerialised(run, self.remat if train else "none")
        tokens = lax.scan(lambda x, layer: (body(x, *layer), None), tokens, self._layers(), unroll=self.unroll)[0]
        return _split(self.norm(tokens), grid), state

    def intermediates(
        self, images: Images, state: eqx.nn.State, layers: tuple[int, ...], *, normalise: bool = True
    ) -> tuple[TokenFeatures, ...]:
        """Outputs of the blocks ``layers``, negative from the end; after the final norm unless told not to."""
        del state
        tokens, grid = self._embed(images)
        run = functools.partial(self._block, train=False, key=None)
        outputs = lax.scan(lambda x, layer: (run(x, *layer),) * 2, tokens, self._layers())[1]
        chosen = [outputs[check_layer(layer, self.depth)] for layer in layers]
        return tuple(_split(self.norm(x) if normalise else x, grid) for x in chosen)

    def _embed(self, images: Images) -> tuple[Float[Array, "b n d"], tuple[int, int]]:
        check_images(images, self.in_channels)
        if images.shape[1:3] != self.image_size:
            raise ValueError(_size_message(images.shape, self.image_size))
        patches = self.patch_embed(images)
        b, h, w, d = patches.shape
        return patches.reshape(b, h * w, d), (h, w)

    def _layers(self):
        rates = np.linspace(0, self.drop_path, self.depth, dtype=np.float32)
        return self.blocks, jnp.arange(self.depth), jnp.asarray(rates)

    def _block(self, x, block, index, rate, *, train, key):
        return block(x, drop_path_rate=rate if self.drop_path else 0.0, train=train, key=fold(key, index))


def _split(tokens: Float[Array, "b n d"], grid: tuple[int, int]) -> TokenFeatures:
    b, _, d = tokens.shape
    return TokenFeatures(tokens[:, :0], tokens.reshape(b, *grid, d))


def _size_message(shape: tuple[int, ...], image_size: tuple[int, int]) -> str:
    return (
        f"this mixer was built for images of {image_size[0]}x{image_size[1]} and got {shape[1]}x{shape[2]}; "
        "its token mixing has a weight for every position, so resize the images or build it with "
        f"image_size={shape[1:3]}"
    )


def mixer(
    size: str,
    patch_size: int,
    *,
    image_size: int | tuple[int, int] = 224,
    in_channels: int = 3,
    activation: Activation = "gelu_tanh",
    dropout: float = 0.0,
    drop_path: float = 0.0,
    remat: Remat = "none",
    unroll: int = 1,
    key: PRNGKeyArray,
) -> Mixer:
    """MLP-Mixer of size ``s``, ``b``, ``l`` or ``h``.

    ``activation`` is ``gelu_tanh`` in google-research/vision_transformer and the exact ``gelu`` in timm.
    """
    if size not in MIXER_SIZES:
        raise ValueError(f"mixer size {size!r} does not exist; choose from {', '.join(MIXER_SIZES)}")
    return Mixer(
        MIXER_SIZES[size],
        patch_size,
        image_size=image_size,
        in_channels=in_channels,
        activation=activation,
        dropout=dropout,
        drop_path=drop_path,
        remat=remat,
        unroll=unroll,
        key=key,
    )
