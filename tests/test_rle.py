"""Masks of COCO: pixels and strings equal those of pycocotools, and wrong codes are refused."""

import builtins

import numpy as np
import pycocotools.mask as pycocotools_mask
import pytest

from eqvision.data.detection import (
    CompressedRLE,
    Polygons,
    UncompressedRLE,
    coco_rle,
    compress,
    decode_mask,
    decode_masks,
    encode_mask,
    encode_uncompressed,
    mask_area,
    mask_box,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools


def random_masks(rng, count):
    for number in range(count):
        height, width = rng.integers(1, 40, 2)
        yield (rng.random((height, width)) < number / (count - 1)).astype(np.uint8)  # from empty to full


def test_both_kinds_of_run_lengths_equal_pycocotools(rng):
    for mask in random_masks(rng, 100):
        height, width = mask.shape
        reference = pycocotools_mask.encode(np.asfortranarray(mask))
        compressed, uncompressed = encode_mask(mask), encode_uncompressed(mask)
        assert compressed == CompressedRLE((height, width), reference["counts"])
        plain = {"size": [height, width], "counts": uncompressed.counts.tolist()}
        assert pycocotools_mask.frPyObjects(plain, height, width)["counts"] == reference["counts"]
        assert compress(uncompressed, height, width) == compressed
        for code in (compressed, uncompressed):
            np.testing.assert_array_equal(decode_mask(code, height, width), mask)
            assert mask_area(code, height, width) == mask.sum()
        np.testing.assert_array_equal(encode_mask(mask.astype(bool) * np.uint8(200)).counts, compressed.counts)


def random_polygons(rng, number):
    """Of every sort: far outside, whole numbers, tenths (whose fivefold lies between pixels), hundredths."""
    corners = int(rng.integers(3, 12))
    kinds = [
        rng.uniform(-40, 90, 2 * corners),
        rng.integers(0, 50, 2 * corners).astype(float),
        np.round(rng.uniform(0, 50, 2 * corners), 1),
        np.round(rng.uniform(0, 50, 2 * corners), 2),
    ]
    return kinds[number % 4]


def test_polygons_equal_pycocotools(rng):
    for number in range(400):
        height, width = map(int, rng.integers(1, 60, 2))
        parts = tuple(random_polygons(rng, number) for _ in range(rng.integers(1, 4)))
        codes = pycocotools_mask.frPyObjects([part.tolist() for part in parts], height, width)
        reference = pycocotools_mask.merge(codes)
        np.testing.assert_array_equal(decode_mask(Polygons(parts), height, width), pycocotools_mask.decode(reference))
        assert compress(Polygons(parts), height, width).counts == reference["counts"]
        assert mask_area(Polygons(parts), height, width) == pycocotools_mask.area(reference)


def test_a_square_by_hand():
    square = Polygons((np.array([2.0, 1, 5, 1, 5, 3, 2, 3]),))
    expected = np.zeros((4, 6), np.uint8)
    expected[1:3, 2:5] = 1
    np.testing.assert_array_equal(decode_mask(square, 4, 6), expected)
    np.testing.assert_array_equal(mask_box(square, 4, 6), [2, 1, 5, 3])
    assert encode_uncompressed(expected).counts.tolist() == [9, 2, 2, 2, 2, 2, 5]
    assert encode_uncompressed(1 - expected).counts.tolist() == [0, 9, 2, 2, 2, 2, 2, 5]


def test_an_object_without_a_mask():
    masks = decode_masks((None, Polygons((np.array([0.0, 0, 3, 0, 3, 2, 0, 2]),))), 2, 3)
    np.testing.assert_array_equal(masks, [np.zeros((2, 3)), np.ones((2, 3))])
    assert decode_masks((), 2, 3).shape == (0, 2, 3)
    assert mask_area(None, 2, 3) == 0
    assert not mask_box(None, 2, 3).any()
    assert pycocotools_mask.area(coco_rle(None, 2, 3)) == 0


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (CompressedRLE((3, 4), b"\xff\x80"), "cannot be decoded"),
        (CompressedRLE((3, 4), b"11"), "cannot be decoded"),
        (CompressedRLE((4, 3), b"<"), r"a mask of size \(4, 3\) is no mask of an image of \(3, 4\)"),
        (UncompressedRLE((3, 4), np.array([3, 4])), r"its run lengths \[3, 4\] ... add up to 7, expected 12"),
        (UncompressedRLE((3, 4), np.array([3, -4, 13])), r"its run lengths \[3, -4, 13\]"),
    ],
)
def test_wrong_codes_are_refused(code, message):
    with pytest.raises(ValueError, match=message):
        decode_mask(code, 3, 4)


def test_without_the_library(monkeypatch):
    real = builtins.__import__

    def refuse(name, *rest, **named):
        if name.startswith("faster_coco_eval"):
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"need faster-coco-eval: pip install 'eqvision\[coco\]'"):
        encode_mask(np.zeros((2, 2), np.uint8))
    assert encode_uncompressed(np.zeros((2, 2), np.uint8)).counts.tolist() == [4]
