"""Models that give masks for prompts (Segment Anything), used on image files: weights, prompts, pictures, JSON."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import equinox as eqx
import numpy as np
from jaxtyping import Bool, UInt8

from eqvision.data import decode_image
from eqvision.data.detection import UncompressedRLE, decode_mask, encode_uncompressed
from eqvision.detection_pictures import blend_masks, class_color, colored, sheet_of
from eqvision.evaluators.console import progress_bar
from eqvision.predict import free_name, newest_state, require_file
from eqvision.pretrained.assemble import Sizes
from eqvision.pretrained.cards.card import IMAGENET_MEAN, IMAGENET_STD
from eqvision.pretrained.errors import WeightsError
from eqvision.pretrained.load import read_model
from eqvision.pretrained.locate import locate
from eqvision.problems.prompted import build_prompted
from eqvision.recipes import PromptedConfig
from eqvision.run_folder import RunFolder
from eqvision.segmenters.sam import MaskSearch, Predictor, count_points, find_masks
from eqvision.zoo import PROMPTED, row_of

Size = tuple[int, int]
Choice = Literal["auto", "three", "best", "one"]
LEAST_SIDE = 480  # smaller images are enlarged, so that points can be told from each other
IN, OUT, BOX = (40, 200, 60), (225, 45, 40), (255, 200, 0)  # colours of prompts


class Prompt(NamedTuple):
    """What asks for a mask, in pixels of the upright image: points x, y with 1 (inside the object) or 0 (outside),
    a box x1, y1, x2, y2, or both."""

    points: tuple[tuple[float, float, int], ...] = ()
    box: tuple[float, float, float, float] | None = None


class MaskFound(NamedTuple):
    """One mask as run lengths, the IoU with the object that the model expects, and what else is known of it."""

    run_lengths: UncompressedRLE
    iou: float
    stability: float | None = None
    point: tuple[float, float] | None = None
    """Which point of a grid asked for it."""


class ImageMasks(NamedTuple):
    """Masks in one image of ``size`` (height, width), the most trusted first; ``prompt`` None: everything was asked
    for."""

    path: Path
    size: Size
    prompt: Prompt | None
    masks: tuple[MaskFound, ...]
    seconds: float


# The model


def load_predictor(
    name: str,
    source: str | Path | None = None,
    *,
    layout: str | None = None,
    prompts_per_batch: int = 1,
    max_points: int = 8,
) -> Predictor:
    """The zoo's ``name`` with published weights, ready for images.

    Raises what ``eqvision.load`` raises, ValueError for a model that takes no prompts, and WeightsError where
    ``preprocessor_config.json`` beside the file asks for other images than SAM's.
    """
    require_prompted(name)
    location = locate(name, source)
    loaded = read_model(name, location.path, Sizes(), layout=layout or location.layout)
    predictor = Predictor(loaded.model, loaded.state, prompts_per_batch=prompts_per_batch, max_points=max_points)
    _check_preprocessing(location.path, predictor.side)
    return predictor


class PromptedRun(NamedTuple):
    """A model with prompts with all that is needed to use it."""

    config: PromptedConfig
    model: Any
    stats: eqx.nn.State
    step: int


def load_prompted_run(path: str | Path) -> PromptedRun:
    """The newest good checkpoint of a run; the average of the parameters, where the run keeps one.

    Raises RunFolderError where the folder is none, is of another kind or holds no checkpoint yet, and CheckpointError.
    """
    folder = RunFolder(path)
    config = folder.prompted()
    restored = newest_state(folder, config, lambda: build_prompted(config))
    state = restored.state
    return PromptedRun(config, state.evaluated, state.stats, restored.record.step)


def run_predictor(path: str | Path, *, prompts_per_batch: int = 1, max_points: int = 8) -> Predictor:
    """The model of a run, ready for images, as ``load_predictor`` gives published weights.

    Raises what ``load_prompted_run`` raises, ValueError for a run whose images are normalised otherwise than SAM's.
    """
    run = load_prompted_run(path)
    seen = tuple(run.config.data.mean), tuple(run.config.data.std)
    if seen != (IMAGENET_MEAN, IMAGENET_STD):
        raise ValueError(
            f"{path} was trained with --data.mean, --data.std {seen}, and images are prepared with {IMAGENET_MEAN}, "
            f"{IMAGENET_STD} here"
        )
    return Predictor(run.model, run.stats, prompts_per_batch=prompts_per_batch, max_points=max_points)


def require_prompted(name: str) -> None:
    """Raise ValueError for models that take no prompts, UnknownNameError for names of none."""
    row_of(name)
    if name not in PROMPTED:
        raise ValueError(f"model {name!r} takes no prompts; those that do are {', '.join(PROMPTED)}")


def _check_preprocessing(path: Path, side: int) -> None:
    """Raises WeightsError for a ``preprocessor_config.json`` that tells of other images than are prepared here."""
    file = (path if path.is_dir() else path.parent) / "preprocessor_config.json"
    if not file.is_file():
        return
    config = json.loads(file.read_text())
    size = config.get("size", {})
    expected = {
        "image_mean": (config.get("image_mean"), list(IMAGENET_MEAN)),
        "image_std": (config.get("image_std"), list(IMAGENET_STD)),
        "size.longest_edge": (size.get("longest_edge") if isinstance(size, dict) else size, side),
    }
    for name, (theirs, ours) in expected.items():
        if theirs is not None and theirs != ours:
            raise WeightsError(f"{file} has {name} {theirs}, and images are prepared with {ours} here")


# Prompts


def check_prompt(prompt: Prompt) -> None:
    """Raise ValueError for no prompt at all, and for labels of points that are neither 1 nor 0."""
    if not prompt.points and prompt.box is None:
        raise ValueError(
            "no prompt: give points (--prompt-points X Y LABEL ..., label 1 inside the object, 0 outside), a box "
            "(--prompt-box X1 Y1 X2 Y2), or ask for everything (--everything)"
        )
    for x, y, label in prompt.points:
        if label not in (0, 1):
            raise ValueError(f"the point ({x:g}, {y:g}) has label {label}; expected 1 inside the object or 0 outside")


def masks_of(predictor: Predictor, prompt: Prompt, choice: Choice = "auto") -> tuple[MaskFound, ...]:
    """The masks that a prompt asks for in the predictor's image, the most trusted first.

    ``three``: all that a click may mean. ``best``: the most trusted of them. ``one``: the model's mask for prompts that
    mean one thing. ``auto``: three for a single point, one otherwise, as the authors advise. Raises ValueError for
    prompts that cannot be, or outside the image; NoImageError.
    """
    check_prompt(prompt)
    points, labels, boxes = None, None, None
    if prompt.points:
        rows = np.array(prompt.points, np.float64)
        points, labels = rows[None, :, :2], rows[None, :, 2].astype(np.int64)
    if prompt.box is not None:
        boxes = np.array([prompt.box], np.float64)
    alone = prompt.box is None and len(prompt.points) == 1
    several = choice in ("three", "best") or (choice == "auto" and alone)
    found = predictor.predict(points, labels, boxes, multimask=several)
    order = np.argsort(-found.iou[0], kind="stable")[: 1 if choice == "best" else None]
    return tuple(MaskFound(encode_uncompressed(found.masks[0, i]), float(found.iou[0, i])) for i in order)


def ask(predictor: Predictor, path: Path, prompt: Prompt, choice: Choice = "auto") -> ImageMasks:
    """``masks_of`` an image file. Raises FileNotFoundError and CorruptImageError, too."""
    check_prompt(prompt)
    require_file(path)
    image, start = decode_image(path), time.perf_counter()
    predictor.set_image(image)
    masks = masks_of(predictor, prompt, choice)
    return ImageMasks(path, (image.shape[0], image.shape[1]), prompt, masks, time.perf_counter() - start)


def find_everything(
    predictor: Predictor, path: Path, search: MaskSearch | None = None, *, most: int | None = None
) -> ImageMasks:
    """``find_masks`` of an image file, at most ``most``, behind a bar on the terminal that says how long it takes."""
    require_file(path)
    search = MaskSearch() if search is None else search
    image, start = decode_image(path), time.perf_counter()
    with progress_bar(count_points(search), f"masks in {path.name}", "point") as bar:
        found = find_masks(predictor, image, search, progress=bar.update)
    masks = tuple(MaskFound(each.run_lengths, each.iou, each.stability, each.point) for each in found[:most])
    return ImageMasks(path, (image.shape[0], image.shape[1]), None, masks, time.perf_counter() - start)


# What is made of them


def write_masks(found: ImageMasks, out: Path) -> Path:
    """The picture with the masks as NAME.png in the folder ``out``; beside it each mask as NAME_mask1.png ..., white
    on black (of everything: all in NAME_masks.png, numbers of their places from 1 on), and NAME.json."""
    from PIL import Image

    out.mkdir(parents=True, exist_ok=True)
    image, target = decode_image(found.path), free_name(out, found.path.stem)
    masks = [decode_mask(each.run_lengths, *found.size) for each in found.masks]
    if found.prompt is None:
        drawn = draw_everything(image, masks)
        Image.fromarray(numbered(masks, found.size)).save(out / f"{target.stem}_masks.png")
    else:
        drawn = draw_prompted(image, masks, [each.iou for each in found.masks], found.prompt)
        for number, mask in enumerate(masks, 1):
            Image.fromarray(mask * np.uint8(255)).save(out / f"{target.stem}_mask{number}.png")
    Image.fromarray(drawn).save(target)
    target.with_suffix(".json").write_text(json.dumps(as_json(found), indent=1) + "\n")
    return target


def numbered(masks: Sequence[UInt8[np.ndarray, "h w"]], size: Size) -> np.ndarray:
    """16-bit grey: 0 where no mask is, else the place of the smallest one there, from 1 on."""
    numbers = np.zeros(size, np.uint16)
    for place in _largest_first(masks):
        numbers[masks[place] != 0] = place + 1
    return numbers


def as_json(found: ImageMasks) -> dict[str, Any]:
    """File, size, prompt, and each mask: expected IoU, area, box (x, y, width, height) and run lengths.

    ``segmentation`` is COCO's uncompressed form: the image column by column, zeros counted first.
    """
    head: dict[str, Any] = {"file_name": str(found.path), "size": list(found.size)}
    if found.prompt is not None:
        box = found.prompt.box
        head["prompt"] = {"points": [list(point) for point in found.prompt.points], "box": box and list(box)}
    return head | {"masks": [_row(each) for each in found.masks]}


def _row(found: MaskFound) -> dict[str, Any]:
    mask = decode_mask(found.run_lengths, *found.run_lengths.size)
    row: dict[str, Any] = {"iou": round(found.iou, 5), "area": int(mask.sum()), "bbox": box_of(mask)}
    if found.stability is not None and found.point is not None:
        row |= {"stability": round(found.stability, 5), "point": list(found.point)}
    counts = found.run_lengths.counts.tolist()
    return row | {"segmentation": {"size": list(found.run_lengths.size), "counts": counts}}


def box_of(mask: UInt8[np.ndarray, "h w"] | Bool[np.ndarray, "h w"]) -> list[int]:
    """x, y, width, height around what is not 0; zeros for an empty mask."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    if not rows.size:
        return [0, 0, 0, 0]
    x, y = int(columns[0]), int(rows[0])
    return [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]


def summary(found: ImageMasks) -> str:
    """A line for the image, and for prompts one for each mask."""
    pixels, count = found.size[0] * found.size[1], len(found.masks)
    masks = [decode_mask(each.run_lengths, *found.size) for each in found.masks]
    head = f"{found.path}: {count} mask{'s' * (count != 1)}"
    if found.prompt is None:
        covered = np.zeros(found.size, bool)
        for mask in masks:
            covered |= mask != 0
        iou = [each.iou for each in found.masks]
        spread = f", expected IoU {min(iou):.3f} to {max(iou):.3f}" if iou else " (lower --threshold finds more)"
        return f"{head}, {covered.mean():.1%} of the image covered{spread}, {found.seconds:.1f} s"
    lines = [
        f"  mask {number}: expected IoU {each.iou:.3f}, {mask.sum() / pixels:.1%} of the image, xywh {box_of(mask)}"
        for number, (each, mask) in enumerate(zip(found.masks, masks, strict=True), 1)
    ]
    return "\n".join([f"{head}, {found.seconds:.1f} s", *lines])


# Pictures


def draw_everything(
    image: UInt8[np.ndarray, "h w c"], masks: Sequence[UInt8[np.ndarray, "h w"]]
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """All masks in colours of their own, the smallest on top."""
    pixels, factor = _enlarged(image)
    order = _largest_first(masks)
    return blend_masks(pixels, (masks[i] for i in order), [class_color(i) for i in order], factor=factor)


def draw_prompted(
    image: UInt8[np.ndarray, "h w c"],
    masks: Sequence[UInt8[np.ndarray, "h w"]],
    iou: Sequence[float],
    prompt: Prompt,
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """One picture for each mask side by side, with the prompt in it and the expected IoU below."""
    cells = [_cell(image, mask, f"mask {n}: expected IoU {score:.3f}", prompt, class_color(n - 1))
             for n, (mask, score) in enumerate(zip(masks, iou, strict=True), 1)]  # fmt: skip
    return sheet_of(cells, len(cells))


def _cell(image: np.ndarray, mask: np.ndarray, text: str, prompt: Prompt, color: tuple[int, int, int]) -> np.ndarray:
    from PIL import Image, ImageDraw, ImageFont

    pixels, factor = _enlarged(image)
    line = max(2, round(max(pixels.shape) / 400))
    canvas = Image.fromarray(blend_masks(pixels, [mask], [color], factor=factor, width=line))
    pen, radius = ImageDraw.Draw(canvas), 3 * line
    if prompt.box is not None:
        pen.rectangle(tuple(side * factor for side in prompt.box), outline=BOX, width=line)
    for x, y, label in prompt.points:
        place = ((x * factor - radius, y * factor - radius), (x * factor + radius, y * factor + radius))
        pen.ellipse(place, fill=IN if label else OUT, outline="white", width=max(1, line // 2))
    framed = Image.new("RGB", (canvas.width, canvas.height + 30), "white")
    framed.paste(canvas, (0, 0))
    ImageDraw.Draw(framed).text((4, canvas.height + 5), text, fill="black", font=ImageFont.load_default(18))
    return np.asarray(framed)


def _enlarged(image: np.ndarray) -> tuple[np.ndarray, int]:
    """The image in colour, a whole number of times as large where it is small, and that number."""
    factor = max(1, -(-LEAST_SIDE // max(image.shape[:2])))
    return colored(image).repeat(factor, axis=0).repeat(factor, axis=1), factor


def _largest_first(masks: Sequence[np.ndarray]) -> list[int]:
    return np.argsort([-int(mask.sum()) for mask in masks], kind="stable").tolist()
