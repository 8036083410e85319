"""Arrays in files, the embedded digits, and the check of labels."""

import sys

import numpy as np
import pytest
from images import noise, take, truncate, write_folder

from eqvision.data import (
    Arrays,
    ImageFolder,
    Source,
    check_labels,
    digits,
    eval_stream,
    load_arrays,
)

# Arrays


def test_arrays():
    source = Arrays(noise((5, 4, 6)), np.array([0, 1, 2, 1, 0]), name="toy")
    assert isinstance(source, Source)
    assert source[1].image.shape == (4, 6, 1)
    assert source.class_names == ("0", "1", "2")
    assert source.labels.dtype == np.int32
    assert source[-1].index == 4
    assert source.describe(3) == "row 3 of toy"
    rows = Arrays(noise((2, 4, 4, 3)), np.array([[0, 1, 1], [1, 0, 0]]))
    assert rows.labels.dtype == np.float32
    assert rows.class_names == ("0", "1", "2")
    assert Arrays(noise((2, 4, 4, 3)), np.array([[7], [2]])).labels.shape == (2,)


def test_arrays_convert_whole_numbers_only():
    whole = noise((3, 4, 4)).astype(np.float32)
    assert Arrays(whole, np.arange(3)).images.dtype == np.uint8
    np.testing.assert_array_equal(Arrays(whole.astype(np.int64), np.arange(3)).images[..., 0], whole)
    for bad, message in (
        (whole / 255, r"float32 in 0\.\d+..0\.\d+ and not whole numbers.*images \* 255"),
        (whole + 0.5, "not whole numbers 0..255"),
        (whole - 300, r"images are float32 in -.*expected pixels 0..255"),
        (whole.astype(np.int32) + 200, r"images are int32 in .*expected pixels 0..255"),
        (np.full_like(whole, np.nan), r"nan..nan; expected pixels 0..255"),
    ):
        with pytest.raises(ValueError, match=message):
            Arrays(bad, np.arange(3))


def test_one_real_value_per_image_is_a_target_of_regression():
    labels = Arrays(noise((2, 4, 4)), np.array([0.5, -1.0])).labels
    assert labels.dtype == np.float32
    np.testing.assert_array_equal(labels, [[0.5], [-1.0]])


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (noise((2, 3, 8, 8)), np.arange(2), r"\(2, 3, 8, 8\) look channels-first; .*np.moveaxis\(images, 1, -1\)"),
        (noise((2, 64)), np.arange(2), r"shape \(2, 64\); expected \[n h w c\] or \[n h w\]"),
        (noise((0, 4, 4)), np.arange(0), r"shape \(0, 4, 4, 1\); expected"),
        (noise((2, 4, 4)), np.arange(3), "2 images but 3 labels"),
        (noise((2, 4, 4)), np.array(["a", "b"]), r"labels have shape \(2,\) and type <U1; expected class indices"),
    ],
)
def test_arrays_bad_input(images, labels, message):
    with pytest.raises(ValueError, match=message):
        Arrays(images, labels)


def test_arrays_need_enough_class_names():
    with pytest.raises(ValueError, match="labels need 3 classes but class_names has 2"):
        Arrays(noise((3, 4, 4)), np.arange(3), class_names=("a", "b"))


@pytest.mark.parametrize(
    ("split", "keys"),
    [
        (None, ("images", "labels")),
        (None, ("x", "y")),
        ("train", ("x_train", "y_train")),
        ("test", ("test_images", "test_labels")),
        ("val", ("images_valid", "labels_valid")),
    ],
)
def test_load_npz(tmp_path, split, keys):
    images, labels = noise((4, 5, 5, 3)), np.arange(4)
    np.savez(tmp_path / "set.npz", **dict(zip(keys, (images, labels), strict=True)))
    source = load_arrays(tmp_path / "set.npz", split)
    np.testing.assert_array_equal(source.images, images)
    np.testing.assert_array_equal(source.labels, labels)
    assert str(tmp_path / "set.npz") in source.describe(0)


def test_load_npy_folder_is_memory_mapped(tmp_path):
    np.save(tmp_path / "images.npy", noise((4, 5, 5, 3)))
    np.save(tmp_path / "labels.npy", np.arange(4))
    source = load_arrays(tmp_path)
    assert isinstance(source.images, np.memmap)
    (batch,) = take(eval_stream(source, batch_size=4, num_threads=0), 2)
    np.testing.assert_array_equal(batch.images, noise((4, 5, 5, 3)))
    (tmp_path / "sub" / "test").mkdir(parents=True)
    np.save(tmp_path / "sub" / "test" / "images.npy", noise((2, 5, 5, 3)))
    np.save(tmp_path / "sub" / "test" / "labels.npy", np.arange(2))
    assert len(load_arrays(tmp_path / "sub", "test")) == 2


def test_load_arrays_bad_input(tmp_path):
    file = tmp_path / "set.npz"
    with pytest.raises(FileNotFoundError, match=r"set.npz does not exist; .* exists but has no 'set.npz'"):
        load_arrays(file)
    np.savez(file, pictures=noise((2, 4, 4)), labels=np.arange(2))
    with pytest.raises(KeyError, match="has no images: it has labels, pictures; expected one of images, image, x"):
        load_arrays(file)
    np.savez(file, x_train=noise((2, 4, 4)), y_train=np.arange(2))
    with pytest.raises(KeyError, match=r"has images per split: pass split='train' \(it has: train\)"):
        load_arrays(file)
    with pytest.raises(KeyError, match="has no images for split 'test': it has x_train, y_train"):
        load_arrays(file, "test")
    np.savez(file, x=noise((2, 4, 4)), images=noise((2, 4, 4)), y=np.arange(2))
    with pytest.raises(KeyError, match="several candidates for images: images, x"):
        load_arrays(file)
    np.savez(file, x=noise((2, 4, 4)), y=np.array([{}, {}], dtype=object))
    with pytest.raises(ValueError, match=r"set.npz: cannot read 'y': Object arrays cannot be loaded"):
        load_arrays(file)
    truncate(file)
    with pytest.raises(ValueError, match=r"set.npz is not a readable .npz archive"):
        load_arrays(file)
    np.save(tmp_path / "one.npy", noise((2, 4, 4)))
    with pytest.raises(ValueError, match=r"one.npy is a single array; expected a .npz"):
        load_arrays(tmp_path / "one.npy")


def test_digits_split():
    train, test = digits("train"), digits("test")
    assert (len(train), len(test)) == (1437, 360)
    assert train[0].image.shape == (8, 8, 1)
    assert train.images.max() == 255
    assert set(np.bincount(test.labels)) <= {34, 35, 36, 37}
    assert set(np.unique(train.images)) == set(np.round(np.arange(17) * 255 / 16))
    every = np.concatenate([train.images, test.images])
    assert len(np.unique(every.reshape(1797, -1), axis=0)) == 1797
    np.testing.assert_array_equal(digits("test").labels, test.labels)
    # Fixed for good: published accuracies refer to these images.
    np.testing.assert_array_equal(test.labels[:12], [9, 2, 5, 7, 6, 9, 7, 3, 3, 3, 4, 6])
    with pytest.raises(ValueError, match="digits has the splits 'train' and 'test', got 'val'"):
        digits("val")


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install eqvision\[demo\]"):
        digits("train")


# Labels


def test_labels_out_of_range_name_the_example(tmp_path):
    folder = ImageFolder(write_folder(tmp_path))
    check_labels(folder, 2)
    with pytest.raises(ValueError, match=r"label 1 in /.*dog/0.jpg but the head has 1 classes \(0..0\); 3 such labels"):
        check_labels(folder, 1)
    arrays = Arrays(noise((3, 4, 4)), np.array([0, 10, 1]), name="toy")
    with pytest.raises(
        ValueError, match=r"label 10 in row 1 of toy but the head has 10 classes \(0..9\).*num_classes=11"
    ):
        check_labels(arrays, 10)
    with pytest.raises(ValueError, match=r"label -1 in row 2 of toy .*remove unlabelled examples"):
        check_labels(Arrays(noise((3, 4, 4)), np.array([0, 1, -1]), name="toy"), 2)


def test_multi_label_rows():
    source = Arrays(noise((2, 4, 4)), np.array([[0.0, 1.0], [0.5, 1.0]]), name="toy")
    check_labels(source, 2)
    with pytest.raises(ValueError, match="rows of row 0 of toy have width 2 but the head has 3 classes"):
        check_labels(source, 3)
    for value in (2.0, -1.0, np.nan):
        bad = Arrays(noise((2, 4, 4)), np.array([[0.0, 1.0], [value, 1.0]]), name="toy")
        with pytest.raises(ValueError, match=r"multi-label value (2|-1|nan) in row 1 of toy; expected 0..1"):
            check_labels(bad, 2)
