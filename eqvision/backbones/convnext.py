"""ConvNeXt (Liu et al. 2022) and ConvNeXt V2 (Woo et al. 2023).

Names and numbers follow facebookresearch/ConvNeXt and ConvNeXt-V2 (models/convnext.py, models/convnextv2.py).
"""

import functools
from typing import NamedTuple, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from eqvision.backbones.checks import check_images, check_layer
from eqvision.layers import (
    Activation,
    LayerNorm,
    LayerScale,
    Linear,
    PatchEmbed,
    Remat,
    activate,
    convolve,
    drop_path,
    fold,
    rematerialised,
    truncated_normal,
)
from eqvision.layers.drop import check_rate
from eqvision.ops.collectives import vary_like
from eqvision.types import Features, Images


@jax.custom_vjp
def depthwise(x: Float[Array, "b h w c"], weight: Float[Array, "k k 1 c"]) -> Float[Array, "b h w c"]:
    """Convolution of each channel by itself, stride 1, zeros at the border; ``k`` is odd. Reverse mode only.

    On the CPU it is k * k shifted copies times one weight each, summed in one loop, and its gradient by the weight
    a sum over one image after the other. XLA:CPU's grouped convolution takes about ten times as long forwards, and
    ten to fifty times as long for that gradient. Accelerators have kernels for it.
    """
    return lax.platform_dependent(x, weight, cpu=_shifted_sum, default=_grouped)


def _depthwise_forward(x, weight):
    return depthwise(x, weight), (x, weight)


def _depthwise_backward(saved, g):
    x, weight = saved
    g_weight = lax.platform_dependent(x, weight, g, cpu=_shifted_products, default=_grouped_gradient)
    return depthwise(g, weight[::-1, ::-1]), g_weight


depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def _grouped(x: Float[Array, "b h w c"], weight: Float[Array, "k k 1 c"]) -> Float[Array, "b h w c"]:
    return convolve(x, weight, padding=weight.shape[0] // 2, groups=x.shape[-1])


def _grouped_gradient(
    x: Float[Array, "b h w c"], weight: Float[Array, "k k 1 c"], g: Float[Array, "b h w c"]
) -> Float[Array, "k k 1 c"]:
    return jax.vjp(functools.partial(_grouped, x), weight)[1](g)[0]


def _padded(x: Float[Array, "b h w c"], kernel_size: int) -> Float[Array, "b h2 w2 c"]:
    """With zeros around, in float32: sums of 49 terms are not for bfloat16."""
    pad = (kernel_size // 2,) * 2
    return jnp.pad(x.astype(jnp.promote_types(x.dtype, jnp.float32)), ((0, 0), pad, pad, (0, 0)))


def _shifted_sum(x: Float[Array, "b h w c"], weight: Float[Array, "k k 1 c"]) -> Float[Array, "b h w c"]:
    k, (_, h, w, _) = weight.shape[0], x.shape
    padded, factors = _padded(x, k), weight.astype(jnp.promote_types(x.dtype, jnp.float32))
    terms = (padded[:, i : i + h, j : j + w] * factors[i, j, 0] for i in range(k) for j in range(k))
    return functools.reduce(jnp.add, terms).astype(x.dtype)


def _shifted_products(
    x: Float[Array, "b h w c"], weight: Float[Array, "k k 1 c"], g: Float[Array, "b h w c"]
) -> Float[Array, "k k 1 c"]:
    k, (_, h, w, _) = weight.shape[0], g.shape

    def row(image: Float[Array, "h2 w2 c"], g: Float[Array, "h w c"], i: Int[Array, ""]) -> Float[Array, "k c"]:
        """Row ``i`` of the window: k sums that are taken in one pass over the image."""
        rows = lax.dynamic_slice_in_dim(image, i, h)
        products = tuple(rows[:, j : j + w] * g for j in range(k))
        zeros = tuple(jnp.zeros((), g.dtype) for _ in products)
        return jnp.stack(lax.reduce(products, zeros, _add_all, (0, 1)))

    def window(pair: tuple[Float[Array, "h2 w2 c"], Float[Array, "h w c"]]) -> Float[Array, "k k c"]:
        return lax.map(functools.partial(row, *pair), jnp.arange(k))

    padded = _padded(x, k)
    # Image by image, so that what is read k * k times stays in the cache; a loop over rows halves the compile time.
    gradient = jnp.sum(lax.map(window, (padded, g.astype(padded.dtype))), axis=0)
    return gradient[:, :, None].astype(weight.dtype)


def _add_all(left: tuple[Array, ...], right: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(a + b for a, b in zip(left, right, strict=True))


class DepthwiseConv(eqx.Module):
    """Each channel by its own square window, with bias; ``weight`` is stored (height, width, 1, channels)."""

    weight: Float[Array, "k k 1 c"]
    bias: Float[Array, " c"]

    def __init__(self, channels: int, kernel_size: int = 7, *, key: PRNGKeyArray):
        if kernel_size % 2 == 0:
            raise ValueError(f"DepthwiseConv: a window of {kernel_size} has no middle; take an odd kernel_size")
        self.weight = truncated_normal(key, (kernel_size, kernel_size, 1, channels))
        self.bias = jnp.zeros((channels,))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        weight, bias = vary_like((self.weight.astype(x.dtype), self.bias.astype(x.dtype)), x)
        return depthwise(x, weight) + bias


class GlobalResponseNorm(eqx.Module):
    """Woo et al. 2023, section 3.3: channels scaled by their norm over the map, against the mean of these norms."""

    weight: Float[Array, " c"]
    bias: Float[Array, " c"]
    eps: float = eqx.field(static=True)

    def __init__(self, features: int, *, eps: float = 1e-6):
        self.weight = jnp.zeros((features,))
        self.bias = jnp.zeros((features,))
        self.eps = eps

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        norms = _norms(wide)
        relative = norms / (jnp.mean(norms, axis=-1, keepdims=True) + self.eps)
        return (wide * (1 + self.weight * relative) + self.bias).astype(x.dtype)


def _norms(x: Float[Array, "b h w c"]) -> Float[Array, "b 1 1 c"]:
    """Euclidean norm of each channel; its gradient at zero, as in a black image, is zero and not NaN."""
    squares = jnp.sum(jnp.square(x), axis=(1, 2), keepdims=True)
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0)


class ConvNeXtBlock(eqx.Module):
    """Depthwise 7x7, norm, and an MLP four times as wide: layer scale ends it in V1, GRN is inside it in V2."""

    conv: DepthwiseConv
    norm: LayerNorm
    fc1: Linear
    grn: GlobalResponseNorm | None
    fc2: Linear
    scale: LayerScale | None
    activation: Activation = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        *,
        grn: bool = False,
        layer_scale: float | None = 1e-6,
        activation: Activation = "gelu",
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key, 3)
        self.conv = DepthwiseConv(width, key=keys[0])
        self.norm = LayerNorm(width, eps=1e-6)
        self.fc1 = Linear(width, 4 * width, key=keys[1])
        self.grn = GlobalResponseNorm(4 * width) if grn else None
        self.fc2 = Linear(4 * width, width, key=keys[2])
        self.scale = None if layer_scale is None else LayerScale(width, initial=layer_scale)
        self.activation = activation

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        *,
        drop_path_rate: float | Float[Array, ""] = 0.0,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "b h w c"]:
        y = activate(self.fc1(self.norm(self.conv(x))), self.activation)
        y = self.fc2(y if self.grn is None else self.grn(y))
        y = y if self.scale is None else self.scale(y)
        return x + drop_path(y, drop_path_rate, train=train, key=key)


class Stem(eqx.Module):
    """Patches and their norm."""

    conv: PatchEmbed
    norm: LayerNorm

    def __init__(self, in_channels: int, width: int, patch_size: int = 4, *, key: PRNGKeyArray):
        self.conv = PatchEmbed(in_channels, width, patch_size, init=truncated_normal, key=key)
        self.norm = LayerNorm(width, eps=1e-6)

    def __call__(self, images: Images) -> Float[Array, "b h2 w2 d"]:
        return self.norm(self.conv(_cut(images, self.conv.patch_size[0])))


class Downsample(eqx.Module):
    """Norm, and then a convolution of 2x2 windows that halves the map."""

    norm: LayerNorm
    conv: PatchEmbed

    def __init__(self, in_channels: int, width: int, *, key: PRNGKeyArray):
        self.norm = LayerNorm(in_channels, eps=1e-6)
        self.conv = PatchEmbed(in_channels, width, 2, init=truncated_normal, key=key)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 c"]:
        return self.conv(self.norm(_cut(x, 2)))


def _cut(x: Float[Array, "b h w c"], step: int) -> Float[Array, "b h2 w2 c"]:
    """Without the rows and columns at the end that fill no window, which torch's convolution leaves out too."""
    return x[:, : x.shape[1] // step * step, : x.shape[2] // step * step]


class ConvNeXtStage(eqx.Module):
    """Downsampling where there is one, then equal blocks with stacked parameters, run by ``lax.scan``.

    ``rates`` are the drop-path rates of the blocks. ``remat`` and ``unroll`` are those of ``TransformerStack``.
    """

    downsample: Downsample | None
    blocks: ConvNeXtBlock
    rates: tuple[float, ...] = eqx.field(static=True)
    remat: Remat = eqx.field(static=True)
    unroll: int | bool = eqx.field(static=True)

    def __init__(
        self,
        downsample: Downsample | None,
        width: int,
        rates: tuple[float, ...],
        *,
        grn: bool = False,
        layer_scale: float | None = 1e-6,
        activation: Activation = "gelu",
        remat: Remat = "none",
        unroll: int | bool = 1,
        key: PRNGKeyArray,
    ):
        if remat not in get_args(Remat):
            raise ValueError(f"remat {remat!r} is unknown; choose from {get_args(Remat)}")

        def block(key: PRNGKeyArray) -> ConvNeXtBlock:
            return ConvNeXtBlock(width, grn=grn, layer_scale=layer_scale, activation=activation, key=key)

        self.downsample = downsample
        self.blocks = eqx.filter_vmap(block)(jax.random.split(key, len(rates)))
        self.rates = rates
        self.remat = remat
        self.unroll = unroll

    def __call__(
        self, x: Float[Array, "b h w i"], *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> Float[Array, "b h2 w2 c"]:
        def run(y, block, index, rate):
            rate = rate if any(self.rates) else 0.0
            return block(y, drop_path_rate=rate, train=train, key=fold(key, index))

        x = x if self.downsample is None else self.downsample(x)
        body = rematerialised(run, self.remat if train else "none")
        layers = self.blocks, jnp.arange(len(self.rates)), jnp.asarray(self.rates, jnp.float32)
        return lax.scan(lambda y, layer: (body(y, *layer), None), x, layers, unroll=self.unroll)[0]


class ConvNeXtSize(NamedTuple):
    """Blocks and channels of each stage."""

    depths: tuple[int, ...]
    widths: tuple[int, ...]


# Liu et al. 2022, section 3; Woo et al. 2023, appendix A.1. V1 is published from tiny to xlarge, V2 without xlarge.
CONVNEXT_SIZES = {
    "atto": ConvNeXtSize((2, 2, 6, 2), (40, 80, 160, 320)),
    "femto": ConvNeXtSize((2, 2, 6, 2), (48, 96, 192, 384)),
    "pico": ConvNeXtSize((2, 2, 6, 2), (64, 128, 256, 512)),
    "nano": ConvNeXtSize((2, 2, 8, 2), (80, 160, 320, 640)),
    "tiny": ConvNeXtSize((3, 3, 9, 3), (96, 192, 384, 768)),
    "small": ConvNeXtSize((3, 3, 27, 3), (96, 192, 384, 768)),
    "base": ConvNeXtSize((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ConvNeXtSize((3, 3, 27, 3), (192, 384, 768, 1536)),
    "xlarge": ConvNeXtSize((3, 3, 27, 3), (256, 512, 1024, 2048)),
    "huge": ConvNeXtSize((3, 3, 27, 3), (352, 704, 1408, 2816)),
}


class ConvNeXt(eqx.Module):
    """Stem of 4x4 patches and stages of blocks; returns the map of every stage, fine to coarse.

    Any image of at least the coarsest stride is legal. The last norm reads pooled features and is the head's
    (``NormedMapHead``). ``drop_path`` rises linearly from 0 in the first of all blocks to the given rate in the last.
    """

    stem: Stem
    stages: tuple[ConvNeXtStage, ...]
    in_channels: int = eqx.field(static=True)
    channels: tuple[int, ...] = eqx.field(static=True)
    strides: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        size: ConvNeXtSize,
        *,
        in_channels: int = 3,
        grn: bool = False,
        layer_scale: float | None = 1e-6,
        activation: Activation = "gelu",
        drop_path: float = 0.0,
        remat: Remat = "none",
        unroll: int | bool = 1,
        key: PRNGKeyArray,
    ):
        check_rate("drop_path", drop_path)
        rates, stages = np.linspace(0, drop_path, sum(size.depths)).tolist(), []
        for i, (depth, width) in enumerate(zip(*size, strict=True)):
            keys = jax.random.split(jax.random.fold_in(key, i))
            stage = ConvNeXtStage(
                Downsample(size.widths[i - 1], width, key=keys[0]) if i else None,
                width,
                tuple(rates[sum(size.depths[:i]) :][:depth]),
                grn=grn,
                layer_scale=layer_scale,
                activation=activation,
                remat=remat,
                unroll=unroll,
                key=keys[1],
            )
            stages.append(stage)
        self.stem = Stem(in_channels, size.widths[0], key=jax.random.fold_in(key, len(stages)))
        self.stages = tuple(stages)
        self.in_channels = in_channels
        self.channels = size.widths
        self.strides = tuple(4 * 2**i for i in range(len(stages)))

    def __call__(
        self, images: Images, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[Features, eqx.nn.State]:
        check_images(images, self.in_channels)
        if min(images.shape[1:3]) < self.strides[-1]:
            raise ValueError(
                f"images of {images.shape[1]}x{images.shape[2]} leave nothing at stride {self.strides[-1]}; "
                f"resize or pad them to at least {self.strides[-1]}x{self.strides[-1]}"
            )
        x, features = self.stem(images), []
        for i, stage in enumerate(self.stages):
            x = stage(x, train=train, key=fold(key, i))
            features.append(x)
        return tuple(features), state

    def intermediates(self, images: Images, state: eqx.nn.State, layers: tuple[int, ...]) -> Features:
        """Maps of the stages ``layers``; negative counts from the end."""
        features, _ = self(images, state)
        return tuple(features[check_layer(layer, len(features))] for layer in layers)


def convnext(
    size: str,
    *,
    version: int = 1,
    in_channels: int = 3,
    activation: Activation = "gelu",
    drop_path: float = 0.0,
    remat: Remat = "none",
    unroll: int | bool = 1,
    key: PRNGKeyArray,
) -> ConvNeXt:
    """ConvNeXt of a size in ``CONVNEXT_SIZES``; ``version`` 1 has layer scale, 2 global response normalisation."""
    if size not in CONVNEXT_SIZES:
        raise ValueError(f"ConvNeXt of size {size!r} does not exist; choose from {', '.join(CONVNEXT_SIZES)}")
    if version not in (1, 2):
        raise ValueError(f"ConvNeXt version {version} does not exist; choose 1 or 2")
    return ConvNeXt(
        CONVNEXT_SIZES[size],
        in_channels=in_channels,
        grn=version == 2,
        layer_scale=1e-6 if version == 1 else None,
        activation=activation,
        drop_path=drop_path,
        remat=remat,
        unroll=unroll,
        key=key,
    )
