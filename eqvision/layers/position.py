"""Position embeddings: learned and sin-cos tables, and their resampling to another grid."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, PRNGKeyArray

from eqvision.layers.init import normal
from eqvision.ops.resize import ResizeMethod, resize_images


class PositionEmbedding2D(eqx.Module):
    """A learned vector for every cell of a grid, resampled where the input has another grid."""

    weight: Float[Array, "h w d"]
    method: ResizeMethod = eqx.field(static=True)
    antialias: bool = eqx.field(static=True)

    def __init__(
        self,
        grid: tuple[int, int],
        width: int,
        *,
        std: float = 0.02,
        method: ResizeMethod = "linear",
        antialias: bool = False,
        key: PRNGKeyArray,
    ):
        self.weight = normal(key, (*grid, width), std)
        self.method = method
        self.antialias = antialias

    def __call__(self, grid: tuple[int, int]) -> Float[Array, "h w d"]:
        return resample_grid(self.weight, grid, method=self.method, antialias=self.antialias)


class PositionEmbedding1D(eqx.Module):
    """A learned vector for each of ``length`` positions; shorter sequences use the first ones."""

    weight: Float[Array, "n d"]

    def __init__(self, length: int, width: int, *, std: float = 0.02, key: PRNGKeyArray):
        self.weight = normal(key, (length, width), std)

    def __call__(self, length: int) -> Float[Array, "n d"]:
        if length > self.weight.shape[0]:
            raise ValueError(f"sequence of {length} is longer than the {self.weight.shape[0]} learned positions")
        return self.weight[:length]


def resample_grid(
    table: Float[Array, "h w d"], grid: tuple[int, int], *, method: ResizeMethod = "linear", antialias: bool = False
) -> Float[Array, "h2 w2 d"]:
    """The table on another grid; unchanged where the grid is the same."""
    if table.shape[:2] == grid:
        return table
    return resize_images(table[None], grid, method=method, antialias=antialias)[0]


def sincos_1d(
    positions: Num[np.ndarray, " n"], width: int, *, temperature: float = 10_000.0, endpoint: bool = False
) -> Float[np.ndarray, "n d"]:
    """Vaswani et al. 2017, all sines first and then all cosines, as in MAE and Scenic; ``width`` must be even.

    The frequencies fall from 1 to just above 1 / ``temperature``, and with ``endpoint`` to this itself: big_vision's.
    """
    if width % 2:
        raise ValueError(f"sin-cos embedding needs an even width, got {width}")
    if endpoint and width < 4:
        raise ValueError(f"sin-cos embedding with endpoint=True needs a width of 4 or more per axis, got {width}")
    frequencies = temperature ** -(np.arange(width // 2, dtype=np.float64) / (width // 2 - endpoint))
    angles = np.asarray(positions, np.float64)[:, None] * frequencies[None]
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def sincos_2d(
    grid: tuple[int, int], width: int, *, temperature: float = 10_000.0, endpoint: bool = False
) -> Float[np.ndarray, "h w d"]:
    """MAE's table (He et al. 2021): the first half of the channels encodes the column, the second the row."""
    return _sincos_grid((grid[1], grid[0]), (1, 0), grid, width, temperature, endpoint)


def sincos_3d(grid: tuple[int, int, int], width: int, *, temperature: float = 10_000.0) -> Float[np.ndarray, "t h w d"]:
    """One third of the channels for each of time, row and column, in this order."""
    return _sincos_grid(grid, (0, 1, 2), grid, width, temperature, endpoint=False)


def _sincos_grid(
    lengths: tuple[int, ...],
    axes: tuple[int, ...],
    grid: tuple[int, ...],
    width: int,
    temperature: float,
    endpoint: bool,
):
    if width % (2 * len(grid)):
        raise ValueError(f"a {len(grid)}-D sin-cos embedding needs a width divisible by {2 * len(grid)}, got {width}")
    parts = []
    for length, axis in zip(lengths, axes, strict=True):
        table = sincos_1d(np.arange(length), width // len(grid), temperature=temperature, endpoint=endpoint)
        shape = [1] * len(grid) + [width // len(grid)]
        shape[axis] = length
        parts.append(np.broadcast_to(table.reshape(shape), (*grid, width // len(grid))))
    return np.concatenate(parts, axis=-1)


class SinCos2D(eqx.Module):
    """A fixed two-dimensional sin-cos table, computed for whatever grid is asked for; nothing is trained."""

    width: int = eqx.field(static=True)
    temperature: float = eqx.field(static=True)
    endpoint: bool = eqx.field(static=True)

    def __init__(self, width: int, *, temperature: float = 10_000.0, endpoint: bool = False):
        self.width = width
        self.temperature = temperature
        self.endpoint = endpoint

    def __call__(self, grid: tuple[int, int]) -> Float[Array, "h w d"]:
        return jnp.asarray(sincos_2d(grid, self.width, temperature=self.temperature, endpoint=self.endpoint))
