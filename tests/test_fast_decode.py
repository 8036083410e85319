"""Transforms from encoded images: with Pillow the same pixels as on arrays, with simplejpeg and OpenCV nearly."""

import builtins
import io

import numpy as np
import pytest
from images import assert_same, noise, numbered, take, truncate, write_folder
from PIL import Image, ImageFilter

from eqvision.data import (
    CorruptImageError,
    EncodedTransform,
    ImageFolder,
    decode_bytes,
    encoded_train_transform,
    fast_decode,
    train_stream,
    train_transform,
)
from eqvision.data.fast_decode import _UPRIGHT, _read_header, fast_libraries
from eqvision.recipes import AugmentConfig

pytest.importorskip("cv2", reason="extra [fast]")
simplejpeg = pytest.importorskip("simplejpeg", reason="extra [fast]")


def photo(height=150, width=200, cell=20):
    """Smooth colours with edges, on which the filters' differences are those of photographs."""
    image = Image.fromarray(noise((height // cell, width // cell, 3))).resize((width, height), Image.BICUBIC)
    image.paste((250, 20, 30), (width // 4, height // 5, width // 2, height // 2))
    return image.filter(ImageFilter.GaussianBlur(0.7))


def encode(image, suffix="JPEG", **options):
    stream = io.BytesIO()
    image.save(stream, suffix, **({"quality": 92} if suffix == "JPEG" else {}) | options)
    return stream.getvalue()


def with_orientation(image, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, exif=exif)


def crop_both(data, size=32, seed=0, in_channels=3, **options):
    transform = encoded_train_transform("imagenet", size, in_channels=in_channels, decoder="fast", **options)
    ours = transform.from_encoded(data, "x.jpg", np.random.default_rng(seed))
    pixels = decode_bytes(data, in_channels, name="x.jpg")
    theirs = train_transform("imagenet", size, **options)(pixels, np.random.default_rng(seed))
    assert ours.dtype == np.uint8
    assert ours.shape == theirs.shape
    return ours.astype(float), theirs.astype(float)


# Decoding


@pytest.mark.parametrize("orientation", [0, *range(1, 9), 99])
@pytest.mark.parametrize("in_channels", [1, 3])
def test_pixels_and_orientation(orientation, in_channels):
    data = with_orientation(photo(), orientation)
    ours, theirs = fast_decode(data, in_channels, name="x"), decode_bytes(data, in_channels, name="x")
    if in_channels == 3:
        np.testing.assert_array_equal(ours, theirs)
    assert ours.shape == theirs.shape
    assert np.abs(ours.astype(int) - theirs).max() <= 12  # grey is the file's luma, Pillow computes it from RGB
    assert _read_header(data).shape == theirs.shape[:2]
    assert set(_UPRIGHT) == set(range(2, 9))


GREY = photo().convert("L")
OTHERS = {
    "grey.jpg": encode(GREY),
    "cmyk.jpg": encode(photo().convert("CMYK")),
    "progressive.jpg": encode(photo(), progressive=True),
    "444.jpg": encode(photo(), subsampling=0),
    "rgba.png": encode(photo().convert("RGBA"), "PNG"),
    "16bit.png": encode(Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257), "PNG"),
    "palette.gif": encode(photo().convert("P"), "GIF"),
    "webp": encode(photo(), "WEBP"),
    "trailing.jpg": encode(photo()) + b"junk",
    "garbled.jpg": encode(photo()).replace(b"\xff\xda", b"\xff\xda", 1)[:-2] + b"\x00\xff\xd9",
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("in_channels", [1, 3])
def test_every_kind_of_file(name, in_channels):
    ours = fast_decode(OTHERS[name], in_channels, name=name).astype(int)
    theirs = decode_bytes(OTHERS[name], in_channels, name=name)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= (12 if in_channels == 1 else 0)


@pytest.mark.parametrize(
    "data",
    [b"", b"text", encode(photo())[:-300], encode(photo())[:200], b"\xff\xd8\xff", encode(photo(), "PNG")[:500]],
    ids=["empty", "text", "truncated", "header only", "three bytes", "png"],
)
@pytest.mark.parametrize("decoder", ["pillow", "fast"])
def test_corrupt_images_raise_the_same(data, decoder):
    with pytest.raises(CorruptImageError) as expected:
        decode_bytes(data, name="/a/x.jpg")
    for transform in (
        encoded_train_transform("imagenet", 8, decoder=decoder),
        encoded_train_transform("none", 8, decoder="fast"),
    ):
        with pytest.raises(CorruptImageError, match=r"^corrupt image /a/x\.jpg: ") as error:
            transform.from_encoded(data, "/a/x.jpg", np.random.default_rng(0))
        assert str(error.value) == str(expected.value)


def test_huge_sizes_are_left_to_pillow(monkeypatch):
    data = encode(photo())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150 * 200 // 3)
    assert _read_header(data) is None
    with pytest.raises(CorruptImageError, match="decompression bomb"):
        fast_decode(data, name="x")


# Crops


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest", "lanczos", "box"])
def test_pillow_crops_are_those_of_arrays(in_channels, interpolation):
    transform = encoded_train_transform("imagenet", 24, interpolation, in_channels=in_channels)
    for seed, data in enumerate([encode(photo()), with_orientation(photo(), 6), *OTHERS.values()] * 3):
        pixels = decode_bytes(data, in_channels, name="x")
        expected = transform.on_pixels(pixels, np.random.default_rng(seed))
        np.testing.assert_array_equal(transform.from_encoded(data, "x", np.random.default_rng(seed)), expected)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos", "box", "nearest"])
@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("size", [24, 64, 150])
def test_fast_crops_are_close_to_pillows(interpolation, in_channels, size):
    """The same regions and flips: shifted or mirrored ones would be tens of grey levels away."""
    data = with_orientation(photo(300, 400, cell=100), 6)
    errors = [np.subtract(*crop_both(data, size, seed, in_channels, interpolation=interpolation)) for seed in range(12)]
    # At 150 nothing is reduced; below, regions fall on whole pixels of the reduced image.
    allowed = (2 if size == 150 else 5) + (4 if interpolation == "nearest" else 0)
    assert np.mean([np.abs(e).mean() for e in errors]) < allowed
    ours, theirs = crop_both(data, size)
    assert np.abs(ours[:, ::-1] - theirs).mean() > 15


def test_large_photographs_are_decoded_reduced(monkeypatch):
    """Never below the size that is asked for, and only by what the region allows."""
    shapes, decode = [], simplejpeg.decode_jpeg
    _, library = fast_libraries()

    def watched(*arguments, **options):
        shapes.append(decode(*arguments, **options))
        return shapes[-1]

    monkeypatch.setattr(library, "decode_jpeg", watched)
    data, wide = encode(photo(1200, 1600, cell=200)), encode(photo(300, 1600))
    factors = set()
    for seed in range(20):
        errors = np.subtract(*crop_both(data, 140, seed))
        assert np.abs(errors).mean() < 5
        factors.add(round(1200 / shapes[-1].shape[0]))
    assert factors == {2, 4, 8}
    for seed in range(5):
        crop_both(wide, 90, seed)
        assert shapes[-1].shape[0] >= 90


def test_policy_comes_after_crop_and_flip():
    augment = AugmentConfig(policy="trivialaugment", color_jitter=0.4)
    data = encode(photo())
    for decoder in ("pillow", "fast"):
        transform = encoded_train_transform("imagenet", 24, augment=augment, decoder=decoder)
        ours = transform.from_encoded(data, "x", np.random.default_rng(3))
        rng = np.random.default_rng(3)
        image = encoded_train_transform("imagenet", 24, decoder=decoder).from_encoded(data, "x", rng)
        assert len(transform.rest) == 2
        for step in transform.rest:
            image = step(image, rng)
        np.testing.assert_array_equal(ours, image)
    expected = train_transform("imagenet", 24, augment=augment)(decode_bytes(data, name="x"), np.random.default_rng(3))
    pillow = encoded_train_transform("imagenet", 24, augment=augment)
    np.testing.assert_array_equal(pillow.from_encoded(data, "x", np.random.default_rng(3)), expected)


def test_other_kinds():
    assert not isinstance(encoded_train_transform("cifar", 8), EncodedTransform)
    fast, plain = encoded_train_transform("cifar", 8, decoder="fast"), train_transform("cifar", 8)
    data = encode(photo())
    ours = fast.from_encoded(data, "x", np.random.default_rng(0))
    np.testing.assert_array_equal(ours, plain(decode_bytes(data, name="x"), np.random.default_rng(0)))


# Errors


def test_missing_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "simplejpeg":
            raise ImportError("No module named 'simplejpeg'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    fast_libraries.cache_clear()
    with pytest.raises(ImportError, match=r"data.decoder 'fast' needs .*'simplejpeg'.* pip install eqvision\[fast\]"):
        encoded_train_transform("imagenet", 8, decoder="fast")


def test_unknown_decoder():
    with pytest.raises(ValueError, match=r"data.decoder 'fats' does not exist; nearest: fast"):
        encoded_train_transform("imagenet", 8, decoder="fats")


# In the stream


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path, per_class=4, shape=(40, 50, 3))
    write_folder(tmp_path, per_class=2, suffix=".png", shape=(40, 50, 3))
    return tmp_path


def batches(folder, transform, on_corrupt="raise", **options):
    source = ImageFolder(folder, on_corrupt=on_corrupt)
    return take(train_stream(source, batch_size=5, seed=0, transform=transform, **options), 6), source.num_skipped


def test_stream_hands_over_encoded_images(folder):
    plain, _ = batches(folder, train_transform("imagenet", 16))
    pillow, _ = batches(folder, encoded_train_transform("imagenet", 16))
    assert_same(plain, pillow)
    fast, _ = batches(folder, encoded_train_transform("imagenet", 16, decoder="fast"), num_threads=3)
    assert_same(fast, batches(folder, encoded_train_transform("imagenet", 16, decoder="fast"), num_threads=0)[0])
    for a, b in zip(plain, fast, strict=True):
        assert_same([a[1:]], [b[1:]])
        assert 0 < np.abs(a.images.astype(float) - b.images).mean() < 40  # noise: the filters differ widely


@pytest.mark.parametrize("decoder", ["pillow", "fast"])
def test_corrupt_images_in_the_stream(folder, decoder):
    truncate(folder / "cat" / "1.jpg")
    plain, skipped = batches(folder, train_transform("none", 16), "skip")
    ours, ours_skipped = batches(folder, encoded_train_transform("none", 16, decoder=decoder), "skip")
    assert skipped == ours_skipped == 1
    for a, b in zip(plain, ours, strict=True):
        assert_same([a[1:]], [b[1:]])
        assert not b.images[b.weights == 0].any()
    with pytest.raises(CorruptImageError, match=rf"corrupt image {folder}/cat/1.jpg: .*Repair or remove it"):
        batches(folder, encoded_train_transform("imagenet", 16, decoder=decoder))


def test_sources_of_pixels_are_told(caplog):
    for decoder, messages in (("pillow", 0), ("fast", 1)):
        caplog.clear()
        transform = encoded_train_transform("imagenet", 6, decoder=decoder)
        ours = take(train_stream(numbered(shape=(8, 8, 3)), batch_size=4, seed=0, transform=transform), 2)
        options = {"batch_size": 4, "seed": 0, "transform": train_transform("imagenet", 6)}
        assert_same(ours, take(train_stream(numbered(shape=(8, 8, 3)), **options), 2))
        told = [r.message for r in caplog.records if "data.decoder 'fast' changes nothing: Arrays" in r.message]
        assert len(told) == messages


@pytest.mark.slow
def test_workers_decode_the_same(folder):
    transform = encoded_train_transform("imagenet", 16, decoder="fast")
    assert_same(batches(folder, transform)[0], batches(folder, transform, num_workers=1)[0])
