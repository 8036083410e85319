"""Plain vision transformer for detection (Li et al. 2022, ViTDet): windows, a few global blocks, relative positions.

The image encoder of Segment Anything (Kirillov et al. 2023) is the same network.
"""

import functools
import itertools
import math
from typing import Any, Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Num, PRNGKeyArray

from eqvision.backbones.checks import check_images, check_layer, legal_size
from eqvision.backbones.swin import cut_windows, join_windows
from eqvision.backbones.vit import SIZES, ViTSize
from eqvision.layers import (
    MLP,
    Activation,
    Conv,
    Implementation,
    LayerNorm,
    PatchEmbed,
    Remat,
    activate,
    drop_path,
    fold,
    rematerialised,
    truncated_normal,
)
from eqvision.layers.drop import check_rate
from eqvision.layers.relative_attention import RelativeAttention
from eqvision.ops import resize_bicubic
from eqvision.types import Features, Images

Step = Literal["window", "global", "residual"]
Map = Float[Array, "b h w d"]


class VitDetBlock(eqx.Module):
    """Pre-norm block whose attention sees one window, or with ``window`` None the whole map.

    Windows that do not divide the map are padded by zeros behind the norm, and the padding takes part in attention as
    it does in the original.
    """

    norm1: LayerNorm
    attention: RelativeAttention
    norm2: LayerNorm
    mlp: MLP

    def __init__(
        self,
        size: ViTSize,
        grid: tuple[int, int] | None,
        *,
        use_qkv_bias: bool,
        activation: Activation,
        eps: float,
        implementation: Implementation,
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key)
        self.norm1 = LayerNorm(size.width, eps=eps)
        self.attention = RelativeAttention(
            size.width, size.num_heads, grid=grid, use_bias=use_qkv_bias, implementation=implementation, key=keys[0]
        )
        self.norm2 = LayerNorm(size.width, eps=eps)
        self.mlp = MLP(size.width, size.mlp_dim, activation=activation, init=truncated_normal, key=keys[1])

    def __call__(
        self,
        x: Map,
        *,
        window: int | None,
        drop_path_rate: float | Float[Array, ""] = 0.0,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> Map:
        y = self._attend(self.norm1(x), window)
        x = x + drop_path(y, drop_path_rate, train=train, key=fold(key, 0))
        y = self.mlp(self.norm2(x), train=train, key=fold(key, 1))
        return x + drop_path(y, drop_path_rate, train=train, key=fold(key, 2))

    def _attend(self, y: Map, window: int | None) -> Map:
        if window is None:
            return self.attention(y)
        windows = cut_windows(y, window)
        mixed = self.attention(windows.reshape(-1, window, window, windows.shape[-1]))
        return join_windows(mixed.reshape(windows.shape), y, (0, 0), "torchvision")


class ResidualBottleneck(eqx.Module):
    """Convolutions 1x1, 3x3, 1x1 with layer norms, added to the input: ViTDet's other way across windows.

    The last norm starts at zero, so that the block starts as nothing.
    """

    convs: tuple[Conv, ...]
    norms: tuple[LayerNorm, ...]
    activation: Activation = eqx.field(static=True)

    def __init__(self, width: int, *, activation: Activation, key: PRNGKeyArray):
        keys, inner = jax.random.split(key, 3), width // 2
        sides = [(width, inner, 1), (inner, inner, 3), (inner, width, 1)]
        self.convs = tuple(Conv(i, o, k, padding=k // 2, key=each) for (i, o, k), each in zip(sides, keys, strict=True))
        norms = [LayerNorm(o) for _, o, _ in sides]
        norms[-1] = eqx.tree_at(lambda norm: norm.weight, norms[-1], jnp.zeros((width,)))
        self.norms = tuple(norms)
        self.activation = activation

    def __call__(self, x: Map) -> Map:
        y = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(activate(y, self.activation) if i else y))
        return x + y


class VitDet(eqx.Module):
    """Patches, a position embedding, and blocks most of which attend inside windows; one map, without a final norm.

    ``global_blocks`` see the whole map, ``residual_blocks`` are followed by a ``ResidualBottleneck``. Blocks of one
    kind are stacked; the network is a scan over the period of its kinds (two window blocks and a global one, say),
    and in it a scan over equal neighbours, so that each kind is compiled once.

    ``position`` is the pretraining's grid without its class token (``position_grid`` cuts it from a checkpoint) and is
    resampled bicubically, with torch's numbers, for other maps. The tables of global blocks are for ``image_size``
    and resampled for others. Images of any height and width that the patch divides are legal.
    """

    patch_embed: PatchEmbed
    position: Float[Array, "gh gw d"] | None
    window_blocks: VitDetBlock | None
    global_blocks: VitDetBlock | None
    residuals: ResidualBottleneck | None
    steps: tuple[Step, ...] = eqx.field(static=True)
    window: int = eqx.field(static=True)
    drop_path: float = eqx.field(static=True)
    remat: Remat = eqx.field(static=True)
    in_channels: int = eqx.field(static=True)
    channels: tuple[int, ...] = eqx.field(static=True)
    strides: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        size: ViTSize,
        patch_size: int = 16,
        *,
        image_size: int | tuple[int, int] = 1024,
        position_size: int | tuple[int, int] | None = 224,
        window: int = 14,
        global_blocks: tuple[int, ...],
        residual_blocks: tuple[int, ...] = (),
        relative_positions: bool = True,
        use_qkv_bias: bool = True,
        activation: Activation = "gelu",
        eps: float = 1e-6,
        drop_path: float = 0.0,
        in_channels: int = 3,
        implementation: Implementation = "xla",
        remat: Remat = "none",
        key: PRNGKeyArray,
    ):
        _check_options(size.depth, window, global_blocks, residual_blocks, drop_path, remat)
        keys = jax.random.split(key, 5)
        grids = _grid(image_size, patch_size), (window, window)
        shape = None if position_size is None else (*_grid(position_size, patch_size), size.width)
        block = functools.partial(
            VitDetBlock,
            size,
            use_qkv_bias=use_qkv_bias,
            activation=activation,
            eps=eps,
            implementation=implementation,
        )
        build_global, build_window = (functools.partial(block, grid if relative_positions else None) for grid in grids)
        residual = functools.partial(ResidualBottleneck, size.width, activation=activation)
        self.patch_embed = PatchEmbed(in_channels, size.width, patch_size, key=keys[0])
        self.position = None if shape is None else truncated_normal(keys[1], shape)
        self.window_blocks = _stack(build_window, size.depth - len(global_blocks), keys[2])
        self.global_blocks = _stack(build_global, len(global_blocks), keys[3])
        self.residuals = _stack(residual, len(residual_blocks), keys[4])
        self.steps = tuple(_steps(size.depth, global_blocks, residual_blocks))
        self.window = window
        self.drop_path = drop_path
        self.remat = remat
        self.in_channels = in_channels
        self.channels = (size.width,)
        self.strides = (patch_size,)

    def __call__(
        self, images: Images, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[Features, eqx.nn.State]:
        return (self._run(self._embed(images), train=train, key=key, collect=False)[0],), state

    def intermediates(self, images: Images, state: eqx.nn.State, layers: tuple[int, ...]) -> Features:
        """Maps behind the blocks ``layers`` (negative: from the end), their residual convolutions included."""
        del state
        _, outputs = self._run(self._embed(images), train=False, key=None, collect=True)
        return tuple(outputs[check_layer(layer, outputs.shape[0])] for layer in layers)

    @property
    def block_numbers(self) -> dict[str, tuple[int, ...]]:
        """Places in the network: of each stack's blocks, and for the residual convolutions that of the block before."""
        blocks = [step for step in self.steps if step != "residual"]
        numbers = {f"{kind}_blocks": tuple(i for i, step in enumerate(blocks) if step == kind) for kind in set(blocks)}
        places = [place for place, step in enumerate(self.steps) if step == "residual"]
        residual = tuple(place - 1 - number for number, place in enumerate(places))
        return {**numbers, "residuals": residual} if residual else numbers

    def _embed(self, images: Images) -> Float[Array, "b gh gw d"]:
        patch = self.strides[0]
        check_images(images, self.in_channels, (patch, patch))
        x = self.patch_embed(images)
        if self.position is None:
            return x
        grid = (x.shape[1], x.shape[2])
        position = self.position if self.position.shape[:2] == grid else resize_bicubic(self.position[None], grid)[0]
        return x + position.astype(x.dtype)

    def _run(self, x: Map, *, train: bool, key: PRNGKeyArray | None, collect: bool) -> tuple[Map, Any]:
        """The map behind the last block, and with ``collect`` those behind all blocks (l, b, h, w, d)."""
        period = _period(self.steps)
        runs = [(step, len(list(group))) for step, group in itertools.groupby(self.steps[:period])]
        remat = self.remat if train else "none"
        bodies = {
            step: rematerialised(functools.partial(self._step, step, train=train, key=key), remat)
            for step in get_args(Step)
        }

        def once(x, layers):
            outputs: list[Any] = []
            done = dict.fromkeys(get_args(Step), 0)
            for step, count in runs:
                part = _part(layers[step], done[step], count)
                x, each = lax.scan(functools.partial(_carry, bodies[step], collect), x, part)
                if collect and step == "residual":  # it replaces what its block has put out
                    outputs[-1] = outputs[-1][:-1]
                outputs.append(each)
                done[step] += count
            return x, jnp.concatenate(outputs) if collect else None

        repeats = len(self.steps) // period
        stacked: Any  # None or an array, as ``collect`` says
        x, stacked = lax.scan(once, x, jax.tree.map(functools.partial(_split, repeats), self._layers()))
        return x, stacked.reshape(-1, *stacked.shape[2:]) if collect else None

    def _layers(self):
        """For each kind its stacked blocks, their numbers in the network and their rates of drop path."""
        blocks = [step for step in self.steps if step != "residual"]
        rates = np.linspace(0, self.drop_path, len(blocks), dtype=np.float32)
        layers = {}
        for step, stack in (("window", self.window_blocks), ("global", self.global_blocks)):
            numbers = np.array([i for i, each in enumerate(blocks) if each == step], np.int32)
            if stack is not None:
                layers[step] = stack, jnp.asarray(numbers), jnp.asarray(rates[numbers])
        return layers if self.residuals is None else {**layers, "residual": self.residuals}

    def _step(self, step: Step, x: Map, layer, *, train: bool, key: PRNGKeyArray | None) -> Map:
        if step == "residual":
            return layer(x)
        block, number, rate = layer
        return block(
            x,
            window=self.window if step == "window" else None,
            drop_path_rate=rate if self.drop_path else 0.0,
            train=train,
            key=fold(key, number),
        )


def _carry(body, collect: bool, x: Map, layer):
    y = body(x, layer)
    return y, y if collect else None


def _part(layers, first: int, count: int):
    return jax.tree.map(lambda leaf: leaf[first : first + count], layers)


def _split(repeats: int, leaf: Array) -> Array:
    return leaf.reshape(repeats, -1, *leaf.shape[1:])


def _period(steps: tuple[Step, ...]) -> int:
    """The shortest beginning of which the steps are repetitions."""
    return next(p for p in range(1, len(steps) + 1) if len(steps) % p == 0 and steps[:p] * (len(steps) // p) == steps)


def _steps(depth: int, global_blocks: tuple[int, ...], residual_blocks: tuple[int, ...]):
    for i in range(depth):
        yield "global" if i in global_blocks else "window"
        if i in residual_blocks:
            yield "residual"


def _stack(build, count: int, key: PRNGKeyArray):
    return eqx.filter_vmap(lambda k: build(key=k))(jax.random.split(key, count)) if count else None


def _grid(size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    height, width = legal_size(size, patch_size)
    return height // patch_size, width // patch_size


def _check_options(
    depth: int,
    window: int,
    global_blocks: tuple[int, ...],
    residual_blocks: tuple[int, ...],
    drop_path: float,
    remat: Remat,
) -> None:
    for name, numbers in (("global_blocks", global_blocks), ("residual_blocks", residual_blocks)):
        if len(set(numbers)) != len(numbers) or not all(0 <= number < depth for number in numbers):
            raise ValueError(f"VitDet: {name} {numbers} must be different blocks, of which 0..{depth - 1} exist")
    if window < 1:
        raise ValueError(f"VitDet: window {window} is no number of places along a side of it; give 1 or more")
    if remat not in get_args(Remat):
        raise ValueError(f"remat {remat!r} is unknown; choose from {get_args(Remat)}")
    check_rate("drop_path", drop_path)


def position_grid(
    table: Num[np.ndarray, "1 n d"] | Float[Array, "1 n d"], *, class_token: bool
) -> Num[np.ndarray, "h w d"] | Float[Array, "h w d"]:
    """A pretraining's position embedding of a square grid as ``VitDet.position``; the class token's row is cut off.

    Raises ValueError where the rows are no square, as they are with the wrong ``class_token``.
    """
    rows = table[0, 1:] if class_token else table[0]
    side = math.isqrt(rows.shape[0])
    if side * side != rows.shape[0]:
        other = "without" if class_token else "with"
        raise ValueError(
            f"position embedding of {table.shape[1]} rows: {rows.shape[0]} of them should be a square grid; "
            f"try it {other} a class token (class_token={not class_token})"
        )
    return rows.reshape(side, side, -1)


# Li et al. 2022: blocks with global attention (the last of each quarter), and the drop path of their recipes.
GLOBAL_BLOCKS = {"b": (2, 5, 8, 11), "l": (5, 11, 17, 23), "h": (7, 15, 23, 31)}
DROP_PATH = {"b": 0.1, "l": 0.4, "h": 0.5}


def vitdet(
    size: str,
    patch_size: int = 16,
    *,
    image_size: int | tuple[int, int] = 1024,
    position_size: int | tuple[int, int] | None = 224,
    window: int = 14,
    use_qkv_bias: bool = True,
    activation: Activation = "gelu",
    eps: float = 1e-6,
    drop_path: float | None = None,
    in_channels: int = 3,
    implementation: Implementation = "xla",
    remat: Remat = "none",
    key: PRNGKeyArray,
) -> VitDet:
    """ViTDet of size b, l or h with four global blocks; ``drop_path`` None is the paper's: 0.1, 0.4, 0.5.

    Segment Anything's image encoders are these with ``position_size=1024`` and, in inference, no drop path.
    """
    if size not in GLOBAL_BLOCKS:
        raise ValueError(f"ViTDet size {size!r} does not exist; choose from {', '.join(GLOBAL_BLOCKS)}")
    return VitDet(
        SIZES[size],
        patch_size,
        image_size=image_size,
        position_size=position_size,
        window=window,
        global_blocks=GLOBAL_BLOCKS[size],
        use_qkv_bias=use_qkv_bias,
        activation=activation,
        eps=eps,
        drop_path=DROP_PATH[size] if drop_path is None else drop_path,
        in_channels=in_channels,
        implementation=implementation,
        remat=remat,
        key=key,
    )


vitdet_b = functools.partial(vitdet, "b")
vitdet_l = functools.partial(vitdet, "l")
vitdet_h = functools.partial(vitdet, "h")
