"""Position tables: equal to their formulas, resampled as PyTorch does."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from arrays import draw, from_torch, to_torch

from eqvision.layers import (
    PositionEmbedding1D,
    PositionEmbedding2D,
    SinCos2D,
    resample_grid,
    sincos_1d,
    sincos_2d,
    sincos_3d,
)

# --- positions ------------------------------------------------------------------------------------------------------


def plain_sincos(position, width, temperature):
    """One position: sines of position / temperature^(2 i / width) for every i, then the cosines."""
    angles = [position / temperature ** (2 * number / width) for number in range(width // 2)]
    return [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]


@pytest.mark.parametrize("temperature", [10_000.0, 100.0])
def test_sincos_tables_equal_the_formula(temperature):
    """In two dimensions the column comes first, as in MAE; in three time, row, column."""
    one = [plain_sincos(position, 12, temperature) for position in (0.0, 1.0, 2.5, 60.0)]
    table = sincos_1d(np.array([0.0, 1.0, 2.5, 60.0]), 12, temperature=temperature)
    np.testing.assert_allclose(table, one, atol=1e-6)

    def part(position):
        return plain_sincos(position, 4, temperature)

    two = [[part(column) + part(row) for column in range(5)] for row in range(3)]
    np.testing.assert_allclose(sincos_2d((3, 5), 8, temperature=temperature), two, atol=1e-6)
    three = [[[part(t) + part(row) + part(column) for column in range(5)] for row in range(3)] for t in range(2)]
    np.testing.assert_allclose(sincos_3d((2, 3, 5), 12, temperature=temperature), three, atol=1e-6)
    np.testing.assert_allclose(SinCos2D(8, temperature=temperature)((3, 5)), two, atol=1e-6)


def test_sincos_width_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="needs an even width, got 7"):
        sincos_1d(np.arange(3.0), 7)
    with pytest.raises(ValueError, match="2-D sin-cos embedding needs a width divisible by 4, got 6"):
        sincos_2d((2, 2), 6)
    with pytest.raises(ValueError, match="3-D sin-cos embedding needs a width divisible by 6, got 16"):
        sincos_3d((2, 2, 2), 16)


def test_resampling_to_the_same_grid_is_the_identity(key):
    layer = PositionEmbedding2D((4, 6), 3, key=key)
    np.testing.assert_array_equal(layer((4, 6)), layer.weight)


@pytest.mark.parametrize("method", ["nearest", "linear", "cubic", "lanczos3"])
@pytest.mark.parametrize("grid", [(6, 4), (8, 12), (2, 3), (5, 7)])
def test_resampling_has_the_asked_shape_and_keeps_a_constant(assert_close, key, grid, method):
    layer = PositionEmbedding2D((4, 6), 3, method=method, key=key)
    assert layer(grid).shape == (*grid, 3)
    constant = jnp.broadcast_to(jnp.array([1.0, -2.0, 0.5]), (4, 6, 3))
    assert_close(resample_grid(constant, grid, method=method), jnp.broadcast_to(constant[0, 0], (*grid, 3)), 1e-6)


@pytest.mark.parity
@pytest.mark.parametrize("grid", [(8, 12), (7, 9), (3, 2)])
@pytest.mark.parametrize(("method", "mode", "antialias"), [("linear", "bilinear", False), ("cubic", "bicubic", True)])
def test_resampling_equals_torch(assert_close, grid, method, mode, antialias):
    """torch's antialiased bicubic has a = -0.5, as ours; the one without antialiasing has -0.75."""
    import torch

    table = draw(4, 6, 3)
    resized = torch.nn.functional.interpolate(to_torch(table[None]), grid, mode=mode, antialias=antialias)
    ours = resample_grid(jnp.asarray(table), grid, method=method, antialias=antialias)
    assert_close(ours, from_torch(resized)[0], 1e-5)


def test_shorter_sequences_use_the_first_positions_and_longer_ones_are_refused(key):
    layer = PositionEmbedding1D(6, 4, key=key)
    np.testing.assert_array_equal(layer(4), layer.weight[:4])
    with pytest.raises(ValueError, match="sequence of 7 is longer than the 6 learned positions"):
        layer(7)
