"""``eqvision predict RUN_OR_MODEL IMAGE...``: label images or their pixels, or find objects in them."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from eqvision.commands.arguments import (
    fail,
    is_detector,
    is_model,
    is_segmenter,
    parse,
    refuse_options,
    refuse_weights_options,
)
from eqvision.commands.named import is_clip, name_images
from eqvision.commands.prompted import draw_masks, is_prompted, refuse_prompts
from eqvision.commands.queried import find_named, is_open_vocabulary

if TYPE_CHECKING:
    from eqvision.predict import Run
    from eqvision.predict_objects import DetectorRun
    from eqvision.predict_pixels import LabelledImage


@dataclass(frozen=True)
class PredictOptions:
    """Label images, or find objects in them, with the newest checkpoint of a run or with published weights; tell the
    class of each pixel with the run of a segmenter; or ask for masks by points and boxes. The result is drawn on the
    images."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN_OR_MODEL")]
    """Run folder, or a name of the zoo, which takes published weights."""
    images: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE...")]
    """Image files."""
    weights: str | None = None
    """Model only: file or folder of weights, hf:organisation/repository, a URL, or a tag that `eqvision info MODEL`
    lists; default is the first of those."""
    layout: str | None = None
    """Model only: names of the tensors in the file, where they do not tell it."""
    image_size: int | None = None
    """Model only: height and width of the images, for a detector their shorter side; default is that of the weights."""
    out: Path | None = None
    """Folder of the annotated PNGs; default is RUN_FOLDER/predictions, for a model predictions/MODEL."""
    top: int | None = None
    """Classes to print for each image, default 3; for a detector the most objects of an image, default all."""
    threshold: float | None = None
    """Detector only: least score of the objects that are shown, default 0.4."""
    json: Path | None = None
    """Detector only: file to which the objects are written too, as COCO's results; masks as run lengths."""
    batch_size: int | None = None
    """Images that are computed at a time. Default: 32; for a detector 8, or 1 where images have several shapes. With
    --everything the points, default 64; with --window the windows, default 4."""
    window: tuple[int, int] | None = None
    """Segmenter only: height and width of windows that slide over each image, whose logits are averaged. Default: each
    image as a whole, and one compilation for each shape, in steps of 8 pixels."""
    stride: tuple[int, int] | None = None
    """With --window: pixels from window to window, down and across; default two thirds of the window."""
    prompt_points: tuple[tuple[float, float, int], ...] = ()
    """Model with prompts only: X Y LABEL of each point, in pixels; label 1 inside the object, 0 outside."""
    prompt_box: tuple[float, float, float, float] | None = None
    """Model with prompts only: X1 Y1 X2 Y2 of a box around the object, in pixels."""
    queries: tuple[str, ...] = ()
    """Open-vocabulary detector: what to look for, a text for each, and the least score is then 0.2 unless --threshold
    says otherwise. Model of images and text: names of what may be in the images. Default for runs of both are the names
    of the run's classes."""
    masks: Literal["auto", "three", "best", "one"] | None = None
    """Model with prompts only: three masks, the best of them, or the model's one for prompts that mean one thing;
    auto, the default, gives three for a single point."""
    everything: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Model with prompts only: masks of everything, found by a grid of points. --threshold is then the least IoU that
    the model expects of a mask, default 0.88, --top the most masks."""
    points_per_side: int | None = None
    """With --everything: rows and columns of the grid, default 32."""
    crop_layers: int | None = None
    """With --everything: search crops too, 4 of half the size (1), and 16 of a quarter (2); default 0."""


def run(arguments: list[str]) -> None:
    options = parse(PredictOptions, arguments, "eqvision predict")
    if not options.images:
        fail("name at least one image: eqvision predict RUN_OR_MODEL IMAGE...")
    if options.batch_size is not None and options.batch_size < 1:
        fail(f"--batch-size {options.batch_size}; expected 1 or more")
    if is_open_vocabulary(options.run):
        _refuse_windows(options)
        find_named(options)
        return
    if is_clip(options.run):
        _refuse_windows(options)
        name_images(options)
        return
    refuse_options(
        {"--queries": " ".join(options.queries) or None},
        f"is for open-vocabulary detectors and models of images and text, and {options.run} is none",
    )
    if is_prompted(options.run):
        _refuse_windows(options)
        draw_masks(options)
        return
    if not is_model(options.run):
        only = {"--weights": options.weights, "--layout": options.layout, "--image-size": options.image_size}
        refuse_weights_options(options.run, only)
    refuse_prompts(options)
    if is_segmenter(options.run):
        _label_pixels(options)
        return
    _refuse_windows(options)
    if is_detector(options.run):
        _find(options)
    else:
        _label(options)


def _refuse_windows(options: PredictOptions) -> None:
    """Exit with code 2 for options that only segmenters have."""
    sides = {"--window": options.window, "--stride": options.stride}
    given = {name: value and f"{value[0]} {value[1]}" for name, value in sides.items()}
    refuse_options(given, f"is for runs of segmenters, and {options.run} is none")


def _label(options: PredictOptions) -> None:
    why = f"is for detectors, and {options.run} is a classifier"
    refuse_options({"--threshold": options.threshold, "--json": options.json}, why)
    from eqvision.predict import draw, predict

    loaded, out = _classifier(options), _folder(options)
    top, batch_size = options.top or 3, options.batch_size or 32
    for prediction in predict(loaded, list(options.images), top=top, batch_size=batch_size):
        picture = draw(prediction, out)
        scores = ", ".join(
            f"{label} {score:.3f}" for label, score in zip(prediction.labels, prediction.scores, strict=True)
        )
        print(f"{prediction.path}: {scores}  -> {picture}")


def _find(options: PredictOptions) -> None:
    from eqvision.predict_objects import THRESHOLD, describe_found, draw_found, find_objects, write_results

    threshold = THRESHOLD if options.threshold is None else options.threshold
    loaded, out = _detector(options), _folder(options)
    images, size = list(options.images), options.batch_size
    found = find_objects(loaded, images, threshold=threshold, top=options.top, batch_size=size)
    for each in found:
        print(describe_found(each, threshold, draw_found(loaded, each, out)))
    if options.json is not None:
        print(f"COCO results of {len(found)} images -> {write_results(loaded, found, options.json)}")


def _label_pixels(options: PredictOptions) -> None:
    if is_model(options.run):
        fail(
            f"{options.run} is a segmenter, and published weights are used for classifiers, detectors and models with "
            "prompts only; eqvision predict takes the run folders of segmenters"
        )
    why = f"is for classifiers and detectors, and {options.run} is a segmenter"
    refuse_options({"--top": options.top, "--threshold": options.threshold, "--json": options.json}, why)
    if options.window is None:
        sizes = {"--stride": options.stride and f"{options.stride[0]} {options.stride[1]}"}
        refuse_options(sizes | {"--batch-size": options.batch_size}, "is of a segmenter for --window, which is missing")
    from eqvision.predict_pixels import WINDOWS_AT_ONCE, Windows, draw_labelled, label_pixels, load_segmenter_run

    windows = None
    if options.window is not None:
        windows = Windows(options.window, options.stride, options.batch_size or WINDOWS_AT_ONCE)
    loaded, out = load_segmenter_run(options.run), _folder(options)
    for labelled in label_pixels(loaded, list(options.images), windows=windows):
        picture, labels = draw_labelled(loaded, labelled, out)
        print(_shares(labelled, loaded.class_names, picture, labels))


def _shares(labelled: "LabelledImage", names: tuple[str, ...], picture: Path, labels: Path) -> str:
    """A line for the image and one for each class that is in it, the largest first."""
    height, width = labelled.labels.shape
    order = [k for k in (-labelled.shares).argsort(kind="stable").tolist() if labelled.shares[k]]
    head = f"{labelled.path}: {height}x{width}, {len(order)} of {len(names)} classes  -> {picture} {labels}"
    longest = max(len(names[k]) for k in order)
    return "\n".join([head, *(f"  {names[k]:<{longest}}  {labelled.shares[k]:6.1%}" for k in order)])


def _classifier(options: PredictOptions) -> "Run":
    if not is_model(options.run):
        from eqvision.predict import load_run

        return load_run(options.run)
    from eqvision.published import load_published

    return load_published(str(options.run), options.weights, layout=options.layout, image_size=options.image_size)


def _detector(options: PredictOptions) -> "DetectorRun":
    if not is_model(options.run):
        from eqvision.predict_objects import load_detector_run

        return load_detector_run(options.run)
    from eqvision.published_detector import load_published_detector

    name, size = str(options.run), options.image_size
    return load_published_detector(name, options.weights, layout=options.layout, image_size=size)


def _folder(options: PredictOptions) -> Path:
    default = Path("predictions") / options.run if is_model(options.run) else options.run / "predictions"
    return default if options.out is None else options.out
