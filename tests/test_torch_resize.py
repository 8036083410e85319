"""Resizing as torch does it: by hand, and against ``torch.nn.functional.interpolate``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvision.ops import resize_bicubic, resize_bilinear, resize_nearest
from eqvision.ops.torch_resize import cubic_taps, linear_taps, nearest_index

# up, down, one axis each way, odd, whole factors, from and to a single cell, unchanged
SIZES = [
    ((5, 7), (11, 16)),
    ((13, 9), (4, 5)),
    ((6, 10), (9, 3)),
    ((4, 5), (8, 15)),
    ((12, 8), (3, 2)),
    ((1, 3), (4, 1)),
    ((7, 6), (7, 6)),
]


def weights_of(taps, old):
    """A matrix (new, old) of the shares."""
    matrix = np.zeros((taps[0].shape[1], old))
    for cells, shares in zip(*taps, strict=True):
        matrix[np.arange(len(cells)), cells] += shares
    return matrix


def on_axis(values, new, resize, **options):
    return resize(jnp.asarray(values, jnp.float32)[None, :, None, None], (new, 1), **options).ravel()


class TestByHand:
    def test_nearest_reads_the_first_cell(self):
        assert nearest_index(6, 3).tolist() == [0, 2, 4]
        assert nearest_index(3, 7).tolist() == [0, 0, 0, 1, 1, 2, 2]
        assert nearest_index(1, 3).tolist() == [0, 0, 0]

    def test_nearest_takes_masks(self):
        mask = jnp.asarray([[True, False, True, False, False, True]])[:, :, None, None]
        small = resize_nearest(mask, (3, 1))
        assert small.dtype == bool
        assert small.ravel().tolist() == [True, True, False]
        assert resize_nearest(mask, (12, 2))[0, :, 1, 0].tolist() == np.repeat(mask.ravel(), 2).tolist()

    def test_bilinear(self):
        np.testing.assert_allclose(on_axis([0, 4], 4, resize_bilinear), [0, 1, 3, 4])
        np.testing.assert_allclose(on_axis([0, 4], 5, resize_bilinear, align_corners=True), [0, 1, 2, 3, 4])
        # no antialias: the middle of four cells reads the two beside it
        np.testing.assert_allclose(on_axis([9, 0, 1, 9, 9, 3, 4, 9], 2, resize_bilinear), [0.5, 3.5])
        np.testing.assert_allclose(on_axis([3, 5], 1, resize_bilinear, align_corners=True), [3])

    def test_bicubic_has_its_own_kernel(self):
        """Halfway between two cells Keys' kernel gives (a, 4 - a, 4 - a, a) / 8, with a = -0.75."""
        np.testing.assert_allclose(on_axis([8, 0, 0, 0], 2, resize_bicubic)[0], 8 * 0.59375 - 0.75, rtol=1e-6)
        np.testing.assert_allclose(on_axis([0, 0, 8, 0], 2, resize_bicubic)[0], -0.75, rtol=1e-6)

    @pytest.mark.parametrize(("old", "new"), [(5, 11), (11, 5), (7, 7), (1, 4), (4, 1)])
    def test_shares_sum_to_one(self, old, new):
        for taps in (linear_taps(old, new), linear_taps(old, new, align_corners=True), cubic_taps(old, new)):
            np.testing.assert_allclose(weights_of(taps, old).sum(axis=1), 1, rtol=1e-6)

    def test_types(self):
        x = jnp.ones((1, 2, 2, 1), jnp.bfloat16)
        assert resize_bilinear(x, (3, 3)).dtype == jnp.bfloat16
        assert resize_nearest(x.astype(jnp.uint8), (3, 3)).dtype == jnp.uint8

    @pytest.mark.parametrize("resize", [resize_nearest, resize_bilinear, resize_bicubic])
    def test_no_empty_maps(self, resize):
        with pytest.raises(ValueError, match=rf"{resize.__name__}: size must be \(height, width\) .* got \(0, 3\)"):
            resize(jnp.ones((1, 2, 2, 1)), (0, 3))


@pytest.mark.parity
class TestAgainstTorch:
    @pytest.mark.parametrize(("old", "new"), [*SIZES, ((100, 167), (250, 41))])
    def test_values_and_gradients(self, rng, assert_close, old, new):
        import torch

        x = rng.normal(size=(2, *old, 3)).astype(np.float32)
        for mode, resize, options in (
            ("nearest", resize_nearest, {}),
            ("bilinear", resize_bilinear, {"align_corners": False}),
            ("bilinear", resize_bilinear, {"align_corners": True}),
            ("bicubic", resize_bicubic, {}),
        ):
            theirs = torch.tensor(x).permute(0, 3, 1, 2).requires_grad_()
            result = torch.nn.functional.interpolate(theirs, new, mode=mode, **options)
            (expected,) = torch.autograd.grad(result.sin().sum(), theirs)

            def total(x, resize=resize, options=options):
                y = resize(x, new, **options)
                return jnp.sum(jnp.sin(y)), y

            gradient, got = jax.jit(jax.grad(total, has_aux=True))(jnp.asarray(x))
            assert_close(got, result.detach().permute(0, 2, 3, 1).numpy(), 1e-5)
            assert_close(gradient, expected.permute(0, 2, 3, 1).numpy(), 1e-5)

    def test_taps_of_many_sizes(self, rng, assert_close):
        """Where positions are large their rounding in float32 counts."""
        import torch

        for old, new in rng.integers(1, 1400, size=(60, 2)):
            x = rng.normal(size=(1, 1, old, 1)).astype(np.float32)
            cases = {
                "bilinear": weights_of(linear_taps(int(old), int(new)), old),
                "bicubic": weights_of(cubic_taps(int(old), int(new)), old),
            }
            for mode, matrix in cases.items():
                expected = torch.nn.functional.interpolate(torch.tensor(x), (int(new), 1), mode=mode)
                assert_close(matrix @ x.ravel(), expected.ravel().numpy(), 1e-5)

    def test_every_nearest_index(self):
        """All pairs up to 70, where floor(i * old / new) in whole numbers would differ from torch's float32."""
        import torch

        for old in range(1, 70):
            row = torch.arange(old, dtype=torch.float32)[None, None, :, None]
            for new in (*range(1, 70), 100, 1333):
                expected = torch.nn.functional.interpolate(row, (new, 1), mode="nearest").ravel().int().tolist()
                assert nearest_index(old, new).tolist() == expected, (old, new)
