"""Pictures of what a model says of images: names or texts with scores, and images against captions as a matrix."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from eqvision.detection_pictures import colored, plots_figure, sheet_of
from eqvision.segmentation_pictures import enlarged

SIDE = 200  # pixels of the longer side of an image in a picture, at least
RIGHT, WRONG = (0, 110, 0), (190, 0, 0)
LETTERS = 34  # in a line of text beside an image


class SaidOfImage(NamedTuple):
    """One image, what was found for it with scores, best first, and all that would have been right."""

    image: UInt8[np.ndarray, "h w c"]
    found: tuple[str, ...]
    scores: tuple[float, ...]
    truth: tuple[str, ...]


def draw_said(said: Sequence[SaidOfImage], path: Path, *, columns: int = 2) -> Path:
    """A PNG with each image beside what was found for it, green where right; the truth stands below what is wrong.

    Raises ValueError for no image.
    """
    if not said:
        raise ValueError("there are no images to draw; expected at least one.")
    from PIL import Image

    cells = [cell for each in said for cell in (_fitted(each.image), _words(each))]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet_of(cells, columns=2 * columns)).save(path)
    return path


def _fitted(image: UInt8[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h2 w2 3"]:
    """In colour, at least ``SIDE`` and less than twice as long."""
    pixels = colored(np.ascontiguousarray(image))
    step = max(1, max(pixels.shape[:2]) // SIDE)
    return enlarged(np.ascontiguousarray(pixels[::step, ::step]), SIDE)


def _words(said: SaidOfImage) -> UInt8[np.ndarray, "h w 3"]:
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(16)
    lines = [line for k in range(len(said.found)) for line in _answer(said, k)]
    if said.found[0] not in said.truth:
        lines += [(line, (0, 0, 0)) for line in textwrap.wrap(f"true: {said.truth[0]}", LETTERS)]
    picture = Image.new("RGB", (LETTERS * 9, max(SIDE, 22 * len(lines))), "white")
    draw = ImageDraw.Draw(picture)
    for place, (line, color) in enumerate(lines):
        draw.text((0, 22 * place), line, font=font, fill=color)
    return np.asarray(picture)


def _answer(said: SaidOfImage, place: int) -> list[tuple[str, tuple[int, int, int]]]:
    color = RIGHT if said.found[place] in said.truth else WRONG if place == 0 else (120, 120, 120)
    text = f"{said.scores[place]:.2f}  {said.found[place]}"
    return [(line, color) for line in textwrap.wrap(text, LETTERS, subsequent_indent="      ")]


def plot_similarities(
    images: Sequence[UInt8[np.ndarray, "_ _ _"]],
    captions: Sequence[str],
    similarities: Float[np.ndarray, "n m"],
    path: Path,
    *,
    title: str = "cosine of each image and each caption",
) -> Path:
    """A PNG of a matrix: images on top, captions on the left. Raises ValueError for numbers that do not fit together,
    ImportError without matplotlib."""
    if similarities.shape != (len(images), len(captions)) or not similarities.size:
        raise ValueError(
            f"similarities have shape {similarities.shape} for {len(images)} images and {len(captions)} captions"
        )
    figure = plots_figure(4.5 + 0.8 * len(images), 1.8 + 0.75 * len(captions))
    grid = figure.add_gridspec(2, len(images), height_ratios=(1.0, len(captions)))
    for place, image in enumerate(images):
        axes = figure.add_subplot(grid[0, place])
        axes.imshow(colored(np.ascontiguousarray(image)), interpolation="nearest")
        axes.axis("off")
    axes = figure.add_subplot(grid[1, :])
    drawn = axes.imshow(similarities.T, cmap="viridis", aspect="auto")
    middle = (similarities.max() + similarities.min()) / 2
    for (i, j), value in np.ndenumerate(similarities):
        color = "white" if value < middle else "black"
        axes.text(i, j, f"{value:.2f}", ha="center", va="center", color=color, fontsize=8)
    axes.set_xticks([])
    axes.set_yticks(range(len(captions)), ["\n".join(textwrap.wrap(text, LETTERS)[:3]) for text in captions])
    figure.colorbar(drawn, ax=axes, shrink=0.8)
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
