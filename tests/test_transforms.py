"""Host transforms against Pillow and against what their papers say."""

import io
import pickle

import jax
import numpy as np
import pytest
from images import noise
from PIL import Image

from eqvision.data import (
    HALF_MEAN,
    HALF_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    INTERPOLATIONS,
    TRAIN_TRANSFORMS,
    center_crop,
    encoded_train_transform,
    eval_transform,
    normalize,
    pad_and_crop,
    random_flip,
    random_resized_crop,
    resize,
    resize_and_center_crop,
    train_transform,
)

# Transforms


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_resize_is_pillows(interpolation, channels):
    image = noise((31, 47, channels))
    expected = Image.fromarray(image.squeeze()).resize((20, 13), Image.Resampling[interpolation.upper()])
    resized = resize(image, (13, 20), interpolation)
    np.testing.assert_array_equal(resized, np.asarray(expected).reshape(13, 20, channels))


def test_resize_other_channel_counts_one_by_one():
    image = noise((9, 9, 4))
    resized = resize(image, (5, 7))
    for c in range(4):
        np.testing.assert_array_equal(resized[..., c : c + 1], resize(image[..., c : c + 1], (5, 7)))


def test_resize_shorter_side_and_center_crop():
    assert resize(noise((31, 47, 3)), 20).shape == (20, 30, 3)  # 30.3 is floored
    assert resize(noise((47, 31, 3)), 20).shape == (30, 20, 3)
    image = noise((20, 20, 3))
    assert resize(image, 20) is image
    np.testing.assert_array_equal(center_crop(noise((10, 13, 3)), 6), noise((10, 13, 3))[2:8, 4:10])
    wide = noise((60, 90, 3))
    expected = np.asarray(Image.fromarray(wide).resize((384, 256), Image.Resampling.BICUBIC))[16:240, 80:304]
    np.testing.assert_array_equal(resize_and_center_crop(wide, 224), expected)


def test_transform_errors():
    image = noise((8, 8, 3))
    with pytest.raises(ValueError, match="unknown interpolation 'bicubc'; did you mean 'bicubic'"):
        resize(image, 4, "bicubc")
    with pytest.raises(ValueError, match="cannot crop 9x9 from an image of 8x8; resize it first"):
        center_crop(image, 9)
    with pytest.raises(ValueError, match="cannot resize an image of 8x8 to 0x4"):
        resize(image, (0, 4))
    with pytest.raises(ValueError, match=r"crop_fraction=1.5; expected 0 < crop_fraction <= 1"):
        resize_and_center_crop(image, 4, 1.5)
    with pytest.raises(ValueError, match="unknown transform 'imagenat'; did you mean 'imagenet'"):
        train_transform("imagenat", 8)
    with pytest.raises(ValueError, match="unknown interpolation 'cubic'"):
        eval_transform("cifar", 8, "cubic")


@pytest.mark.parametrize("shape", [(40, 60, 3), (7, 300, 3), (300, 7, 1), (1, 1, 3)])
def test_random_resized_crop_any_shape(shape, rng):
    for _ in range(20):
        assert random_resized_crop(noise(shape), rng, 16).shape == (16, 16, shape[-1])


def test_random_resized_crop_regions(rng):
    from eqvision.data.transforms import random_region

    regions = np.array([random_region((100, 120), rng, (0.1, 0.5), (3 / 4, 4 / 3)) for _ in range(3000)])
    top, left, height, width = regions.T
    assert (regions[:, :2] >= 0).all()
    assert (top + height).max() <= 100
    assert (left + width).max() <= 120
    area, aspect = height * width / 12000, width / height
    assert 0.095 < area.min() < 0.12
    assert 0.48 < area.max() < 0.505
    assert abs(area.mean() - 0.3) < 0.01
    assert 0.73 < aspect.min() < 0.77
    assert 1.30 < aspect.max() < 1.37
    assert abs(np.log(aspect).mean()) < 0.02
    assert (top == 0).any()
    assert (top + height == 100).any()
    # Nothing of ratio 3/4..4/3 and 90 % of the area fits: the middle region of the nearest ratio.
    assert random_region((30, 90), rng, (0.9, 1.0), (3 / 4, 4 / 3)) == (0, 25, 30, 40)


def test_full_crop_is_a_resize(rng):
    image = noise((32, 32, 3))
    crop = random_resized_crop(image, rng, 16, scale=(1.0, 1.0), ratio=(1.0, 1.0), interpolation="bilinear")
    np.testing.assert_array_equal(crop, resize(image, (16, 16), "bilinear"))


def test_flip_and_shift(rng):
    image = noise((6, 7, 3))
    flips = [random_flip(image, rng) for _ in range(200)]
    mirrored = [np.array_equal(f, image[:, ::-1]) for f in flips]
    assert all(m or np.array_equal(f, image) for m, f in zip(mirrored, flips, strict=True))
    assert 70 < sum(mirrored) < 130
    for mode, numpy_mode in (("zero", "constant"), ("reflect", "reflect")):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode=numpy_mode)
        windows = {padded[i : i + 6, j : j + 7].tobytes() for i in range(5) for j in range(5)}
        assert {pad_and_crop(image, rng, 2, mode).tobytes() for _ in range(400)} == windows
    with pytest.raises(ValueError, match="unknown padding mode 'wrap'; expected 'zero' or 'reflect'"):
        pad_and_crop(image, rng, 2, "wrap")


@pytest.mark.parametrize("kind", TRAIN_TRANSFORMS)
def test_recipes_give_the_size_for_any_image_and_can_be_pickled(kind, rng):
    train = pickle.loads(pickle.dumps(train_transform(kind, 16)))
    evaluate = pickle.loads(pickle.dumps(eval_transform(kind, 16)))
    for shape in ((16, 16, 1), (20, 31, 3), (8, 8, 1)):
        assert train(noise(shape), rng).shape == evaluate(noise(shape)).shape == (16, 16, shape[-1])
    same = noise((16, 16, 3))
    if kind != "imagenet":
        np.testing.assert_array_equal(evaluate(same), same)


def test_digits_recipe_shifts_by_one_and_never_flips(rng):
    image = noise((8, 8, 1))
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    windows = {padded[i : i + 8, j : j + 8].tobytes() for i in range(3) for j in range(3)}
    assert {train_transform("digits", 8)(image, rng).tobytes() for _ in range(200)} == windows


@pytest.mark.parametrize(("mean", "std"), [(IMAGENET_MEAN, IMAGENET_STD), (HALF_MEAN, HALF_STD), ((0.3,), (0.7,))])
def test_normalize(mean, std):
    images = noise((2, 5, 6, 3))
    expected = (images.astype(np.float64) / 255 - np.array(mean)) / np.array(std)
    for result in (normalize(images, mean, std), normalize(jax.numpy.asarray(images), mean, std)):
        assert result.dtype == np.float32
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6)
    assert isinstance(normalize(images, mean, std), np.ndarray)
    assert isinstance(jax.jit(lambda x: normalize(x, mean, std))(images), jax.Array)
    assert normalize(images[0], mean, std).shape == (5, 6, 3)


def test_normalize_does_not_broadcast_grey_to_colour():
    with pytest.raises(ValueError, match="mean has 3 values but the images have 1 channels"):
        normalize(noise((2, 4, 4, 1)), IMAGENET_MEAN, IMAGENET_STD)


@pytest.mark.parametrize("decoder", ["pixels", "pillow"])
def test_crops_have_the_share_of_the_area_that_is_asked_for(decoder, rng):
    """A white frame of 4 pixels around black: the smaller the crop, the less of it is seen."""
    image = np.full((64, 64, 3), 255, np.uint8)
    image[4:60, 4:60] = 0
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")

    def white(*scale):
        if decoder == "pixels":
            crops = [train_transform("imagenet", 16, crop_scale=scale)(image, rng) for _ in range(40)]
        else:
            read = encoded_train_transform("imagenet", 16, crop_scale=scale).from_encoded
            crops = [read(file.getvalue(), "x", rng) for _ in range(40)]
        return np.mean(crops)

    assert white(0.05, 0.1) < white(0.3, 0.4) < white(0.9, 1.0)


@pytest.mark.parametrize("scale", [(0.0, 1.0), (0.5, 0.2), (0.5, 1.5)])
def test_shares_that_are_none_are_refused(scale):
    with pytest.raises(ValueError, match=rf"data\.crop_scale {scale[0]:g} {scale[1]:g}: expected .* such as 0\.2 1"):
        train_transform("imagenet", 16, crop_scale=scale)
