"""Pictures of objects in images, boxes with names, scores and masks, and of what a detector's figures are made of."""

import colorsys
import math
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Num, UInt8

from eqvision.metrics import CocoResult
from eqvision.report import new_figure

GOLDEN = 0.618034  # steps of the golden ratio round the circle of hues keep any number of colours apart
MASK_SHARE = 0.45  # of the mask's colour in a pixel
LEAST_SIDE = 320  # smaller images are enlarged so that names can be read
MOST_PLATES = 30  # of objects in one picture; more would hide it
MOST_CLASSES = 40  # of bars in one plot
MOST_CURVES = 10
GAP = 12  # white pixels between the images of a sheet


class DrawnObjects(NamedTuple):
    """Objects to draw in one image: boxes xyxy in its pixels, class indices, perhaps scores and masks [h w]."""

    boxes: Num[np.ndarray, "n 4"]
    labels: Int[np.ndarray, " n"]
    scores: Float[np.ndarray, " n"] | None = None
    masks: Sequence[Bool[np.ndarray, "h w"] | UInt8[np.ndarray, "h w"]] | None = None


class Sample(NamedTuple):
    """One image with the objects to draw in it, and a line of text for above it."""

    image: UInt8[np.ndarray, "h w c"]
    objects: DrawnObjects
    title: str = ""


class Pair(NamedTuple):
    """One image with what was found in it and what is there."""

    image: UInt8[np.ndarray, "h w c"]
    found: DrawnObjects
    truth: DrawnObjects
    title: str = ""


def confident(objects: DrawnObjects, least_score: float = 0.5) -> DrawnObjects:
    """Those of at least that score. A detector gives a fixed number of objects, most of them of low score; figures
    need all of them, pictures do not. Raises ValueError for objects without scores.
    """
    if objects.scores is None:
        raise ValueError("the objects have no scores; expected those that a detector gave.")
    kept = np.flatnonzero(objects.scores >= least_score)
    masks = None if objects.masks is None else [objects.masks[int(i)] for i in kept]
    return DrawnObjects(objects.boxes[kept], objects.labels[kept], objects.scores[kept], masks)


def class_color(label: int) -> tuple[int, int, int]:
    """The colour of a class, red, green and blue in 0..255: the same in every picture, bright enough for dark text."""
    hue, cycle = (label * GOLDEN) % 1.0, label // 12 % 3
    color = colorsys.hsv_to_rgb(hue, (0.85, 0.6, 0.95)[cycle], (1.0, 1.0, 0.85)[cycle])
    red, green, blue = (round(255 * part) for part in color)
    return red, green, blue


def draw_objects(
    image: UInt8[np.ndarray, "h w c"],
    objects: DrawnObjects,
    class_names: Sequence[str],
    *,
    least_side: int = LEAST_SIDE,
) -> UInt8[np.ndarray, "height width 3"]:
    """The image in colour with masks (translucent, with outlines), boxes, and names with scores on plates.

    Colours are those of classes; where there are masks of a single class, every object has another, and no plate says
    its name. More than ``MOST_PLATES`` objects have thin boxes and no plates, which would hide the image. The best
    score is drawn last, on top. An image whose longer side is below ``least_side`` is enlarged by a whole number.
    Plates stay inside the picture. Raises ValueError for labels without a name and masks of another size.
    """
    _check(image, objects, class_names)
    from PIL import Image, ImageDraw

    factor = max(1, math.ceil(least_side / max(image.shape[:2])))
    pixels = colored(image).repeat(factor, axis=0).repeat(factor, axis=1)
    colors, width = _colors(objects, class_names), max(2, round(max(pixels.shape) / 320))
    canvas = Image.fromarray(_blend(pixels, objects, colors, factor, max(1, width // 2)))
    draw, font = ImageDraw.Draw(canvas), _font(canvas.size)
    order, many = _order(objects), len(colors) > MOST_PLATES
    line = max(1, width // 2) if many else width
    for i in order:
        box = _inside(np.asarray(objects.boxes[i], np.float64) * factor, canvas.size, line)
        draw.rectangle(box, outline=colors[i], width=line)
    for i in [] if many else order:
        text = _text(objects, i, class_names)
        if text:
            _plate(draw, font, np.asarray(objects.boxes[i], np.float64) * factor, text, colors[i], canvas.size)
    return np.asarray(canvas)


def draw_pairs(pairs: Sequence[Pair], class_names: Sequence[str], path: Path, *, least_side: int = LEAST_SIDE) -> Path:
    """A PNG with two columns: what was found on the left, what is there on the right; one image a line.

    Raises ValueError for no pair, and what ``draw_objects`` raises.
    """
    samples = []
    for pair in pairs:
        for objects, name in ((pair.found, "found"), (pair.truth, "true")):
            title = f"{pair.title}  {name}: {len(objects.labels)}".strip()
            samples.append(Sample(pair.image, objects, title))
    return draw_samples(samples, class_names, path, columns=2, least_side=least_side)


def draw_samples(
    samples: Sequence[Sample],
    class_names: Sequence[str],
    path: Path,
    *,
    columns: int = 4,
    least_side: int = LEAST_SIDE,
    title: str = "",
) -> Path:
    """A PNG of images with their objects, row by row, each under its title; ``title`` stands above all, in lines.

    Raises ValueError for no image and fewer than one column, and what ``draw_objects`` raises.
    """
    if not samples or columns < 1:
        raise ValueError(f"{len(samples)} images in {columns} columns; expected at least one of each.")
    from PIL import Image

    sheet = sheet_of([_cell(sample, class_names, least_side) for sample in samples], columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(headed(sheet, title) if title else sheet).save(path)
    return path


def sheet_of(cells: Sequence[UInt8[np.ndarray, "_ _ 3"]], columns: int) -> UInt8[np.ndarray, "height width 3"]:
    """Pictures row by row on white; columns and rows are as wide and high as their largest picture."""
    lines = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    widths = [max(line[k].shape[1] for line in lines if k < len(line)) for k in range(len(lines[0]))]
    heights = [max(cell.shape[0] for cell in line) for line in lines]
    sheet = np.full((sum(heights) + GAP * (len(heights) + 1), sum(widths) + GAP * (len(widths) + 1), 3), 255, np.uint8)
    for row, line in enumerate(lines):
        for column, cell in enumerate(line):
            y, x = GAP * (row + 1) + sum(heights[:row]), GAP * (column + 1) + sum(widths[:column])
            sheet[y : y + cell.shape[0], x : x + cell.shape[1]] = cell
    return sheet


def plot_precision_recall(result: CocoResult, path: Path, *, title: str = "") -> Path:
    """Left: the mean over classes at several overlaps. Right: the classes of most objects, at an overlap of 0.5."""
    figure = plots_figure(12.0, 4.6)
    left, right = figure.subplots(1, 2)
    known = np.flatnonzero(result.objects > 0)
    for threshold in (0.5, 0.75, 0.9, None):
        name = "mean of 0.5 to 0.95" if threshold is None else f"overlap {threshold:g}"
        _curve(left, result, result.curves(threshold)[:, known].mean(axis=1) if known.size else None, name)
    for k in sorted(known, key=lambda k: (-result.objects[k], k))[:MOST_CURVES]:
        color = np.array(class_color(int(k))) / 255 * 0.85
        _curve(right, result, result.curves(0.5)[:, k], _short(result.class_names[k], 18), color)
    shown = min(MOST_CURVES, len(known))
    for axes, name in ((left, "mean over classes"), (right, f"overlap 0.5: {shown} of {len(known)} classes")):
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision", title=name)
        axes.grid(alpha=0.3)
        if axes.lines:
            beside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if axes is right else {"loc": "best"}
            axes.legend(fontsize=8, **beside)
    figure.suptitle(title)
    return _save(figure, path)


def plot_class_ap(result: CocoResult, path: Path, *, title: str = "") -> Path:
    """Bars of AP, and AP50 behind them, for each class with objects, best first; the best and worst 20 of many."""
    figure = plots_figure(8.0, 1.6 + 0.26 * min(MOST_CLASSES, max(1, int((result.objects > 0).sum()))))
    axes = figure.subplots()
    whole, half = 100 * result.class_ap(), 100 * result.class_ap(0.5)
    order = [k for k in np.argsort(-np.nan_to_num(whole, nan=-1.0), kind="stable") if result.objects[k] > 0]
    shown = order if len(order) <= MOST_CLASSES else order[: MOST_CLASSES // 2] + order[-MOST_CLASSES // 2 :]
    places = np.arange(len(shown))
    axes.barh(places, half[shown], color="#c6d8ec", label="AP50")
    axes.barh(places, whole[shown], color="#2b6cb0", height=0.5, label="AP")
    for place, k in zip(places, shown, strict=True):
        axes.text(half[k] + 0.8, place, f"{whole[k]:.1f}, {half[k]:.1f}", va="center", fontsize=8)
    axes.set_yticks(places, [f"{_short(result.class_names[k], 24)} ({result.objects[k]})" for k in shown], fontsize=8)
    axes.set(xlim=(0, 116), ylim=(len(shown) - 0.4, -0.6), xlabel="AP, AP50 in percent; in brackets: objects")
    left_out = f", {len(order) - len(shown)} in the middle left out" if len(shown) < len(order) else ""
    axes.set_title((title or "AP of each class") + left_out, fontsize=11)
    axes.legend(fontsize=8, loc="lower right")
    return _save(figure, path)


# Objects


def _check(image: np.ndarray, objects: DrawnObjects, class_names: Sequence[str]) -> None:
    wrong = objects.labels[(objects.labels < 0) | (objects.labels >= len(class_names))]
    if wrong.size:
        raise ValueError(f"label {int(wrong[0])} has no name among {len(class_names)} classes.")
    for mask in objects.masks or ():
        if mask.shape != image.shape[:2]:
            raise ValueError(f"a mask is {mask.shape} and the image {image.shape[:2]} (height, width); expected equal.")


def _order(objects: DrawnObjects) -> list[int]:
    """Worst score first, so that the best lies on top; without scores as given."""
    if objects.scores is None:
        return list(range(len(objects.labels)))
    return np.argsort(objects.scores, kind="stable").tolist()


def colored(image: UInt8[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h w 3"]:
    """Red, green and blue, of a grey image too."""
    return np.repeat(image[..., :1], 3, axis=-1) if image.shape[-1] < 3 else image[..., :3]


def _by_instance(objects: DrawnObjects, class_names: Sequence[str]) -> bool:
    """Masks of a single class: what tells them apart is which object they are."""
    return objects.masks is not None and len(class_names) == 1


def _colors(objects: DrawnObjects, class_names: Sequence[str]) -> list[tuple[int, int, int]]:
    """Of each object."""
    alone = _by_instance(objects, class_names)
    return [class_color(number if alone else int(label)) for number, label in enumerate(objects.labels)]


def _blend(
    pixels: UInt8[np.ndarray, "h w 3"],
    objects: DrawnObjects,
    colors: Sequence[tuple[int, int, int]],
    factor: int,
    width: int,
) -> UInt8[np.ndarray, "h w 3"]:
    """Masks, ``factor`` times enlarged as the image was, with outlines of that width."""
    if objects.masks is None:
        return pixels
    order, masks = _order(objects), objects.masks
    return blend_masks(pixels, (masks[i] for i in order), [colors[i] for i in order], factor=factor, width=width)


def blend_masks(
    pixels: UInt8[np.ndarray, "h w 3"],
    masks: Iterable[Bool[np.ndarray, "_ _"] | UInt8[np.ndarray, "_ _"]],
    colors: Sequence[tuple[int, int, int]],
    *,
    factor: int = 1,
    width: int = 1,
) -> UInt8[np.ndarray, "h w 3"]:
    """The picture under masks, translucent with outlines of ``width`` pixels, the last on top.

    The picture is ``factor`` times as large as the masks are.
    """
    mixed = pixels.astype(np.float32)
    for mask, color in zip(masks, np.array(colors, np.float32).reshape(-1, 3), strict=True):
        rows, columns, inside = _enlarged(np.asarray(mask) != 0, factor)
        part = mixed[rows, columns]
        part[inside] += MASK_SHARE * (color - part[inside])
        part[inside & ~_shrunk(inside, width)] = color
    return np.rint(mixed).astype(np.uint8)


def _enlarged(mask: Bool[np.ndarray, "h w"], factor: int) -> tuple[slice, slice, Bool[np.ndarray, "rows columns"]]:
    """Where the mask lies in the enlarged picture, and what it is there."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    if not rows.size:
        return slice(0), slice(0), np.zeros((0, 0), bool)
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    inside = mask[top:bottom, left:right].repeat(factor, axis=0).repeat(factor, axis=1)
    return slice(top * factor, bottom * factor), slice(left * factor, right * factor), inside


def _shrunk(mask: Bool[np.ndarray, "h w"], width: int) -> Bool[np.ndarray, "h w"]:
    """Without its outline: what has only pixels of the mask beside it."""
    for _ in range(width):
        around = np.pad(mask, 1)
        mask = mask & around[2:, 1:-1] & around[:-2, 1:-1] & around[1:-1, 2:] & around[1:-1, :-2]
    return mask


def _inside(box: np.ndarray, size: tuple[int, int], width: int) -> tuple[float, float, float, float]:
    """The box with its corners in the picture and in order, and never thinner than its line."""
    last = np.array(size, np.float64) - 1
    low = np.clip(box[:2], 0, last)
    high = np.maximum(np.clip(box[2:], 0, last), np.minimum(low + width, last))
    return float(low[0]), float(low[1]), float(high[0]), float(high[1])


def _text(objects: DrawnObjects, i: int, class_names: Sequence[str]) -> str:
    name = "" if _by_instance(objects, class_names) else _short(class_names[int(objects.labels[i])], 24)
    return name if objects.scores is None else f"{name} {objects.scores[i]:.2f}".lstrip()


def _plate(
    draw: Any, font: Any, box: np.ndarray, text: str, color: tuple[int, int, int], size: tuple[int, int]
) -> None:
    """Above the box; where there is no room, in a large box or below a small one; always inside the picture."""
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + 6, bottom - top + 4
    low = box[1] if box[3] - box[1] > 3 * height else box[3] + 2
    y = box[1] - height if box[1] >= height else low
    x, y = max(0.0, min(float(box[0]), size[0] - width)), max(0.0, min(float(y), size[1] - height))
    draw.rectangle((x, y, x + width - 1, y + height - 1), fill=color)
    draw.text((x + 3 - left, y + 2 - top), text, font=font, fill=_ink(color))


def _ink(color: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever is farther from the colour in brightness (weights of ITU-R BT.601)."""
    brightness = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    return (0, 0, 0) if brightness > 110 else (255, 255, 255)


def _font(size: tuple[int, int]) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(max(12, min(28, round(max(size) / 36))))


# Sheets and plots


def plots_figure(width: float, height: float) -> Any:
    """An empty figure. Raises ImportError, which says what to install, without matplotlib."""
    try:
        return new_figure(width, height)
    except ModuleNotFoundError as error:
        raise ImportError(f"plots need matplotlib ({error}): pip install 'eqvision[plots]'") from error


def headed(sheet: UInt8[np.ndarray, "h w 3"], title: str) -> UInt8[np.ndarray, "height w2 3"]:
    """The sheet under a title, which is wrapped where it is wider."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(20)
    per_letter = max(font.getlength(line) / len(line) for line in title.splitlines())
    most = max(10, int(0.9 * (sheet.shape[1] - 2 * GAP) / per_letter))  # letters; lines are not all equally wide
    lines = [part for line in title.splitlines() for part in textwrap.wrap(line, most)]
    head = Image.new("RGB", (sheet.shape[1], 26 * len(lines) + GAP), "white")
    ImageDraw.Draw(head).multiline_text((GAP, GAP), "\n".join(lines), font=font, fill="black", spacing=6)
    return np.concatenate([np.asarray(head), sheet])


def _cell(sample: Sample, class_names: Sequence[str], least_side: int) -> UInt8[np.ndarray, "height width 3"]:
    """The image with its objects under a line of text."""
    return captioned(draw_objects(sample.image, sample.objects, class_names, least_side=least_side), sample.title)


def captioned(pixels: UInt8[np.ndarray, "h w 3"], text: str) -> UInt8[np.ndarray, "height w 3"]:
    """The picture under a line of text."""
    from PIL import Image, ImageDraw

    drawn = Image.fromarray(pixels)
    font = _font(drawn.size)
    head = round(font.size) + 10
    sheet = Image.new("RGB", (drawn.width, drawn.height + head), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((0, 2), _fitting(draw, font, text, drawn.width), font=font, fill="black")
    sheet.paste(drawn, (0, head))
    return np.asarray(sheet)


def _fitting(draw: Any, font: Any, text: str, width: int) -> str:
    """The text without as much of its beginning as does not fit: counts stand at the end."""
    while text and draw.textlength(text, font=font) > width:
        text = "…" + text.lstrip("…")[1:] if len(text) > 1 else ""
    return text


def _curve(axes: Any, result: CocoResult, values: np.ndarray | None, name: str, color: Any = None) -> None:
    if values is not None and not np.isnan(values).all():
        axes.plot(result.recalls, values, label=f"{name}: {100 * values.mean():.1f}", color=color, linewidth=1.6)


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
