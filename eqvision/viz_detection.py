"""Pictures of what a detector is trained on: batches with their objects, padding included."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int, Int32, UInt8

from eqvision.data.detection import resize_masks
from eqvision.detection_pictures import DrawnObjects, Sample, draw_samples
from eqvision.drawn import target_masks
from eqvision.recipes import DetectionConfig, PromptedConfig
from eqvision.train import set_up
from eqvision.types import DetectionBatch
from eqvision.viz import host_batch, weight_text

MOST_SIDE = 640  # pixels; larger images are made smaller to be drawn
STRIPE = 8  # pixels, of the padding


class TargetObjects(NamedTuple):
    """The objects of one image of a batch; boxes xyxy in its pixels, and masks at its size where the targets have
    any."""

    boxes: Float32[np.ndarray, "n 4"]
    labels: Int32[np.ndarray, " n"]
    masks: list[UInt8[np.ndarray, "h w"]] | None = None


class TrainingObjects(NamedTuple):
    """The first rows of a batch as the model sees them, with what is to be found in them."""

    images: UInt8[np.ndarray, "b h w c"]
    sizes: Int[np.ndarray, "b 2"]
    """Height and width of the part that is image."""
    objects: tuple[TargetObjects, ...]
    weights: Float[np.ndarray, " b"]
    indices: Int[np.ndarray, " b"]
    class_names: tuple[str, ...]
    descriptions: tuple[str, ...]
    size: int
    """Of the whole batch."""


def detection_batch(config: DetectionConfig | PromptedConfig, step: int, count: int) -> TrainingObjects:
    """The first ``count`` rows of the batch of ``step`` (from 1, as in metrics.csv), with their targets.

    Raises ValueError for a step or count below 1, and what training raises for a configuration that does not fit.
    """
    if step < 1 or count < 1:
        raise ValueError(f"step={step}, count={count}; steps are counted from 1, and at least one image is drawn")
    setup = set_up(config)
    batch: DetectionBatch = host_batch(setup, step)
    rows = range(min(count, len(batch.images)))
    source, indices = setup.problem.source, np.asarray(batch.indices)[: len(rows)]
    return TrainingObjects(
        np.asarray(batch.images)[: len(rows)],
        np.asarray(batch.size)[: len(rows)],
        tuple(_objects(batch, row) for row in rows),
        np.asarray(batch.weights)[: len(rows)],
        indices,
        tuple(source.class_names),
        tuple(source.describe(int(index)) for index in indices),
        len(batch.images),
    )


def _objects(batch: DetectionBatch, row: int) -> TargetObjects:
    targets, size = batch.targets, (batch.images.shape[1], batch.images.shape[2])
    valid = np.asarray(targets.valid)[row]
    boxes, labels = np.asarray(targets.boxes)[row][valid], np.asarray(targets.labels)[row][valid]
    return TargetObjects(boxes, labels, target_masks(targets, row, size))


def draw_detection_batch(batch: TrainingObjects, path: Path, title: str) -> Path:
    """A grid of the images with boxes, names and masks; padding is striped, and titles give sizes and weights that are
    not 1. Masks that the model gets as small squares are drawn as these squares have them.

    The model sees zeros (after normalisation) where there are stripes.
    """
    rows = range(len(batch.images))
    samples = [_sample(batch, row) for row in rows]
    return draw_samples(samples, batch.class_names, path, columns=min(4, len(samples)), title=title)


def _sample(batch: TrainingObjects, row: int) -> Sample:
    image, size, objects = batch.images[row], batch.sizes[row], batch.objects[row]
    height, width = int(size[0]), int(size[1])
    padded = f" in {image.shape[0]}x{image.shape[1]}" if (height, width) != image.shape[:2] else ""
    count = len(objects.labels)
    text = f"{batch.descriptions[row]}: {height}x{width}{padded}, {count} object{'s' * (count != 1)}"
    shown, factor = smaller(striped(image, height, width))
    weight = weight_text(float(batch.weights[row])).replace("\n", ", ")
    drawn = DrawnObjects(objects.boxes * np.float32(factor), objects.labels, masks=_fitting(objects.masks, shown))
    return Sample(shown, drawn, text + weight)


def _fitting(
    masks: list[UInt8[np.ndarray, "h w"]] | None, shown: UInt8[np.ndarray, "h2 w2 c"]
) -> list[UInt8[np.ndarray, "h2 w2"]] | None:
    """Masks at the size of what is shown."""
    if not masks or masks[0].shape == shown.shape[:2]:
        return masks
    return list(resize_masks(np.stack(masks), (shown.shape[0], shown.shape[1])))


def striped(image: UInt8[np.ndarray, "h w c"], height: int, width: int) -> UInt8[np.ndarray, "h w c"]:
    """The image with grey stripes in place of its padding: right of ``width`` and below ``height``."""
    rows, columns = np.indices(image.shape[:2])
    stripes = np.where((rows + columns) // STRIPE % 2 == 0, 150, 190).astype(np.uint8)
    shown = np.repeat(stripes[..., None], image.shape[2], axis=2)
    shown[:height, :width] = image[:height, :width]
    return shown


def smaller(image: UInt8[np.ndarray, "h w c"]) -> tuple[UInt8[np.ndarray, "h2 w2 c"], float]:
    """The image with no side above ``MOST_SIDE``, and the factor of its size."""
    from PIL import Image

    factor = min(1.0, MOST_SIDE / max(image.shape[:2]))
    if factor == 1.0:
        return image, factor
    to = (max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor)))
    planes = [Image.fromarray(image[..., channel]).resize(to) for channel in range(image.shape[2])]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1), factor
