"""What ``eqvision info NAME`` prints: size, cost and features of a zoo model, from shapes alone."""

import inspect
import math
import textwrap
from pathlib import Path
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp

from eqvision.counting import count
from eqvision.problems import make_problem
from eqvision.problems.detection import build_detector
from eqvision.problems.segmentation import build_segmenter
from eqvision.recipes import DetectionConfig, RunConfig, SegmentationConfig, TrainConfig
from eqvision.run_folder import RunFolder, model_kind, read_rows
from eqvision.setup import build_model
from eqvision.types import MaskPrompts, PaddedImages, PromptedImages, TokenFeatures
from eqvision.zoo import MODELS, PROMPTED, create, row_of

MOST_FIGURES = 6  # of a run's last evaluation


def describe(name: str, *, image_size: int = 224, num_classes: int | None = None, in_channels: int = 3) -> str:
    """Parameters by part, multiply-adds and activations of one image, and the features that the backbone gives.

    Raises UnknownNameError, and ValueError for an image size that the model cannot take.
    """
    model, state = eqx.filter_eval_shape(
        lambda: create(
            name, image_size=image_size, num_classes=num_classes, in_channels=in_channels, key=jax.random.key(0)
        )
    )
    images = jax.ShapeDtypeStruct((1, image_size, image_size, in_channels), jnp.float32)
    what = "masks of a prompt" if name in PROMPTED else "classes"
    head = f"{name}, {image_size}x{image_size}x{in_channels}, {_classes(name, num_classes)} {what}"
    return "\n".join([head, *_lines(model, state, images, _inputs(name, images))])


def describe_language(
    name: str, *, image_size: int | None = None, num_classes: int | None = None, in_channels: int | None = None
) -> str:
    """Parameters by part of a model whose cost depends on more than the size of images: a text, or what is masked.

    Raises UnknownNameError, and ValueError for a size that the model does not have.
    """
    model, _ = eqx.filter_eval_shape(
        lambda: create(
            name, image_size=image_size, num_classes=num_classes, in_channels=in_channels, key=jax.random.key(0)
        )
    )
    return "\n".join([name, *_size_lines(model)])


def _size_lines(model: Any) -> list[str]:
    """Parameters, all of them and by part."""
    parts = _parts(model)
    total = sum(parts.values())
    return [
        f"  parameters      {total:,} ({total * 4 / 1e6:.1f} MB in float32)",
        "  parameters by part",
        *(f"    {part:<28}{size:>14,}" for part, size in parts.items()),
    ]


def usual_image_size(name: str) -> int:
    """What is described where no size is asked for: that of ImageNet, or the one that a model with prompts is for."""
    return inspect.signature(row_of(name)).parameters["image_size"].default if name in PROMPTED else 224


def _inputs(name: str, images: Any) -> Any:
    """An image; with its size, or with one click, where the model asks for that."""
    if name in PROMPTED:
        points, labels = jax.ShapeDtypeStruct((1, 1, 1, 2), jnp.float32), jax.ShapeDtypeStruct((1, 1, 1), jnp.int32)
        return PromptedImages(images, MaskPrompts(cast(Any, points), cast(Any, labels)))
    sizes: Any = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return images if name in MODELS else PaddedImages(images, sizes)


def _lines(model: Any, state: Any, images: Any, inputs: Any) -> list[str]:
    """What is counted; all arguments are shapes."""
    counts = count(model, inputs, state)
    features = eqx.filter_eval_shape(lambda m, s, x: m.backbone(x, s)[0], model, state, images)
    return [
        f"  parameters      {counts.params:,} ({counts.params * 4 / 1e6:.1f} MB in float32)",
        f"  multiply-adds   {counts.macs / 1e9:.3f} G for one image",
        f"  activations     {counts.activations / 1e6:.2f} M put out by matrix products and convolutions",
        f"  strides         {model.backbone.strides}",
        *(f"  feature         {line}" for line in _features(features)),
        "  parameters by part",
        *(f"    {part:<28}{size:>14,}" for part, size in _parts(model).items()),
    ]


def describe_run(path: str | Path) -> str:
    """The same of the model of a run folder, for one image of the size that it is trained with; and above it the run's
    classes, newest checkpoint and last figures. Raises RunFolderError where there is no run."""
    folder = RunFolder(path)
    config, num_classes = folder.config(), folder.read()["num_classes"]
    if not isinstance(config, (TrainConfig, DetectionConfig, SegmentationConfig)):
        head = f"{folder.path}: a run of the {model_kind(config)} {config.model.name}"
        return "\n".join([head, *_progress(folder), *_problem_lines(config)])
    model, state = eqx.filter_eval_shape(lambda: _build(config, num_classes))
    height, width = _size(config)
    images = jax.ShapeDtypeStruct((1, height, width, config.model.in_channels), jnp.float32)
    padded = PaddedImages(cast(Any, images), cast(Any, jax.ShapeDtypeStruct((1, 2), jnp.int32)))
    inputs = images if isinstance(config, TrainConfig) else padded
    what = f"the {model_kind(config)} {config.model.name}, {height}x{width}x{config.model.in_channels}"
    head = f"{folder.path}: a run of {what}, {num_classes} classes"
    return "\n".join([head, *_progress(folder), *_lines(model, state, images, inputs)])


def _problem_lines(config: RunConfig) -> list[str]:
    """Of a run whose problem alone knows what its model takes; its data are looked at for that."""
    problem = make_problem(config)
    model, _ = eqx.filter_eval_shape(problem.build)
    return [f"  multiply-adds   {problem.forward_macs() / 1e9:.3f} G for one example", *_size_lines(model)]


def _build(config: TrainConfig | DetectionConfig | SegmentationConfig, num_classes: int) -> tuple[Any, eqx.nn.State]:
    """As the run builds it."""
    if isinstance(config, DetectionConfig):
        return build_detector(config, num_classes)
    return (
        build_segmenter(config, num_classes)
        if isinstance(config, SegmentationConfig)
        else build_model(config, num_classes)
    )


def _size(config: TrainConfig | DetectionConfig | SegmentationConfig) -> tuple[int, int]:
    """Height and width of training images."""
    if isinstance(config, TrainConfig):
        return config.model.image_size, config.model.image_size
    return config.data.size


def _progress(folder: RunFolder) -> list[str]:
    """How far a run is."""
    names, rows = folder.class_names(), read_rows(folder)
    steps = sorted(int(each.name) for each in folder.checkpoints.glob("*") if each.name.isdecimal())
    figures = {name: value for row in rows for name, value in row.items() if name.startswith("test/")}  # the last ones
    shown = ", ".join(
        f"{name.removeprefix('test/')} {value:.4f}" for name, value in list(figures.items())[:MOST_FIGURES]
    )
    return [
        f"  classes         {textwrap.shorten(', '.join(names), 90, placeholder=' ...') or 'without names'}",
        f"  checkpoint      {f'step {steps[-1]}' if steps else 'none yet'}",
        f"  last test       {shown or 'none yet'}",
    ]


def _classes(name: str, num_classes: int | None) -> int:
    """As ``create`` understands None."""
    if num_classes is not None:
        return num_classes
    return 1000 if name in MODELS else inspect.signature(row_of(name)).parameters["num_classes"].default


def _features(features: TokenFeatures | tuple[jax.ShapeDtypeStruct, ...]) -> list[str]:
    if isinstance(features, TokenFeatures):
        return [f"{name} {leaf.shape}" for name, leaf in features._asdict().items()]
    return [str(leaf.shape) for leaf in features]


def _parts(model: eqx.Module) -> dict[str, int]:
    """Parameters below each of the first two levels of names, in the order of the model."""
    sizes: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        name = ".".join(str(part).strip(".[]") for part in path[:2])
        sizes[name] = sizes.get(name, 0) + math.prod(leaf.shape)
    return sizes
