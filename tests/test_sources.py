"""Image folders, their cached listing, and decoding: what is read, and what bad input says."""

import logging
import os
import subprocess
import sys

import numpy as np
import pytest
from images import noise, take, truncate, write_folder
from PIL import Image

from eqvision.data import (
    CorruptImageError,
    ImageFolder,
    Source,
    decode_image,
    eval_stream,
    train_stream,
)

# Image folders


def test_folder_with_splits(tmp_path):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "test", per_class=2, suffix=".png")
    train, test = ImageFolder(tmp_path, "train"), ImageFolder(str(tmp_path), "test")
    assert isinstance(train, Source)
    assert (len(train), len(test)) == (6, 4)
    assert train.class_names == test.class_names == ("cat", "dog")
    np.testing.assert_array_equal(train.labels, [0, 0, 0, 1, 1, 1])
    example = test[3]
    np.testing.assert_array_equal(example.image, noise((20, 24, 3), seed=101))
    assert (example.label, example.index, example.weight) == (1, 3, 1.0)
    assert test.describe(3) == str(tmp_path / "test" / "dog" / "1.png")
    with pytest.raises(IndexError):
        test[4]


def test_folder_without_splits_and_with_leftovers(tmp_path, caplog):
    write_folder(tmp_path)
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "cat" / "._0.jpg").write_bytes(b"what macOS leaves behind")
    (tmp_path / ".git").mkdir()
    (tmp_path / "empty").mkdir()
    Image.fromarray(noise((4, 4, 3))).save(tmp_path / "stray.png")
    with caplog.at_level(logging.WARNING):
        source = ImageFolder(tmp_path)
    assert len(source) == 6
    assert source.class_names == ("cat", "dog", "empty")
    assert "no images in class folders empty" in caplog.text
    assert "ignored 1 images outside any class folder (first: stray.png)" in caplog.text


def test_class_names_fix_the_labels(tmp_path):
    write_folder(tmp_path, classes=("dog",))
    source = ImageFolder(tmp_path, class_names=("cat", "dog", "owl"))
    assert set(source.labels) == {1}
    with pytest.raises(ValueError, match=r"class folder .*dog is not among the 2 class_names; nearest: dogs"):
        ImageFolder(tmp_path, class_names=("cat", "dogs"))
    with pytest.raises(ValueError, match="class_names has duplicates: dog"):
        ImageFolder(tmp_path, class_names=("dog", "cat", "dog"))


def test_missing_folder_names_the_nearest(tmp_path):
    write_folder(tmp_path / "animals")
    with pytest.raises(FileNotFoundError, match=r"animal does not exist; .* has no 'animal'; did you mean 'animals'\?"):
        ImageFolder(tmp_path / "animal")
    with pytest.raises(FileNotFoundError, match="exists but has no 'zzz'; it contains: animals/"):
        ImageFolder(tmp_path / "zzz" / "deeper")


def test_file_instead_of_folder(tmp_path):
    np.savez(tmp_path / "set.npz", images=noise((2, 4, 4)), labels=np.arange(2))
    with pytest.raises(NotADirectoryError, match=r"set.npz is a file; .*eqvision.data.load_arrays"):
        ImageFolder(tmp_path / "set.npz")


def test_folder_without_images_says_what_is_there(tmp_path):
    for name in "abcdefg":
        (tmp_path / f"{name}.txt").write_text("")
    with pytest.raises(
        ValueError, match=r"no images found in .*contains: a.txt, b.txt, c.txt, d.txt, e.txt, ... \(7 entries\)"
    ):
        ImageFolder(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"It contains: nothing. Expected ROOT/\{train,val,test\}/CLASS/image.jpg"):
        ImageFolder(tmp_path / "empty")


def test_images_without_class_folders(tmp_path):
    Image.fromarray(noise((4, 4, 3))).save(tmp_path / "one.png")
    with pytest.raises(ValueError, match=r"1 images \(first: one.png\) lie directly in .*one folder per class"):
        ImageFolder(tmp_path)


def test_nested_too_deeply(tmp_path):
    write_folder(tmp_path / "cat" / "extra" / "level")
    with pytest.raises(
        ValueError, match=r"wrongly nested: .*0.jpg .*if 'extra' is a class, pass split=None and path='"
    ):
        ImageFolder(tmp_path)
    write_folder(tmp_path / "other" / "set" / "train")
    with pytest.raises(ValueError, match=r"if 'train' is a split, pass split='train' and path='.*other/set'"):
        ImageFolder(tmp_path / "other")


def test_missing_split(tmp_path):
    write_folder(tmp_path / "set" / "train")
    write_folder(tmp_path / "flat")
    with pytest.raises(FileNotFoundError, match="has no split 'test'; it has: train"):
        ImageFolder(tmp_path / "set", "test")
    with pytest.raises(FileNotFoundError, match=r"looks like a split itself: pass its parent, path='.*set'"):
        ImageFolder(tmp_path / "set" / "train", "train")
    with pytest.raises(
        FileNotFoundError, match=r"it contains: cat/, dog/. If these are the class folders, pass split=None"
    ):
        ImageFolder(tmp_path / "flat", "train")
    with pytest.raises(FileNotFoundError, match=r"no folder 'train', but .*set has: pass path='.*set'"):
        ImageFolder(tmp_path, "train")
    with pytest.raises(ValueError, match=r"set holds the splits train; choose one: split='train'"):
        ImageFolder(tmp_path / "set")
    with pytest.raises(ValueError, match="unknown split 'tran'; did you mean 'train'"):
        ImageFolder(tmp_path / "set", "tran")


def test_splits_with_different_classes(tmp_path):
    write_folder(tmp_path / "train", classes=("ant", "cat", "dog"))
    write_folder(tmp_path / "test", classes=("cat", "dog", "owl"))
    with pytest.raises(ValueError, match="only in 'test': owl; only in 'train': ant"):
        ImageFolder(tmp_path, "test")
    names = ("ant", "cat", "dog", "owl")
    np.testing.assert_array_equal(np.unique(ImageFolder(tmp_path, "test", class_names=names).labels), [1, 2, 3])


def test_an_unlabelled_split_does_not_block_the_others(tmp_path):
    write_folder(tmp_path / "train")
    (tmp_path / "test").mkdir()
    Image.fromarray(noise((4, 4, 3))).save(tmp_path / "test" / "0.png")
    assert len(ImageFolder(tmp_path, "train")) == 6


def test_bad_options(tmp_path):
    with pytest.raises(ValueError, match="in_channels=4: image files are read as 3"):
        ImageFolder(tmp_path, in_channels=4)
    with pytest.raises(ValueError, match="on_corrupt='ignore'; expected 'raise' or 'skip'"):
        ImageFolder(tmp_path, on_corrupt="ignore")


# The listing cache


def settle(root):
    """Give the folders an old time stamp, as a data set has that was not written a moment ago."""
    for folder in (root, *(p for p in root.iterdir() if p.is_dir())):
        os.utime(folder, (1_000_000, 1_000_000))


def no_scan(root):
    raise AssertionError(f"{root} was read again")


def test_listing_is_cached_and_follows_changes(tmp_path, monkeypatch):
    settle(write_folder(tmp_path))
    first = ImageFolder(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("eqvision.data.listing._scan", no_scan)
        again = ImageFolder(tmp_path)
    assert [again.describe(i) for i in range(6)] == [first.describe(i) for i in range(6)]
    np.testing.assert_array_equal(again.labels, first.labels)

    Image.fromarray(noise((4, 4, 3))).save(tmp_path / "cat" / "new.png")
    assert len(ImageFolder(tmp_path)) == 7
    settle(tmp_path)
    (tmp_path / "dog" / "0.jpg").unlink()
    assert len(ImageFolder(tmp_path)) == 6
    settle(tmp_path)
    write_folder(tmp_path, classes=("ant",), per_class=1)
    assert ImageFolder(tmp_path).class_names == ("ant", "cat", "dog")


def test_fresh_folders_are_not_cached(tmp_path):
    write_folder(tmp_path)
    ImageFolder(tmp_path)
    assert not list(os.scandir(os.environ["EQVISION_CACHE"]))


def test_damaged_cache_is_reported_and_replaced(tmp_path, caplog):
    settle(write_folder(tmp_path))
    ImageFolder(tmp_path)
    (stored,) = os.scandir(os.path.join(os.environ["EQVISION_CACHE"], "listings"))
    for content in ("{", "[]", '{"version": 1, "folders": {}}'):
        with open(stored.path, "w") as f:
            f.write(content)
        assert len(ImageFolder(tmp_path)) == 6
    assert caplog.text.count("ignored the unreadable listing") == 3


def test_unwritable_cache_warns_once(tmp_path, monkeypatch, caplog):
    settle(write_folder(tmp_path / "set"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EQVISION_CACHE", str(tmp_path / "file"))
    assert len(ImageFolder(tmp_path / "set")) == len(ImageFolder(tmp_path / "set")) == 6
    assert caplog.text.count("is not writable") == 1


# Decoding


def save(image, path, **options):
    image.save(path, **options)
    return path


def test_decode_kinds_of_png(tmp_path):
    rgb = Image.fromarray(noise((6, 5, 3)))
    grey = noise((6, 5))
    np.testing.assert_array_equal(decode_image(save(rgb, tmp_path / "rgb.png")), np.asarray(rgb))
    np.testing.assert_array_equal(decode_image(tmp_path / "rgb.png", 1)[..., 0], np.asarray(rgb.convert("L")))
    np.testing.assert_array_equal(
        decode_image(save(Image.fromarray(grey), tmp_path / "l.png")), np.repeat(grey[..., None], 3, axis=-1)
    )
    palette = rgb.quantize(8)
    np.testing.assert_array_equal(decode_image(save(palette, tmp_path / "p.png")), np.asarray(palette.convert("RGB")))
    bits = Image.fromarray(grey > 127)
    np.testing.assert_array_equal(decode_image(save(bits, tmp_path / "1.png"), 1)[..., 0], 255 * (grey > 127))


def test_decode_16_bit(tmp_path):
    wide = np.array([[0, 1, 128], [129, 32768, 65535]], np.uint16)
    path = save(Image.fromarray(wide), tmp_path / "16.png")
    np.testing.assert_array_equal(decode_image(path, 1)[..., 0], np.round(wide / 257))
    assert decode_image(path, 3).shape == (2, 3, 3)


def test_transparent_pixels_are_white(tmp_path):
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = 10, 20, 30, 255
    decoded = decode_image(save(Image.fromarray(rgba), tmp_path / "a.png"))
    np.testing.assert_array_equal(decoded[0, 0], [10, 20, 30])
    np.testing.assert_array_equal(decoded[1, 1], [255, 255, 255])


def test_cmyk_and_other_formats(tmp_path):
    flat = Image.new("RGB", (16, 16), (200, 100, 50))
    cmyk = decode_image(save(flat.convert("CMYK"), tmp_path / "cmyk.jpg", quality=95))
    assert np.abs(cmyk.astype(int) - [200, 100, 50]).max() <= 4  # JPEG rounding
    for suffix in (".webp", ".bmp", ".gif", ".tiff", ".ppm"):
        decoded = decode_image(save(flat, tmp_path / f"flat{suffix}"))
        assert np.abs(decoded.astype(int) - [200, 100, 50]).max() <= 4


def test_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rows run from right to left columns
    pixels = noise((4, 6, 3))
    path = save(Image.fromarray(pixels), tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(decode_image(path), np.rot90(pixels, -1))


def corrupt_folder(root):
    write_folder(root, per_class=4)
    truncate(root / "cat" / "0.jpg")
    (root / "cat" / "2.jpg").write_bytes(b"")
    (root / "dog" / "1.jpg").write_text("<html>404</html>")
    return root


@pytest.mark.parametrize(
    ("index", "file", "cause"),
    [
        (0, "cat/0.jpg", "image file is truncated"),
        (2, "cat/2.jpg", r"the file is empty \(0 bytes\)"),
        (5, "dog/1.jpg", "cannot identify image file"),
    ],
)
def test_corrupt_image_names_path_index_and_policy(tmp_path, index, file, cause):
    source = ImageFolder(corrupt_folder(tmp_path))
    path = tmp_path / file
    with pytest.raises(
        CorruptImageError, match=rf"corrupt image {path}: {cause}.*\(index {index}\).*on_corrupt='skip'"
    ):
        source[index]


def test_float_pixels_are_refused(tmp_path):
    save(Image.fromarray(np.ones((2, 2), np.float32)), tmp_path / "f.tiff")
    with pytest.raises(CorruptImageError, match="pixels are 32-bit floats"):
        decode_image(tmp_path / "f.tiff")


def test_errors_of_the_file_system_are_not_called_corrupt(tmp_path):
    source = ImageFolder(write_folder(tmp_path), on_corrupt="skip")
    (tmp_path / "cat" / "0.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"cat/0.jpg"):
        source[0]
    (tmp_path / "cat" / "0.jpg").mkdir()
    with pytest.raises(IsADirectoryError, match=r"cat/0.jpg"):
        source[0]
    assert source.num_skipped == 0


def test_skip_gives_weight_zero_in_place(tmp_path, caplog):
    source = ImageFolder(corrupt_folder(tmp_path), on_corrupt="skip")
    for _ in range(2):
        batches = take(eval_stream(source, batch_size=8, num_threads=2), 2)
    np.testing.assert_array_equal(batches[0].weights, [0, 1, 0, 1, 1, 0, 1, 1])
    np.testing.assert_array_equal(batches[0].indices, np.arange(8))
    np.testing.assert_array_equal(batches[0].labels, source.labels)
    assert batches[0].images.shape == (8, 20, 24, 3)
    assert not batches[0].images[0].any()
    assert source.num_skipped == 3
    assert caplog.text.count("skipped (weight 0)") == 3
    assert str(tmp_path / "dog" / "1.jpg") in caplog.text


def test_corrupt_image_reaches_the_consumer_of_a_threaded_stream(tmp_path):
    source = ImageFolder(corrupt_folder(tmp_path))
    stream = train_stream(source, batch_size=8, seed=0, num_threads=2)
    with pytest.raises(CorruptImageError, match=r"corrupt image /.*\(index [025]\)"):
        next(stream)
    stream.close()


# Imports


def test_importing_the_room_does_not_import_decoders_or_pipelines():
    code = "import sys, eqvision.data; print({'grain', 'PIL', 'sklearn', 'torch'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
