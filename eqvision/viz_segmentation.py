"""Pictures of what a segmenter is trained on: batches with the classes of their pixels, padding included."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from eqvision.detection_pictures import LEAST_SIDE, captioned, colored, headed, sheet_of
from eqvision.recipes import SegmentationConfig
from eqvision.segmentation_pictures import draw_labels, enlarged, legend
from eqvision.train import set_up
from eqvision.types import IGNORE_LABEL, SegmentationBatch
from eqvision.viz import host_batch, weight_text
from eqvision.viz_detection import smaller, striped

COLUMNS = 4  # of the sheet, two for each image


class TrainingPixels(NamedTuple):
    """The first rows of a batch as the model sees them, with the class of each pixel."""

    images: UInt8[np.ndarray, "b h w c"]
    labels: Int[np.ndarray, "b h w"]
    sizes: Int[np.ndarray, "b 2"]
    """Height and width of the part that is image."""
    weights: Float[np.ndarray, " b"]
    indices: Int[np.ndarray, " b"]
    class_names: tuple[str, ...]
    descriptions: tuple[str, ...]
    size: int
    """Of the whole batch."""


def segmentation_batch(config: SegmentationConfig, step: int, count: int) -> TrainingPixels:
    """The first ``count`` rows of the batch of ``step`` (from 1, as in metrics.csv), with their labels.

    Raises ValueError for a step or count below 1, and what training raises for a configuration that does not fit.
    """
    if step < 1 or count < 1:
        raise ValueError(f"step={step}, count={count}; steps are counted from 1, and at least one image is drawn")
    setup = set_up(config)
    batch: SegmentationBatch = host_batch(setup, step)
    source, columns = setup.problem.source, (batch.images, batch.labels, batch.size, batch.weights, batch.indices)
    images, labels, sizes, weights, indices = (np.asarray(column)[:count] for column in columns)
    descriptions = tuple(source.describe(int(index)) for index in indices)
    names = tuple(source.class_names)
    return TrainingPixels(images, labels, sizes, weights, indices, names, descriptions, len(batch.images))


def draw_segmentation_batch(batch: TrainingPixels, path: Path, title: str) -> Path:
    """A grid of the images, each beside itself under the colours of its classes, above a legend of these; padding is
    striped, void pixels are darkened, and titles give sizes, the share of void and weights that are not 1.

    The model sees black where there are stripes.
    """
    from PIL import Image

    rows = range(len(batch.images))
    cells = [cell for row in rows for cell in _cells(batch, row)]
    sheet = sheet_of(cells, columns=min(COLUMNS, len(cells)))
    seen = sorted({int(k) for row in rows for k in np.unique(_inside(batch.labels[row], batch.sizes[row]))})
    sheet = np.concatenate([sheet, legend(seen, batch.class_names, width=sheet.shape[1])])
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(headed(sheet, title)).save(path)
    return path


def _inside(labels: Int[np.ndarray, "h w"], size: Int[np.ndarray, "2"]) -> Int[np.ndarray, "h2 w2"]:
    """Without padding."""
    return labels[: int(size[0]), : int(size[1])]


def _cells(batch: TrainingPixels, row: int) -> list[UInt8[np.ndarray, "_ _ 3"]]:
    """The image with a title, and its labels."""
    image, labels, (height, width) = batch.images[row], batch.labels[row], (int(n) for n in batch.sizes[row])
    padded = f" in {image.shape[0]}x{image.shape[1]}" if (height, width) != image.shape[:2] else ""
    void = float((_inside(labels, batch.sizes[row]) == IGNORE_LABEL).mean())
    weight = weight_text(float(batch.weights[row])).replace("\n", ", ")
    tinted = draw_labels(image, labels, batch.class_names, least_side=1)
    plain, tinted = (_shown(pixels, height, width) for pixels in (colored(image), tinted))
    return [
        captioned(plain, f"{batch.descriptions[row]}: {height}x{width}{padded}{weight}"),
        captioned(tinted, f"labels, {void:.1%} void"),
    ]


def _shown(pixels: UInt8[np.ndarray, "h w 3"], height: int, width: int) -> UInt8[np.ndarray, "h2 w2 3"]:
    return enlarged(smaller(striped(pixels, height, width))[0], LEAST_SIDE)
