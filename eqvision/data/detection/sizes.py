"""Sizes that images are resized to, by the rules of the libraries that published detectors: they differ by a pixel."""

from collections.abc import Callable

import numpy as np

from eqvision.names import nearest

Size = tuple[int, int]  # height, width


def resized_size(size: Size, shortest: int, longest: int | None = None, rounding: str = "detr") -> Size:
    """The shorter side becomes ``shortest``, or less where the longer one would exceed ``longest``.

    ``rounding`` is "detr" (facebookresearch/detr, datasets/transforms.py), "transformers", "detectron2" or
    "torchvision" (its detection models). With "detr" the longer side may exceed ``longest`` by half its ratio to the
    shorter, in pixels. Raises UnknownNameError, and ValueError for lengths below 1.
    """
    if rounding not in ROUNDINGS:
        raise nearest(rounding, list(ROUNDINGS), "rounding of sizes")
    if min(size) < 1 or shortest < 1 or (longest is not None and longest < 1):
        raise ValueError(f"size={size}, shortest={shortest}, longest={longest}; expected 1 or more for each")
    height, width = ROUNDINGS[rounding](size, shortest, longest)
    return max(1, height), max(1, width)


def scaled_size(size: Size, target: Size, scale: float) -> Size:
    """As large as fits into ``target`` times ``scale``, of the same shape; to the nearest pixel (detectron2)."""
    factor = min(target[0] * scale / size[0], target[1] * scale / size[1])
    height, width = (max(1, int(np.round(side * factor))) for side in size)
    return height, width


def _detr(size: Size, shortest: int, longest: int | None) -> Size:
    raw = _fitting(size, shortest, longest)
    return _by_short_side(size, shortest, shortest) if raw is None else _by_short_side(size, round(raw), round(raw))


def _transformers(size: Size, shortest: int, longest: int | None) -> Size:
    raw = _fitting(size, shortest, longest)
    return _by_short_side(size, shortest, shortest) if raw is None else _by_short_side(size, round(raw), raw)


def _fitting(size: Size, shortest: int, longest: int | None) -> float | None:
    """The shorter side for which the longer is ``longest``; None where there is no need."""
    low, high = float(min(size)), float(max(size))
    return longest * low / high if longest is not None and high / low * shortest > longest else None


def _by_short_side(size: Size, short: int, exact: float | int) -> Size:
    height, width = size
    if min(size) == short:
        return size
    return (int(exact * height / width), short) if width < height else (short, int(exact * width / height))


def _detectron2(size: Size, shortest: int, longest: int | None) -> Size:
    scale = shortest / min(size)
    height, width = (shortest, scale * size[1]) if size[0] < size[1] else (scale * size[0], shortest)
    if longest is not None and max(height, width) > longest:
        fit = longest / max(height, width)
        height, width = height * fit, width * fit
    return int(height + 0.5), int(width + 0.5)


def _torchvision(size: Size, shortest: int, longest: int | None) -> Size:
    scale = shortest / min(size)
    if longest is not None:
        scale = min(scale, longest / max(size))
    return int(size[0] * scale), int(size[1] * scale)


ROUNDINGS: dict[str, Callable[[Size, int, int | None], Size]] = {
    "detr": _detr,
    "transformers": _transformers,
    "detectron2": _detectron2,
    "torchvision": _torchvision,
}
