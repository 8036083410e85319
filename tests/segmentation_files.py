"""Tiny data sets of semantic segmentation, written as the published ones lie on disk."""

import numpy as np
from PIL import Image


def write_pair(image_file, label_file, values, *, size=(6, 8)):
    """An image whose red is ten times the label file's value, and the label file."""
    values = np.broadcast_to(np.asarray(values, np.uint8), size)
    for file in (image_file, label_file):
        file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.stack([values.astype(int) * 10 % 256, np.full(size, 7, np.uint8), np.full(size, 9, np.uint8)], axis=-1)
    Image.fromarray(pixels.astype(np.uint8)).save(image_file)
    Image.fromarray(values).save(label_file)


def write_folder(root, split, values, *, images="{}", labels="{}_labels", size=(6, 8)):
    """One pair for each entry of ``values``, named 0, 1, 2 ..."""
    for number, each in enumerate(values):
        here = root / images.format(split) / f"{number}.png"
        write_pair(here, root / labels.format(split) / f"{number}.png", each, size=size)
    return root


class Blocks:
    """Images of several sizes with a grid of labels, each 4 pixels wide; every pixel says what its label is."""

    num_skipped = 0

    def __init__(self, sizes, num_classes=7):
        from eqvision.data.segmentation import SegmentationExample

        self.example, self.class_names = SegmentationExample, tuple(f"class {k}" for k in range(num_classes))
        self.sizes = np.array(sizes, np.int32)

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        height, width = map(int, self.sizes[index])
        rows, columns = np.arange(height)[:, None] // 4, np.arange(width)[None] // 4
        labels = ((rows * 3 + columns + index) % len(self.class_names)).astype(np.uint8)
        image = np.repeat((labels * 30 + 20)[..., None], 3, axis=-1).astype(np.uint8)
        return self.example(image, labels, (height, width), index)

    def describe(self, index):
        return f"block image {index}"
