"""Hybrid ViT (Dosovitskiy et al. 2021, Steiner et al. 2021): a transformer on the map of a ResNet stem."""

import functools
from typing import NamedTuple

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.backbones.bit import Stage, bottleneck_stages
from eqvision.backbones.checks import check_images, legal_size
from eqvision.backbones.vit import SIZES, VisionTransformer
from eqvision.layers import Activation, EpsOn, GroupNorm, Implementation, Remat, StandardizedConv, max_pool
from eqvision.types import Images, TokenFeatures


class StandardizedConvNorm(eqx.Module):
    """A standardised convolution, padded as TensorFlow does, and its group norm."""

    conv: StandardizedConv
    norm: GroupNorm

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        num_groups: int = 32,
        conv_eps: float = 1e-8,
        conv_eps_on: EpsOn = "variance",
        norm_eps: float = 1e-5,
        weight_init: float = 1.0,
        key: PRNGKeyArray,
    ):
        self.conv = StandardizedConv(
            in_channels, out_channels, kernel_size, stride=stride, eps=conv_eps, eps_on=conv_eps_on, key=key
        )
        self.norm = GroupNorm(out_channels, num_groups=num_groups, eps=norm_eps, weight_init=weight_init)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        return self.norm(self.conv(x))


class PostActivationBlock(eqx.Module):
    """Bottleneck with the ReLU after each norm and after the sum; its last norm starts at zero."""

    conv1: StandardizedConvNorm
    conv2: StandardizedConvNorm
    conv3: StandardizedConvNorm
    projection: StandardizedConvNorm | None

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        stride: int = 1,
        num_groups: int = 32,
        conv_eps: float = 1e-8,
        conv_eps_on: EpsOn = "variance",
        norm_eps: float = 1e-5,
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key, 4)
        conv = functools.partial(
            StandardizedConvNorm,
            num_groups=num_groups,
            conv_eps=conv_eps,
            conv_eps_on=conv_eps_on,
            norm_eps=norm_eps,
        )
        self.conv1 = conv(in_channels, width, 1, key=keys[0])
        self.conv2 = conv(width, width, 3, stride=stride, key=keys[1])
        self.conv3 = conv(width, 4 * width, 1, weight_init=0.0, key=keys[2])
        changes = stride > 1 or in_channels != 4 * width
        self.projection = conv(in_channels, 4 * width, 1, stride=stride, key=keys[3]) if changes else None

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        y = jax.nn.relu(self.conv1(x))
        y = self.conv3(jax.nn.relu(self.conv2(y)))
        shortcut = x if self.projection is None else self.projection(x)
        return jax.nn.relu(shortcut + y)


class HybridStem(eqx.Module):
    """Root of stride 4 and stages of ``blocks`` bottlenecks, each stage but the first of stride 2.

    ``blocks`` may be empty. ``conv_eps`` is added to the variance of the weights and ``norm_eps`` to that of the
    maps, as in timm and transformers. google-research/vision_transformer has ``norm_eps=1e-6``, ``conv_eps=1e-5``
    and ``conv_eps_on="deviation"``.
    """

    root: StandardizedConvNorm
    stages: tuple[Stage, ...]
    in_channels: int = eqx.field(static=True)
    channels: int = eqx.field(static=True)
    stride: int = eqx.field(static=True)

    def __init__(
        self,
        blocks: tuple[int, ...],
        width: int = 64,
        *,
        in_channels: int = 3,
        num_groups: int = 32,
        conv_eps: float = 1e-8,
        conv_eps_on: EpsOn = "variance",
        norm_eps: float = 1e-5,
        remat: Remat = "none",
        unroll: int | bool = True,
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key)
        self.root = StandardizedConvNorm(
            in_channels,
            width,
            7,
            stride=2,
            num_groups=num_groups,
            conv_eps=conv_eps,
            conv_eps_on=conv_eps_on,
            norm_eps=norm_eps,
            key=keys[0],
        )
        block = functools.partial(
            PostActivationBlock,
            num_groups=num_groups,
            conv_eps=conv_eps,
            conv_eps_on=conv_eps_on,
            norm_eps=norm_eps,
        )
        self.stages = bottleneck_stages(block, blocks, width, remat=remat, unroll=unroll, key=keys[1])
        self.in_channels = in_channels
        self.channels = 4 * width * 2 ** (len(blocks) - 1) if blocks else width
        self.stride = 4 * 2 ** max(0, len(blocks) - 1)

    def __call__(self, images: Images, *, train: bool = False) -> Float[Array, "b h2 w2 d"]:
        x = max_pool(jax.nn.relu(self.root(images)), 3, stride=2, padding="SAME")
        for stage in self.stages:
            x = stage(x, train=train)
        return x


class HybridViT(eqx.Module):
    """A ``HybridStem`` whose map a ``VisionTransformer`` reads as its image, with patches of 1x1 as a rule.

    Images of any height and width that the stride divides are legal.
    """

    stem: HybridStem
    vit: VisionTransformer
    in_channels: int = eqx.field(static=True)
    channels: tuple[int, ...] = eqx.field(static=True)
    strides: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, stem: HybridStem, vit: VisionTransformer):
        if vit.in_channels != stem.channels:
            raise ValueError(
                f"the stem gives maps of {stem.channels} channels and the transformer was built with "
                f"in_channels={vit.in_channels}; build it with in_channels={stem.channels}"
            )
        self.stem = stem
        self.vit = vit
        self.in_channels = stem.in_channels
        self.channels = vit.channels
        self.strides = (stem.stride * vit.strides[0],)

    def __call__(
        self, images: Images, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[TokenFeatures, eqx.nn.State]:
        self._check(images)
        return self.vit(self.stem(images, train=train), state, train=train, key=key)

    def intermediates(
        self, images: Images, state: eqx.nn.State, layers: tuple[int, ...], *, normalise: bool = True
    ) -> tuple[TokenFeatures, ...]:
        """Outputs of the transformer's blocks ``layers``, as ``VisionTransformer.intermediates`` has them."""
        self._check(images)
        return self.vit.intermediates(self.stem(images), state, layers, normalise=normalise)

    def _check(self, images: Images) -> None:
        check_images(images, self.in_channels, (self.strides[0], self.strides[0]))


class HybridSize(NamedTuple):
    blocks: tuple[int, ...]
    vit: str
    patch_size: int


# vit_jax/configs/models.py of google-research/vision_transformer. The ResNet before B/16 has 3, 4, 9 blocks
# and so stride 16. Without stages the stem has stride 4, so that R+Ti/16 has in fact patches of 32 pixels.
HYBRID_SIZES = {
    "r_ti16": HybridSize((), "ti", 8),
    "r26_s32": HybridSize((2, 2, 2, 2), "s", 1),
    "r26_b32": HybridSize((2, 2, 2, 2), "b", 1),
    "r50_b16": HybridSize((3, 4, 9), "b", 1),
    "r50_l32": HybridSize((3, 4, 6, 3), "l", 1),
}


def hybrid_vit(
    size: str,
    *,
    image_size: int | tuple[int, int] = 224,
    in_channels: int = 3,
    activation: Activation = "gelu_tanh",
    conv_eps: float = 1e-8,
    conv_eps_on: EpsOn = "variance",
    norm_eps: float = 1e-5,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    implementation: Implementation = "xla",
    remat: Remat = "none",
    unroll: int = 1,
    unroll_stem: int | bool = True,
    key: PRNGKeyArray,
) -> HybridViT:
    """Hybrid ViT ``r_ti16``, ``r26_s32``, ``r26_b32``, ``r50_b16`` or ``r50_l32``, with a class token.

    ``activation`` is ``gelu_tanh`` in google-research/vision_transformer and the exact ``gelu`` in timm;
    ``conv_eps``, ``conv_eps_on`` and ``norm_eps`` are those of ``HybridStem``. ``unroll`` is the transformer's,
    ``unroll_stem`` that of the stages of the ResNet (see ``Stage``).
    """
    if size not in HYBRID_SIZES:
        raise ValueError(f"hybrid ViT {size!r} does not exist; choose from {', '.join(HYBRID_SIZES)}")
    blocks, vit, patch_size = HYBRID_SIZES[size]
    keys = jax.random.split(key)
    stem = HybridStem(
        blocks,
        in_channels=in_channels,
        conv_eps=conv_eps,
        conv_eps_on=conv_eps_on,
        norm_eps=norm_eps,
        remat=remat,
        unroll=unroll_stem,
        key=keys[0],
    )
    height, width = legal_size(image_size, stem.stride * patch_size)
    transformer = VisionTransformer(
        SIZES[vit],
        patch_size,
        image_size=(height // stem.stride, width // stem.stride),
        in_channels=stem.channels,
        activation=activation,
        dropout=dropout,
        drop_path=drop_path,
        implementation=implementation,
        remat=remat,
        unroll=unroll,
        key=keys[1],
    )
    return HybridViT(stem, transformer)
