"""A segmenter, used: restore the model of a run, tell the class of each pixel of images, draw it, evaluate the run
again.

What other runs are used by is in ``predict.py`` and ``predict_objects.py``.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, Float64, Num, UInt8

from eqvision.data import decode_image, normalize
from eqvision.data.detection.sizes import Size
from eqvision.data.segmentation import SegmentationExample, find_segmentation
from eqvision.mesh import make_mesh
from eqvision.ops import restored_logits, sliding_window_on_host
from eqvision.predict import loop_here, newest_state, require_file
from eqvision.problems.segmentation import MULTIPLE, Segmentation, build_segmenter
from eqvision.problems.segmentation_data import Plan, eval_plan, load_segmentation
from eqvision.recipes import SegmentationConfig
from eqvision.run_folder import RunFolder
from eqvision.segmentation_pictures import draw_labels, legend
from eqvision.types import IGNORE_LABEL

WINDOWS_AT_ONCE = 4


class SegmenterRun(NamedTuple):
    """A segmenter with all that is needed to use it; the model may have more outputs than there are class names, which
    are then never the class of a pixel."""

    config: SegmentationConfig
    class_names: tuple[str, ...]
    model: Any
    stats: eqx.nn.State
    step: int


class Windows(NamedTuple):
    """Windows that slide over an image: height and width, pixels from one to the next (None: two thirds of the
    window), and how many are computed at a time."""

    size: Size
    stride: Size | None = None
    at_once: int = WINDOWS_AT_ONCE


class LabelledImage(NamedTuple):
    """The class of each pixel of an image, at the size of its upright file, and the share of pixels of each class."""

    path: Path
    labels: UInt8[np.ndarray, "h w"]
    shares: Float64[np.ndarray, " k"]


def load_segmenter_run(path: str | Path) -> SegmenterRun:
    """The newest good checkpoint of a segmenter's run; the average of the parameters, where the run keeps one.

    Raises RunFolderError where the folder is none, is of another kind or holds no checkpoint yet, and CheckpointError.
    """
    folder = RunFolder(path)
    config, num_classes = folder.segmentation(), folder.read()["num_classes"]
    restored = newest_state(folder, config, lambda: build_segmenter(config, num_classes))
    state = restored.state
    return SegmenterRun(config, folder.class_names(), state.evaluated, state.stats, restored.record.step)


def label_pixels(
    run: SegmenterRun, paths: Sequence[Path], *, windows: Windows | None = None
) -> Iterator[LabelledImage]:
    """The class of each pixel of each image, one image after the other.

    Images are prepared as in the run's evaluation, and logits brought back to the size of the file before the highest
    one is taken. Whole images are filled up to multiples of 8 pixels: one program is compiled for each such shape.
    With ``windows`` a single one is compiled, for all images. Raises ValueError for windows without pixels or with
    gaps, FileNotFoundError before anything is computed, CorruptImageError.
    """
    if windows is not None:
        _check_windows(windows)
    for path in paths:
        require_file(path)
    return _labelled(run, paths, windows)


def _labelled(run: SegmenterRun, paths: Sequence[Path], windows: Windows | None) -> Iterator[LabelledImage]:
    plan = eval_plan(run.config.data)
    for path in paths:
        example = _prepared(run, plan, path)
        logits = _whole(run, example.image) if windows is None else _slid(run, example.image, windows)
        height, width = example.image.shape[:2]
        if (height, width) != example.original_size:
            logits = restored_logits(logits, (height, width), example.original_size)
        labels = logits.argmax(axis=-1).astype(np.uint8)
        counts = np.bincount(labels.ravel(), minlength=len(run.class_names))
        yield LabelledImage(path, labels, counts / labels.size)


def _check_windows(windows: Windows) -> None:
    if min(windows.size) < 1 or windows.at_once < 1:
        raise ValueError(f"window={windows.size}, {windows.at_once} at once; expected 1 pixel or more, and 1 window")
    stride = _stride(windows)
    if any(not 1 <= step <= side for step, side in zip(stride, windows.size, strict=True)):
        raise ValueError(
            f"stride={stride} for windows of {windows.size} pixels; expected 1 to the window, or pixels are left out"
        )


def _stride(windows: Windows) -> Size:
    height, width = windows.size
    return (max(1, 2 * height // 3), max(1, 2 * width // 3)) if windows.stride is None else windows.stride


def _prepared(run: SegmenterRun, plan: Plan, path: Path) -> SegmentationExample:
    """An image as the run's evaluation sees it, with nothing but void labels."""
    image = decode_image(path, run.config.model.in_channels)
    size = (image.shape[0], image.shape[1])
    example = SegmentationExample(image, np.full(size, IGNORE_LABEL, np.uint8), size, 0)
    return plan.transform(example, np.random.default_rng(0))  # which draws nothing: evaluation is not random


def _whole(run: SegmenterRun, image: UInt8[np.ndarray, "h w c"]) -> Float32[np.ndarray, "h w k"]:
    """Logits of an image that is filled up at the bottom and at the right, as in a batch of its own."""
    height, width = image.shape[:2]
    filled = np.pad(_normalized(run, image), ((0, -height % MULTIPLE), (0, -width % MULTIPLE), (0, 0)))
    return np.asarray(_logits(run, filled[None]))[0, :height, :width]


def _slid(run: SegmenterRun, image: UInt8[np.ndarray, "h w c"], windows: Windows) -> Float32[np.ndarray, "h w k"]:
    return sliding_window_on_host(
        functools.partial(_logits, run),
        _normalized(run, image),
        window=windows.size,
        stride=_stride(windows),
        windows_at_once=windows.at_once,
    )


def _normalized(run: SegmenterRun, image: UInt8[np.ndarray, "h w c"]) -> Float32[np.ndarray, "h w c"]:
    return np.asarray(normalize(image, run.config.data.mean, run.config.data.std), np.float32)


def _logits(run: SegmenterRun, images: Num[np.ndarray, "b h w c"]) -> Float[Array, "b h w k"]:
    """Of the classes that have names, for normalised images."""
    dtype = run.config.loop.compute_dtype
    return _program(run.model, run.stats, images, dtype=dtype, classes=len(run.class_names))


@functools.partial(jax.jit, static_argnames=("dtype", "classes"))
def _program(
    model: Any, stats: eqx.nn.State, images: Num[Array, "b h w c"], *, dtype: str, classes: int
) -> Float[Array, "b h w k"]:
    """As the run's evaluation computes them."""
    return model(jnp.asarray(images, jnp.dtype(dtype)), stats)[0][..., :classes]


# What is made of it


def draw_labelled(run: SegmenterRun, labelled: LabelledImage, out: Path) -> tuple[Path, Path]:
    """Two PNGs in the folder ``out``: NAME.png, the image under the colours of its classes with their names below, and
    NAME_labels.png, grey, in which each pixel is the number of its class."""
    from PIL import Image

    drawn = draw_labels(decode_image(labelled.path), labelled.labels, run.class_names)
    seen = np.flatnonzero(labelled.shares).tolist()
    picture = np.concatenate([drawn, legend(seen, run.class_names, width=drawn.shape[1])])
    out.mkdir(parents=True, exist_ok=True)
    target, numbers = _free_names(out, labelled.path.stem)
    Image.fromarray(picture).save(target)
    Image.fromarray(labelled.labels).save(numbers)
    return target, numbers


def _free_names(out: Path, stem: str) -> tuple[Path, Path]:
    """Pictures of equal names from different folders do not overwrite each other."""
    for suffix in ("", *(f"_{number}" for number in range(2, 10_000))):
        names = (out / f"{stem}{suffix}.png", out / f"{stem}{suffix}_labels.png")
        if not any(name.exists() for name in names):
            return names
    raise FileExistsError(f"{out} holds 9,999 pictures of {stem} already; empty it or choose another --out")


# Evaluation


def evaluate_segmenter_run(
    path: str | Path, *, data_path: str | None = None, split: str | None = None
) -> dict[str, float]:
    """Mean IoU, accuracies and the loss of the newest checkpoint, such as ``test/mean_iou``, on the run's test split or
    on another split or path (a folder of images and label pictures).

    Raises ValueError for other classes there, and what sources and ``load_segmenter_run`` raise.
    """
    run = load_segmenter_run(path)
    data = dataclasses.replace(run.config.data, test_split=split or run.config.data.test_split)
    if data_path is not None:
        data = dataclasses.replace(data, kind="folder", path=data_path)
    config = dataclasses.replace(run.config, data=data, loop=loop_here(run.config.loop))
    source = _test_source(config, run.class_names)
    mesh = make_mesh()
    model, stats = jax.device_put((run.model, run.stats), NamedSharding(mesh, P()))
    problem = Segmentation(config, source, source, RunFolder(path).read()["num_classes"])
    metrics = problem.evaluator(mesh)(model, stats).metrics
    return {f"test/{name}": value for name, value in metrics.items()}


def _test_source(config: SegmentationConfig, names: tuple[str, ...]) -> Any:
    """The images to evaluate on. Their classes are told by number: where they have names, these must be the run's."""
    data, channels = config.data, config.model.in_channels
    given = load_segmentation(data, channels, data.test_split).class_names if _has_names(data) else names
    if tuple(given) != names:
        shown = ", ".join(names[:5]) + " ..." * (len(names) > 5)
        raise ValueError(
            f"{data.path or data.kind}, split {data.test_split}, has the classes {', '.join(given[:5])}"
            f"{' ...' * (len(given) > 5)}, and the run has {shown}; expected the same, in the same order"
        )
    return load_segmentation(data, channels, data.test_split, names)


def _has_names(data: Any) -> bool:
    """Whether the data say how their classes are called, so that no label file needs to be read for it."""
    if data.kind != "folder" or not data.path:
        return True
    root = Path(data.path).expanduser().absolute()
    return find_segmentation(root, data.test_split, data.layout or None).class_names is not None
