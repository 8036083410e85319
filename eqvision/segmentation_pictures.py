"""Pictures of classes in images, beside the true ones and with a legend, and of which classes are taken for which."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Integer, UInt8

from eqvision.detection_pictures import GAP, LEAST_SIDE, captioned, class_color, colored, plots_figure, sheet_of
from eqvision.metrics import SegmentationMetric
from eqvision.types import IGNORE_LABEL

SHARE = 0.6  # of the class's colour in a pixel
UNCOLORED = ("background",)  # classes that keep the colours of the image
FEW = 24  # classes up to which the table of confusion has numbers
MOST_ROWS = 60  # of classes in the table of confusion; of more, those with most pixels
WRONG = (255, 0, 0)


class LabelPair(NamedTuple):
    """One image with the classes that were found for its pixels and the true ones (255 void), and a line of text."""

    image: UInt8[np.ndarray, "h w c"]
    found: Integer[np.ndarray, "h w"]
    truth: Integer[np.ndarray, "h w"]
    title: str = ""


def draw_labels(
    image: UInt8[np.ndarray, "h w c"],
    labels: Integer[np.ndarray, "h w"],
    class_names: Sequence[str],
    *,
    least_side: int = LEAST_SIDE,
) -> UInt8[np.ndarray, "height width 3"]:
    """The image under the colours of its classes; a class named background has none, and void pixels are darkened.

    An image whose longer side is below ``least_side`` is enlarged by a whole number. Raises ValueError for labels
    without a name, and of another size than the image.
    """
    _check(image, labels, class_names)
    pixels, table = colored(image).astype(np.float32), _palette(class_names)
    tinted = np.isin(labels, [k for k, name in enumerate(class_names) if name in UNCOLORED], invert=True)
    mixed = np.where(tinted[..., None], (1 - SHARE) * pixels + SHARE * table[labels], pixels)
    return enlarged(np.rint(mixed).astype(np.uint8), least_side)


def draw_errors(
    image: UInt8[np.ndarray, "h w c"],
    found: Integer[np.ndarray, "h w"],
    truth: Integer[np.ndarray, "h w"],
    *,
    least_side: int = LEAST_SIDE,
) -> UInt8[np.ndarray, "height width 3"]:
    """The image in grey, red where a pixel has the wrong class, darkened where it is void."""
    grey = colored(image).astype(np.float32).mean(axis=-1, keepdims=True).repeat(3, axis=-1)
    void = _void(truth)[..., None]
    wrong = (found != truth)[..., None] & ~void
    mixed = np.where(wrong, 0.3 * grey + 0.7 * np.array(WRONG, np.float32), np.where(void, 0.4 * grey, grey))
    return enlarged(np.rint(mixed).astype(np.uint8), least_side)


def draw_label_pairs(
    pairs: Sequence[LabelPair], class_names: Sequence[str], path: Path, *, least_side: int = LEAST_SIDE
) -> Path:
    """A PNG with a line for each image: the image, what was found, what is true, and in red what is wrong.

    Below stands a legend of the classes that occur. Raises ValueError for no pair, and as ``draw_labels`` does.
    """
    if not pairs:
        raise ValueError("there are no images to draw; expected at least one pair.")
    from PIL import Image

    cells = [cell for pair in pairs for cell in _line(pair, class_names, least_side)]
    sheet = sheet_of(cells, columns=4)
    seen = sorted({int(k) for pair in pairs for labels in (pair.found, pair.truth) for k in np.unique(labels)})
    picture = np.concatenate([sheet, legend(seen, class_names, width=sheet.shape[1])])
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
    return path


def legend(labels: Sequence[int], class_names: Sequence[str], *, width: int) -> UInt8[np.ndarray, "height {width} 3"]:
    """Names beside squares of their colours, in as many lines as they need; ``IGNORE_LABEL`` is void."""
    from PIL import Image, ImageDraw, ImageFont

    font, side, table = ImageFont.load_default(18), 20, _palette(class_names)
    places, x, y = [], GAP, 0
    for label in labels:
        name = "void" if label == IGNORE_LABEL else class_names[label]
        needed = side + 8 + round(font.getlength(name)) + 24
        if x > GAP and x + needed > width:
            x, y = GAP, y + side + 10
        places.append((x, y, label, name))
        x += needed
    picture = Image.new("RGB", (width, y + side + GAP), "white")
    draw = ImageDraw.Draw(picture)
    for x, y, label, name in places:
        plain = name in UNCOLORED
        fill = "white" if plain else tuple(int(part) for part in table[label])
        draw.rectangle((x, y, x + side, y + side), fill=fill, outline="black")
        draw.text((x + side + 8, y), name, font=font, fill="black")
    return np.asarray(picture)


def plot_pixel_confusion(metric: SegmentationMetric, path: Path, *, title: str = "") -> Path:
    """Which share of each true class (row) was taken for which (column), in percent, and the IoU of each class.

    Of more than ``MOST_ROWS`` classes, those with most pixels; numbers where there are at most ``FEW``.
    """
    chosen = _rows(metric)
    shares = _shares(metric)[np.ix_(chosen, chosen)]
    few, side = len(chosen) <= FEW, 2.2 + (0.5 if len(chosen) <= FEW else 0.16) * len(chosen)
    figure = plots_figure(side + 2.2, side)
    axes = figure.subplots()
    drawn = axes.imshow(np.nan_to_num(shares), cmap="Blues", vmin=0, vmax=100)
    if few:
        _numbers(axes, shares)
    iou = 100 * metric.per_class()["iou"][chosen]
    names = [metric.class_names[k] for k in chosen]
    size = 9 if few else 5
    axes.set_xticks(range(len(chosen)), names, rotation=60, ha="right", fontsize=size)
    rows = [f"{name} ({'-' if np.isnan(value) else f'{value:.1f}'})" for name, value in zip(names, iou, strict=True)]
    axes.set_yticks(range(len(chosen)), rows, fontsize=size)
    axes.set(xlabel="predicted", ylabel="true (IoU in percent)")
    axes.set_title(title or _headline(metric, len(chosen)), fontsize=11)
    figure.colorbar(drawn, label="percent of the true class", shrink=0.8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _headline(metric: SegmentationMetric, shown: int) -> str:
    total = metric.compute()
    left_out = len(metric.class_names) - shown
    figures = f"mean IoU {100 * total['mean_iou']:.1f}, pixel accuracy {100 * total['pixel_accuracy']:.1f}"
    return figures + (f"; {left_out} rarer classes not shown" if left_out else "")


def _rows(metric: SegmentationMetric) -> list[int]:
    order = np.argsort(-metric.counts.sum(axis=1), kind="stable")[:MOST_ROWS]
    return sorted(order.tolist())


def _shares(metric: SegmentationMetric) -> np.ndarray:
    totals = metric.counts.sum(axis=1, keepdims=True)
    return np.divide(100 * metric.counts, totals, out=np.full(metric.counts.shape, np.nan), where=totals != 0)


def _numbers(axes: Any, shares: np.ndarray) -> None:
    for (i, j), share in np.ndenumerate(shares):
        if share >= 0.5:  # what would be rounded to 0 says nothing
            color = "white" if share > 50 else "black"
            axes.text(j, i, f"{share:.0f}", ha="center", va="center", color=color, fontsize=8)


def _line(pair: LabelPair, class_names: Sequence[str], least_side: int) -> list[UInt8[np.ndarray, "_ _ 3"]]:
    counted = ~_void(pair.truth)
    right = float((pair.found == pair.truth)[counted].mean()) if counted.any() else float("nan")
    return [
        captioned(enlarged(colored(pair.image), least_side), pair.title or "image"),
        captioned(draw_labels(pair.image, pair.found, class_names, least_side=least_side), "found"),
        captioned(draw_labels(pair.image, pair.truth, class_names, least_side=least_side), "true"),
        captioned(
            draw_errors(pair.image, pair.found, pair.truth, least_side=least_side), f"wrong: {100 * (1 - right):.1f} %"
        ),
    ]


def enlarged(pixels: UInt8[np.ndarray, "h w 3"], least_side: int) -> UInt8[np.ndarray, "height width 3"]:
    """Times a whole number, so that the longer side is at least ``least_side``."""
    factor = max(1, -(-least_side // max(pixels.shape[:2])))
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def _palette(class_names: Sequence[str]) -> np.ndarray:
    """The colour of each label; void is black."""
    table = np.zeros((256, 3), np.float32)
    table[: len(class_names)] = [class_color(k) for k in range(len(class_names))]
    return table


def _void(labels: np.ndarray) -> Bool[np.ndarray, "h w"]:
    return labels == IGNORE_LABEL


def _check(image: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> None:
    if labels.shape != image.shape[:2]:
        raise ValueError(f"labels are {labels.shape} and the image {image.shape[:2]} (height, width); expected equal.")
    wrong = labels[~_void(labels) & ((labels < 0) | (labels >= len(class_names)))]
    if wrong.size:
        raise ValueError(f"label {int(wrong[0])} has no name among {len(class_names)} classes.")
