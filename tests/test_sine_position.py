"""The cells that are image, and their sine code: in closed form, by hand, and against torch and transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvision.layers import sine_position, size_mask

sine = jax.jit(sine_position, static_argnames=("width", "offset"))
masked = jax.jit(size_mask, static_argnums=(1, 2))


def masks(height=6, width=8):
    """Whole, padded on the right, at the bottom, and on both sides."""
    size = jnp.asarray([[height, width], [height, 3], [2, width], [height - 1, 1]])
    return masked(size, (height, width), (height, width))


def closed_form(length, width, offset):
    """Cells 1 ... length of a whole axis, in float64."""
    coordinate = (np.arange(1, length + 1) + offset) / (length + 1e-6) * 2 * np.pi
    frequency = 10_000.0 ** (-2 * (np.arange(width) // 2) / width)
    angles = coordinate[:, None] * frequency
    return np.where(np.arange(width) % 2 == 0, np.sin(angles), np.cos(angles))


class TestSizeMask:
    def test_by_hand(self):
        """Cells of a /32 map start at pixels 0, 32, 64: image of 33 pixels reaches into the second."""
        mask = masked(jnp.asarray([[33, 64], [32, 65], [96, 1]]), (96, 96), (3, 3))
        assert mask.sum(axis=1).max(axis=1).tolist() == [2, 1, 3]
        assert mask.sum(axis=2).max(axis=1).tolist() == [2, 3, 1]

    def test_is_a_rectangle_at_the_top_left(self):
        mask = masked(jnp.asarray([[40, 70]]), (96, 128), (6, 8))[0]
        expected = np.outer(np.arange(6) * 16 < 40, np.arange(8) * 16 < 70)
        np.testing.assert_array_equal(mask, expected)

    @pytest.mark.parity
    @pytest.mark.parametrize(("padded", "cells"), [(96, 3), (800, 25), (1333, 42), (1333, 167), (608, 10), (100, 7)])
    def test_every_size_as_torch(self, padded, cells):
        """``interpolate(mask, mode="nearest")`` for every height; centres would differ for half of them."""
        import torch

        sizes = np.arange(1, padded + 1)
        rows = torch.tensor(np.arange(padded) < sizes[:, None])[:, None, :, None].float()
        expected = torch.nn.functional.interpolate(rows, (cells, 1), mode="nearest")[:, 0, :, 0].bool().numpy()
        size = jnp.asarray(np.stack([sizes, np.ones_like(sizes)], axis=1))
        np.testing.assert_array_equal(masked(size, (padded, 1), (cells, 1))[:, :, 0], expected)


class TestSinePosition:
    @pytest.mark.parametrize("offset", [0.0, -0.5])
    def test_whole_images_have_a_closed_form(self, assert_close, offset):
        code = sine(jnp.ones((1, 5, 7), bool), 16, offset=offset)[0]
        assert code.dtype == jnp.float32
        assert_close(code[:, :, :8], np.broadcast_to(closed_form(5, 8, offset)[:, None], (5, 7, 8)), 2e-6)
        assert_close(code[:, :, 8:], np.broadcast_to(closed_form(7, 8, offset)[None], (5, 7, 8)), 2e-6)

    @pytest.mark.parametrize("offset", [0.0, -0.5])
    def test_padding_changes_nothing_inside(self, assert_close, offset):
        mask = masks()
        code = np.asarray(sine(mask, 8, offset=offset))
        for image, (height, width) in enumerate([(6, 8), (6, 3), (2, 8), (5, 1)]):
            expected = np.zeros((height, width, 8))
            expected[..., :4] += closed_form(height, 4, offset)[:, None]
            expected[..., 4:] += closed_form(width, 4, offset)
            assert_close(code[image, :height, :width], expected, 2e-6)
        assert np.all(np.abs(code) <= 1)

    def test_an_empty_image_is_finite(self):
        """Rows that only pad a batch may have size 0."""
        code = sine(jnp.zeros((1, 3, 3), bool), 8, offset=-0.5)
        np.testing.assert_array_equal(code, np.broadcast_to([0.0, 1.0] * 4, (1, 3, 3, 8)))

    def test_widths_that_do_not_fit(self):
        with pytest.raises(ValueError, match=r"width must be divisible by 4 .* got 6"):
            sine_position(jnp.ones((1, 2, 2), bool), 6)

    @pytest.mark.parity
    @pytest.mark.parametrize("offset", [0.0, -0.5])
    def test_as_transformers(self, assert_close, offset):
        """Padded cells too, but for columns and rows without image, where Deformable DETR's code is noise."""
        import torch
        from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrSinePositionEmbedding
        from transformers.models.detr.modeling_detr import DetrSinePositionEmbedding

        build = DeformableDetrSinePositionEmbedding if offset else DetrSinePositionEmbedding
        mask = np.asarray(masks(25, 42))
        theirs = build(num_position_features=32, normalize=True)(
            shape=torch.Size((4, 1, 25, 42)), device="cpu", dtype=torch.float32, mask=torch.tensor(mask)
        )
        ours = np.asarray(sine(mask, 64, offset=offset))
        compared = np.ones_like(mask) if offset == 0 else mask.any(axis=1)[:, None] & mask.any(axis=2)[:, :, None]
        expected = theirs.permute(0, 2, 3, 1).numpy()
        assert_close(np.where(compared[..., None], ours, 0), np.where(compared[..., None], expected, 0), 1e-5)
