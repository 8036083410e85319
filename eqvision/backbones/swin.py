"""Swin transformer (Liu et al. 2021): attention inside windows, which every second block shifts by half a window."""

import functools
from typing import Literal, NamedTuple, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from eqvision.backbones.checks import check_images, check_layer
from eqvision.layers import (
    MLP,
    Activation,
    Attention,
    Implementation,
    LayerNorm,
    Linear,
    PatchEmbed,
    Remat,
    drop_path,
    dropout,
    fold,
    rematerialised,
    truncated_normal,
)
from eqvision.layers.drop import check_rate
from eqvision.types import Features, Images

# What the libraries do with maps that windows do not divide, or that one window covers; see ``SwinTransformer``.
WindowRule = Literal["torchvision", "timm", "huggingface"]
Shift = tuple[int, int]

PATCH = 4
NORM_EPS = 1e-5  # of the norms behind the patches and before merging, which no configuration changes
MASKED = -100.0  # added to the logits of pairs that only the shift brings together; the originals' number


class SwinSize(NamedTuple):
    """``width`` is that of the first stage and doubles from stage to stage."""

    width: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]


# Liu et al. 2021, section 3.3.
SWIN_SIZES = {
    "t": SwinSize(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "s": SwinSize(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "b": SwinSize(128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "l": SwinSize(192, (2, 2, 18, 2), (6, 12, 24, 48)),
}


def window_shift(height: int, width: int, window: int, rule: WindowRule) -> Shift:
    """How far shifted windows lie from the others: half a window, and 0 along an axis that one window covers.

    Hugging Face and microsoft/Swin-Transformer shift along neither axis then.
    """
    rows, columns = (0 if side <= window else window // 2 for side in (height, width))
    return (0, 0) if rule == "huggingface" and not (rows and columns) else (rows, columns)


def cut_windows(
    x: Float[Array, "b h w c"], window: int, shift: Shift = (0, 0), rule: WindowRule = "torchvision"
) -> Float[Array, "n t c"]:
    """Windows of a map that is moved up and left by ``shift`` and padded by zeros, image after image."""
    x = _pad(_roll(x, shift), window) if rule == "timm" else _roll(_pad(x, window), shift)
    b, h, w, c = x.shape
    x = x.reshape(b, h // window, window, w // window, window, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, window * window, c)


def join_windows(
    windows: Float[Array, "n t c"], like: Float[Array, "b h w c"], shift: Shift, rule: WindowRule
) -> Float[Array, "b h w c"]:
    """The map of ``like``'s shape that ``cut_windows`` has cut."""
    (b, h, w, c), window = like.shape, round(windows.shape[1] ** 0.5)
    rows, columns = -(-h // window), -(-w // window)
    x = windows.reshape(b, rows, columns, window, window, c).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(b, rows * window, columns * window, c)
    back = (-shift[0], -shift[1])
    return _roll(x[:, :h, :w], back) if rule == "timm" else _roll(x, back)[:, :h, :w]


def _pad(x: Float[Array, "b h w c"], multiple: int) -> Float[Array, "b h2 w2 c"]:
    bottom, right = (-side % multiple for side in x.shape[1:3])
    return jnp.pad(x, ((0, 0), (0, bottom), (0, right), (0, 0))) if bottom or right else x


def _roll(x: Float[Array, "b h w c"], shift: Shift) -> Float[Array, "b h w c"]:
    return jnp.roll(x, (-shift[0], -shift[1]), axis=(1, 2)) if any(shift) else x


@functools.cache
def offset_index(window: int) -> Int[np.ndarray, "t t"]:
    """For each query and key of a window: where the table of (2 w - 1)^2 offsets, flattened, has their offset."""
    place = np.stack(np.meshgrid(np.arange(window), np.arange(window), indexing="ij")).reshape(2, -1)
    rows, columns = place[:, :, None] - place[:, None, :] + window - 1
    return rows * (2 * window - 1) + columns


def shifted_regions(height: int, width: int, window: int, shift: Shift) -> Int[np.ndarray, "n t"]:
    """For each place of each window a number that is equal where places were neighbours before the shift.

    Padding lies in the last region or among real places, as in the originals: they do not mask it.
    """
    sides = [-(-side // window) * window for side in (height, width)]
    rows, columns = (_regions(side, window, step) for side, step in zip(sides, shift, strict=True))
    numbers = (3 * rows[:, None] + columns).reshape(sides[0] // window, window, sides[1] // window, window)
    return numbers.transpose(0, 2, 1, 3).reshape(-1, window * window)


def _regions(side: int, window: int, shift: int) -> Int[np.ndarray, " side"]:
    place = np.arange(side)
    return (place >= side - window).astype(int) + (place >= side - shift) if shift else np.zeros(side, int)


class SwinBlock(eqx.Module):
    """Pre-norm block with attention inside windows; ``relative_bias`` has one row and column for each offset."""

    norm1: LayerNorm
    attention: Attention
    relative_bias: Float[Array, "r r h"]
    norm2: LayerNorm
    mlp: MLP

    def __init__(
        self,
        width: int,
        num_heads: int,
        window: int,
        *,
        activation: Activation = "gelu",
        eps: float = 1e-5,
        dropout: float = 0.0,
        implementation: Implementation = "xla",
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key, 3)
        self.norm1 = LayerNorm(width, eps=eps)
        options = {"dropout": dropout, "init": truncated_normal}
        self.attention = Attention(width, num_heads, implementation=implementation, **options, key=keys[0])
        self.relative_bias = truncated_normal(keys[1], (2 * window - 1, 2 * window - 1, num_heads))
        self.norm2 = LayerNorm(width, eps=eps)
        self.mlp = MLP(width, 4 * width, activation=activation, **options, key=keys[2])

    def __call__(
        self,
        x: Float[Array, "b h w d"],
        *,
        shift: Shift = (0, 0),
        rule: WindowRule = "torchvision",
        drop_path_rate: float | Float[Array, ""] = 0.0,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "b h w d"]:
        y = self._attend(self.norm1(x), shift, rule, train=train, key=fold(key, 0))
        x = x + drop_path(y, drop_path_rate, train=train, key=fold(key, 1))
        y = self.mlp(self.norm2(x), train=train, key=fold(key, 2))
        return x + drop_path(y, drop_path_rate, train=train, key=fold(key, 3))

    def _attend(self, y, shift: Shift, rule: WindowRule, *, train: bool, key: PRNGKeyArray | None):
        windows = cut_windows(y, self.window, shift, rule)
        bias = self._bias(y.shape, shift)
        bias = jnp.broadcast_to(bias, (y.shape[0], *bias.shape)).reshape(-1, *bias.shape[1:]) if any(shift) else bias
        return join_windows(self.attention(windows, bias=bias, train=train, key=key), y, shift, rule)

    @property
    def window(self) -> int:
        return (self.relative_bias.shape[0] + 1) // 2

    def _bias(self, shape: tuple[int, ...], shift: Shift) -> Float[Array, "n h t t"]:
        """What is added to the logits: by offset, and for shifted windows by region (one row for each window)."""
        table = self.relative_bias.reshape(-1, self.relative_bias.shape[-1])
        bias = jnp.moveaxis(table[offset_index(self.window)], -1, 0)[None]
        if not any(shift):
            return bias
        region = jnp.asarray(shifted_regions(shape[1], shape[2], self.window, shift), jnp.int32)
        apart = region[:, None, :, None] != region[:, None, None, :]
        return bias + jnp.where(apart, MASKED, 0.0).astype(bias.dtype)


class PatchMerging(eqx.Module):
    """Two by two places side by side, normalised, and half as many channels by a linear layer without bias."""

    norm: LayerNorm
    reduction: Linear

    def __init__(self, width: int, *, key: PRNGKeyArray):
        self.norm = LayerNorm(4 * width, eps=NORM_EPS)
        self.reduction = Linear(4 * width, 2 * width, use_bias=False, key=key)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 o"]:
        x = _pad(x, 2)
        b, h, w, c = x.shape
        # Column before row, as the originals line them up: (0, 0), (1, 0), (0, 1), (1, 1).
        x = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 4, 2, 5)
        return self.reduction(self.norm(x.reshape(b, h // 2, w // 2, 4 * c)))


class SwinStage(eqx.Module):
    """Merging of patches, if any, and pairs of a plain and a shifted block: stacked parameters run by ``lax.scan``.

    ``blocks`` has a leading axis of all blocks. ``drop_path`` is one rate for each; ``remat`` and ``unroll``, in
    pairs, are those of ``TransformerStack``.
    """

    merge: PatchMerging | None
    blocks: SwinBlock
    drop_path: tuple[float, ...] = eqx.field(static=True)
    rule: WindowRule = eqx.field(static=True)
    remat: Remat = eqx.field(static=True)
    unroll: int = eqx.field(static=True)

    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> Float[Array, "b h2 w2 d"]:
        x = x if self.merge is None else self.merge(x)
        run = rematerialised(functools.partial(self._pair, train=train, key=key), self.remat if train else "none")
        return lax.scan(lambda y, pair: (run(y, *pair), None), x, self._pairs(), unroll=self.unroll)[0]

    def _pairs(self):
        rates = jnp.asarray(self.drop_path, jnp.float32)
        layers = self.blocks, jnp.arange(len(self.drop_path)), rates
        return jax.tree.map(lambda leaf: leaf.reshape(-1, 2, *leaf.shape[1:]), layers)

    def _pair(self, x, blocks, index, rate, *, train, key):
        window = (self.blocks.relative_bias.shape[1] + 1) // 2
        for i, shift in enumerate(((0, 0), window_shift(x.shape[1], x.shape[2], window, self.rule))):
            block = jax.tree.map(lambda leaf, i=i: leaf[i], blocks)
            x = block(
                x,
                shift=shift,
                rule=self.rule,
                drop_path_rate=rate[i] if any(self.drop_path) else 0.0,
                train=train,
                key=fold(key, index[i]),
            )
        return x


class SwinTransformer(eqx.Module):
    """Patches of 4x4 and four stages, the later ones on half as many rows and columns and twice the channels.

    The features are the stages' outputs as they are: the final norm belongs to the classification head
    (``NormPoolHead``), and detectors have norms of their own.

    Images of any height and width are legal; zeros are added at the bottom and right where patches, windows (on the
    normalised map) or merging need them. They are not masked. ``window_rule`` says what is done at borders.
    ``torchvision``, which microsoft's detector shares: pad, then shift; no shift along an axis that one window
    covers. ``timm``: shift, then pad. ``huggingface``: pad, then shift, and no shift at all where one window covers
    an axis. They agree where windows divide the maps and the image is square, so in all published classifiers.
    timm has smaller windows and tables on maps that are smaller than a window; here the map is padded to it.

    ``eps`` is that of the blocks' norms.
    """

    patch_embed: PatchEmbed
    norm: LayerNorm
    stages: tuple[SwinStage, ...]
    dropout: float = eqx.field(static=True)
    in_channels: int = eqx.field(static=True)
    channels: tuple[int, ...] = eqx.field(static=True)
    strides: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        size: SwinSize,
        window: int = 7,
        *,
        in_channels: int = 3,
        window_rule: WindowRule = "torchvision",
        activation: Activation = "gelu",
        eps: float = 1e-5,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        implementation: Implementation = "xla",
        remat: Remat = "none",
        unroll: int = 1,
        key: PRNGKeyArray,
    ):
        _check_options(size, window, window_rule, remat)
        check_rate("drop_path", drop_path)
        keys = jax.random.split(key)
        self.patch_embed = PatchEmbed(in_channels, size.width, PATCH, key=keys[0])
        self.norm = LayerNorm(size.width, eps=NORM_EPS)
        block = functools.partial(
            SwinBlock, window=window, activation=activation, eps=eps, dropout=dropout, implementation=implementation
        )
        options = {"rule": window_rule, "remat": remat, "unroll": unroll}
        self.stages = tuple(
            _stage(size, i, block, rates, options, jax.random.fold_in(keys[1], i))
            for i, rates in enumerate(_rates(drop_path, size.depths))
        )
        self.dropout = dropout
        self.in_channels = in_channels
        self.channels = tuple(size.width << i for i in range(len(size.depths)))
        self.strides = tuple(PATCH << i for i in range(len(size.depths)))

    def __call__(
        self, images: Images, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[Features, eqx.nn.State]:
        check_images(images, self.in_channels)
        x = self.norm(self.patch_embed(_pad(images, PATCH)))
        x, features = dropout(x, self.dropout, train=train, key=fold(key, 0)), []
        for i, stage in enumerate(self.stages):
            x = stage(x, train=train, key=fold(key, 1 + i))
            features.append(x)
        return tuple(features), state

    def intermediates(self, images: Images, state: eqx.nn.State, layers: tuple[int, ...]) -> Features:
        """Maps of the stages ``layers``; negative counts from the end."""
        features, _ = self(images, state)
        return tuple(features[check_layer(layer, len(features))] for layer in layers)


def _check_options(size: SwinSize, window: int, rule: WindowRule, remat: Remat) -> None:
    if any(depth % 2 or depth <= 0 for depth in size.depths):
        raise ValueError(f"Swin: blocks come in pairs (plain, shifted) and depths {size.depths} are not all even")
    if window < 1:
        raise ValueError(f"Swin: window {window} is no number of places along a side of it; give 1 or more")
    if rule not in get_args(WindowRule):
        raise ValueError(f"window_rule {rule!r} is unknown; choose from {get_args(WindowRule)}")
    if remat not in get_args(Remat):
        raise ValueError(f"remat {remat!r} is unknown; choose from {get_args(Remat)}")


def _rates(drop_path: float, depths: tuple[int, ...]) -> list[tuple[float, ...]]:
    """Linear from 0 in the first block of the network to ``drop_path`` in its last, by stages."""
    rates = np.linspace(0, drop_path, sum(depths))
    return [tuple(map(float, each)) for each in np.split(rates, np.cumsum(depths)[:-1])]


def _stage(size: SwinSize, i: int, block, rates: tuple[float, ...], options, key: PRNGKeyArray) -> SwinStage:
    keys, width = jax.random.split(key), size.width << i
    merge = PatchMerging(width // 2, key=keys[0]) if i else None
    blocks = eqx.filter_vmap(lambda k: block(width, size.num_heads[i], key=k))(jax.random.split(keys[1], len(rates)))
    return SwinStage(merge, blocks, rates, **options)


def swin(
    size: str,
    window: int = 7,
    *,
    in_channels: int = 3,
    window_rule: WindowRule = "torchvision",
    activation: Activation = "gelu",
    eps: float = 1e-5,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    implementation: Implementation = "xla",
    remat: Remat = "none",
    unroll: int = 1,
    key: PRNGKeyArray,
) -> SwinTransformer:
    """Swin of a named size; published are windows of 7 for images of 224 pixels, and of 12 for 384 (b, l)."""
    if size not in SWIN_SIZES:
        raise ValueError(f"Swin size {size!r} does not exist; choose from {', '.join(SWIN_SIZES)}")
    return SwinTransformer(
        SWIN_SIZES[size],
        window,
        in_channels=in_channels,
        window_rule=window_rule,
        activation=activation,
        eps=eps,
        dropout=dropout,
        drop_path=drop_path,
        implementation=implementation,
        remat=remat,
        unroll=unroll,
        key=key,
    )
