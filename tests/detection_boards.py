"""A detection source for tests: black images of several sizes with one bright rectangle for each object."""

import numpy as np

from eqvision.data.detection import DetectionExample


def board(height=40, width=60, boxes=((10, 5, 30, 25),), index=0, masks=True, channels=3):
    """Rectangles of level 255 at whole xyxy; label i for the i-th."""
    image = np.zeros((height, width, channels), np.uint8)
    planes = np.zeros((len(boxes), height, width), np.uint8)
    for plane, (x1, y1, x2, y2) in zip(planes, boxes, strict=True):
        image[y1:y2, x1:x2] = 255
        plane[y1:y2, x1:x2] = 1
    labels = np.arange(len(boxes), dtype=np.int32)
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    return DetectionExample(image, boxes, labels, planes if masks else None, index + 100, index, (height, width))


class Boards:
    """Example i has size ``sizes[i]``, the level ``i % 256`` in its last corner pixel, and ``i % 4`` objects."""

    class_names = tuple("abcd")
    num_skipped = 0

    def __init__(self, sizes, masks=True):
        self.sizes, self.masks = np.array(sizes), masks
        self.weight = {}

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        height, width = self.sizes[index].tolist()
        boxes = [(4 * i, 2, 4 * i + 3, 2 + 3 * (i + 1)) for i in range(index % 4)]
        example = board(height, width, boxes, index, self.masks)
        example.image[-1, -1] = index % 256
        return example._replace(weight=self.weight.get(index, 1.0))

    def describe(self, index):
        return f"board {index}"


def mixed_sizes(number, low=20, high=40, seed=0):
    """Some upright, some wide, some square."""
    return np.random.default_rng(seed).integers(low, high + 1, (number, 2))
