"""RoIAlign by the rules of torchvision's kernel, written as plain loops in float64."""

import math

import numpy as np


def align_by_loops(level, box, *, stride, bins, sampling_ratio, aligned):
    """One box (xyxy, pixels) on one map (h, w, c), sample after sample."""
    left, top, right, bottom = np.asarray(box, np.float64) / stride - (0.5 if aligned else 0)
    sides = np.array([bottom - top, right - left])
    sides = sides if aligned else np.maximum(sides, 1)
    rows, columns = [sampling_ratio or max(0, math.ceil(side / bins)) for side in sides]
    result = np.zeros((bins, bins, level.shape[2]))
    for p, q, i, j in np.ndindex(bins, bins, rows, columns):
        y = top + (p + (i + 0.5) / rows) * sides[0] / bins
        x = left + (q + (j + 0.5) / columns) * sides[1] / bins
        result[p, q] += sample(level, y, x) / (rows * columns)
    return result


def sample(level, y, x):
    """Bilinear; the border up to one cell outside, and zeros beyond."""
    height, width, channels = level.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return np.zeros(channels)
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    upper = level[top, left] * (1 - x + left) + level[top, right] * (x - left)
    lower = level[bottom, left] * (1 - x + left) + level[bottom, right] * (x - left)
    return upper * (1 - y + top) + lower * (y - top)
