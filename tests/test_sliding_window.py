"""Windows cover every pixel and are averaged; one compilation; logits come back to the file without its padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvision.ops import multi_scale, restored_logits, sliding_window, sliding_window_on_host, window_starts


def local(images):
    """A map that needs only its own pixel: any windows give the same."""
    return jnp.stack([images[..., 0] * 2 + 1, images.sum(axis=-1)], axis=-1)


def whole(images):
    """A map that depends on all that the network sees."""
    return local(images) + images.mean(axis=(1, 2, 3), keepdims=True)


def drawn(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def numpy_windows(predict, images, window, stride):
    """Window by window, in plain loops."""
    b, height, width, _ = images.shape
    total, times = np.zeros((b, height, width, 2)), np.zeros((height, width, 1))
    for top in window_starts(height, window[0], stride[0]):
        for left in window_starts(width, window[1], stride[1]):
            place = slice(top, top + window[0]), slice(left, left + window[1])
            total[:, *place] += predict(images[:, *place])
            times[place] += 1
    return total / times


@pytest.mark.parametrize(
    ("length", "window", "stride", "starts"),
    [(10, 4, 3, (0, 3, 6)), (11, 4, 3, (0, 3, 6, 7)), (4, 4, 2, (0,)), (3, 4, 4, (0,)), (8, 4, 4, (0, 4))],
)
def test_windows_reach_to_the_end_and_not_beyond(length, window, stride, starts):
    assert window_starts(length, window, stride) == starts


def test_a_stride_that_leaves_pixels_out_is_refused():
    with pytest.raises(ValueError, match="stride=5 for windows of 4 pixels; expected 1 to 4"):
        window_starts(10, 4, 5)


def test_overlapping_windows_are_averaged_with_one_compilation():
    images, traced = drawn(2, 11, 9, 3), []

    def counted(x):
        traced.append(x.shape)
        return whole(x)

    run = jax.jit(functools.partial(sliding_window, counted, window=(6, 5), stride=(4, 3)))
    found = run(images)
    expected = numpy_windows(whole, images, (6, 5), (4, 3))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert set(traced) == {(2, 6, 5, 3)}
    assert len(traced) <= 3  # the shapes, the scan and its body; not the nine windows
    for image, row in zip(images, expected, strict=True):
        host = sliding_window_on_host(lambda x: np.asarray(whole(x)), image, window=(6, 5), stride=(4, 3))
        np.testing.assert_allclose(host, row, atol=1e-5)


def test_the_host_compiles_once_for_images_of_any_size():
    traced = []

    @jax.jit
    def predict(x):
        traced.append(x.shape)
        return local(x)

    for size in ((5, 9), (12, 7), (3, 3)):  # the last one is smaller than a window
        image = drawn(*size, 3)
        found = sliding_window_on_host(predict, image, window=(4, 4), stride=(3, 3), windows_at_once=5)
        np.testing.assert_allclose(found, local(image), atol=1e-6)
    assert traced == [(5, 4, 4, 3)]
    with pytest.raises(ValueError, match="windows_at_once=0; expected 1 or more"):
        sliding_window_on_host(predict, image, window=(4, 4), stride=(3, 3), windows_at_once=0)


def test_a_window_as_large_as_the_image_is_the_plain_forward_pass():
    images = jnp.array(drawn(2, 6, 7, 3))
    np.testing.assert_array_equal(sliding_window(whole, images, window=(6, 7), stride=(3, 3)), whole(images))


@pytest.mark.slow
def test_small_images_are_padded_and_cut_again():
    images = drawn(1, 3, 9, 3)
    found = sliding_window(local, jnp.array(images), window=(4, 4), stride=(2, 2))
    np.testing.assert_allclose(found, local(images), atol=1e-6)


def test_one_scale_without_mirror_is_the_softmax():
    images = jnp.array(drawn(1, 8, 8, 3))
    found = multi_scale(whole, images, scales=(1.0,), flip=False, multiple=4)
    np.testing.assert_allclose(found, jax.nn.softmax(whole(images), axis=-1), atol=1e-6)
    with pytest.raises(ValueError, match=r"scales=\(1.0, 0\); expected factors of the image"):
        multi_scale(whole, images, scales=(1.0, 0))


@pytest.mark.slow
def test_scales_and_mirrored_images_are_averaged():
    images, seen = jnp.array(drawn(1, 8, 12, 3)), []

    def slanted(x):
        seen.append(x.shape[1:3])
        return local(x) * jnp.linspace(0, 1, x.shape[2])[:, None]

    found = multi_scale(slanted, images, scales=(1.0, 1.6, 0.1), multiple=4)
    assert seen == [(8, 12), (8, 12), (12, 20), (12, 20), (4, 4), (4, 4)]
    np.testing.assert_allclose(found.sum(axis=-1), 1, atol=1e-6)
    alone = multi_scale(slanted, images, scales=(1.0,), multiple=4)
    mirrored = multi_scale(slanted, images[:, :, ::-1], scales=(1.0,), multiple=4)
    np.testing.assert_allclose(alone, mirrored[:, :, ::-1], atol=1e-6)


def test_logits_come_back_without_their_padding():
    logits = drawn(8, 8, 3)
    spoilt = logits.copy()
    spoilt[5:], spoilt[:, 6:] = np.nan, np.nan  # padding
    restored = restored_logits(spoilt, (5, 6), (10, 9))
    assert (restored.shape, restored.dtype) == ((10, 9, 3), np.float32)
    assert np.isfinite(restored).all()
    np.testing.assert_array_equal(restored_logits(logits, (5, 6), (5, 6)), logits[:5, :6])


@pytest.mark.parity
def test_restored_logits_equal_torch():
    import torch

    logits = drawn(5, 6, 3)
    for size in ((10, 9), (4, 13)):
        theirs = torch.nn.functional.interpolate(
            torch.tensor(logits).movedim(-1, 0)[None], size=size, mode="bilinear", align_corners=False
        )
        np.testing.assert_allclose(restored_logits(logits, (5, 6), size), theirs[0].movedim(0, -1).numpy(), atol=1e-6)
