"""Small image folders and arrays for tests of the data room."""

import itertools

import numpy as np
from PIL import Image

from eqvision.data import Arrays


def noise(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_folder(root, classes=("cat", "dog"), per_class=3, suffix=".jpg", shape=(20, 24, 3)):
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            Image.fromarray(noise(shape, seed=100 * number + i)).save(root / name / f"{i}{suffix}")
    return root


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def numbered(n=23, shape=(8, 8, 1)):
    """Arrays whose first pixel and label both are the row."""
    images = noise((n, *shape))
    images[:, 0, 0, 0] = np.arange(n)
    return Arrays(images, np.arange(n))


def take(stream, count):
    batches = list(itertools.islice(stream, count))
    stream.close()
    return batches


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        for a, b in zip(batch, other, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
