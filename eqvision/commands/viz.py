"""``eqvision viz data RECIPE`` and ``eqvision viz attention RUN IMAGE...``: pictures as PNG."""

import argparse
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from eqvision.commands.arguments import fail, parse, parse_recipe, unknown
from eqvision.recipes import DetectionConfig, MaskedConfig, PromptedConfig, SegmentationConfig, TrainConfig
from eqvision.run_folder import model_kind

USAGE = """usage: eqvision viz data RECIPE [options of train] [--out FILE.png] [--step 1] [--count N]
           the first images of a training step's batch after all augmentation, with labels, shares and weights;
           for a detector with boxes, names of classes, masks where it learns them, and padding in stripes;
           for a segmenter beside the same under the colours of its classes
       eqvision viz attention RUN_FOLDER IMAGE... [--out FOLDER]
           where a vision transformer looks: every layer and head, and the rollout"""

COUNT, DETECTION_COUNT = 32, 12  # images in a picture, unless --count is given


@dataclass(frozen=True)
class AttentionOptions:
    """Attention maps of a run's newest checkpoint on images: NAME_layers.png and NAME_heads.png for each."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN_FOLDER")]
    """Run folder of a vision transformer."""
    images: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE...")]
    """Image files."""
    out: Path | None = None
    """Folder of the pictures; default is RUN_FOLDER/attention."""


def run(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return
    kinds = {"data": draw_data, "attention": draw_attention}
    if arguments[0] not in kinds:
        fail(unknown("picture", arguments[0], list(kinds)))
    kinds[arguments[0]](arguments[1:])


def draw_data(arguments: list[str]) -> None:
    given, rest = _data_options().parse_known_args(arguments)
    if "-h" in rest or "--help" in rest:
        print(f"{USAGE}\n")
    config = parse_recipe(rest, "eqvision viz data")
    if config is None:
        return
    path = Path(f"{rest[0]}_batch.png") if given.out is None else given.out
    if path.suffix.lower() != ".png":
        fail(f"--out {path} is the picture here and not a run folder; expected a name that ends in .png")
    if isinstance(config, (DetectionConfig, PromptedConfig)):
        print(_draw_objects(config, path, rest[0], given.step, given.count))
    elif isinstance(config, SegmentationConfig):
        print(_draw_pixels(config, path, rest[0], given.step, given.count))
    elif isinstance(config, TrainConfig):
        print(_draw_labels(config, path, rest[0], given.step, given.count))
    elif isinstance(config, MaskedConfig):
        from eqvision.problems.masked_image import as_classification

        print(_draw_labels(as_classification(config), path, rest[0], given.step, given.count))
    else:
        fail(f"{rest[0]} trains a {model_kind(config)}, and there are no pictures of its batches")


def _draw_labels(config: TrainConfig, path: Path, recipe: str, step: int, count: int | None) -> Path:
    _need_matplotlib()
    from eqvision.viz import draw_batch, training_batch

    batch = training_batch(config, step, COUNT if count is None else count)
    return draw_batch(batch, path, f"{_title(recipe, len(batch.images), batch.size, step)}\n{_changes(config)}")


def _draw_objects(
    config: DetectionConfig | PromptedConfig, path: Path, recipe: str, step: int, count: int | None
) -> Path:
    from eqvision.viz_detection import detection_batch, draw_detection_batch

    batch = detection_batch(config, step, DETECTION_COUNT if count is None else count)
    title = _title(recipe, len(batch.images), batch.size, step)
    return draw_detection_batch(batch, path, f"{title}\n{_detection_changes(config)}")


def _draw_pixels(config: SegmentationConfig, path: Path, recipe: str, step: int, count: int | None) -> Path:
    from eqvision.viz_segmentation import draw_segmentation_batch, segmentation_batch

    batch = segmentation_batch(config, step, DETECTION_COUNT if count is None else count)
    title = _title(recipe, len(batch.images), batch.size, step)
    return draw_segmentation_batch(batch, path, f"{title}\n{_segmentation_changes(config)}")


def _title(recipe: str, shown: int, size: int, step: int) -> str:
    return f"{recipe}: {shown} of the {size} images of training step {step}"


def _data_options() -> argparse.ArgumentParser:
    """What is no option of training, or means something else here."""
    parser = argparse.ArgumentParser(prog="eqvision viz data", add_help=False, allow_abbrev=False)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--step", type=int, default=1)
    parser.add_argument("--count", type=int)
    return parser


def _changes(config: TrainConfig) -> str:
    """What was done to the images, for the title."""
    augment = config.augment
    steps = [f"transform {config.data.transform}", *([augment.policy] if augment.policy != "none" else [])]
    values = {name: getattr(augment, name) for name in ("color_jitter", "mixup", "cutmix", "random_erasing")}
    steps += [f"{name.replace('_', ' ')} {value:g}" for name, value in values.items() if value]
    steps += [f"{augment.repeats} repeats"] if augment.repeats > 1 else []
    return ", ".join(steps)


def _detection_changes(config: DetectionConfig | PromptedConfig) -> str:
    data = config.data
    steps = [f"transform {data.transform}", *([f"flip {data.flip:g}"] if data.flip else [])]
    return ", ".join([*steps, *([f"color jitter {data.color_jitter:g}"] if data.color_jitter else [])])


def _segmentation_changes(config: SegmentationConfig) -> str:
    data = config.data
    steps = [
        f"transform {data.transform}",
        *([f"scale {data.scale[0]:g} to {data.scale[1]:g}"] if data.transform == "crop" else []),
    ]
    steps += [f"flip {data.flip:g}"] if data.flip else []
    return ", ".join([*steps, *([f"color jitter {data.color_jitter:g}"] if data.color_jitter else [])])


def draw_attention(arguments: list[str]) -> None:
    options = parse(AttentionOptions, arguments, "eqvision viz attention")
    if not options.images:
        fail("name at least one image: eqvision viz attention RUN_FOLDER IMAGE...")
    _need_matplotlib()
    from eqvision import viz
    from eqvision.predict import load_run

    loaded = load_run(options.run)
    out = options.run / "attention" if options.out is None else options.out
    for image in options.images:
        layers, heads = viz.draw_attention(loaded, image, out)
        print(f"{image}: {layers} {heads}")


def _need_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        fail("pictures are drawn by matplotlib, which is not installed: pip install 'eqvision[plots]'")
