"""A detector, used: restore the model of a run, find objects in images, draw them, evaluate the run again.

What classifiers' runs are used by is in ``predict.py``.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float32, Int32

from eqvision.data import decode_image
from eqvision.data.detection import (
    Buckets,
    Categories,
    DetectionExample,
    UncompressedRLE,
    coco_category_ids,
    coco_class_names,
    compress,
    encode_uncompressed,
    normalize_padded,
    smallest_bucket,
)
from eqvision.data.detection.collate import Collate
from eqvision.data.detection.sizes import Size
from eqvision.detection_pictures import DrawnObjects, draw_objects
from eqvision.detectors import find_objects as objects_of_batch
from eqvision.detectors.rcnn_dialects import RCNNDialect
from eqvision.drawn import DecodedMasks, pasted_masks
from eqvision.evaluators.console import progress_bar
from eqvision.losses import SetPredictionConfig
from eqvision.mesh import make_mesh
from eqvision.predict import free_name, loop_here, newest_state, require_file
from eqvision.problems.detection import Detection, build_detector, choose_family
from eqvision.problems.detection_data import Plan, eval_plan, load_detection
from eqvision.recipes import DetectionConfig
from eqvision.run_folder import RunFolder
from eqvision.types import DetectionBatch, Detections

BATCH_SIZE = 8
THRESHOLD = 0.4


class DetectorRun(NamedTuple):
    """A detector with all that is needed to use it; ``class_names`` has a name for each output."""

    config: DetectionConfig
    class_names: tuple[str, ...]
    model: Any
    stats: eqx.nn.State
    step: int


class FoundObjects(NamedTuple):
    """Objects in one image, best first. ``boxes`` are xyxy in pixels of the upright file, ``size`` its height and
    width; as the model says them, they may reach over the edge. ``best`` is the highest score, of all that was found.
    """

    path: Path
    size: Size
    boxes: Float32[np.ndarray, "n 4"]
    scores: Float32[np.ndarray, " n"]
    labels: Int32[np.ndarray, " n"]
    names: tuple[str, ...]
    best: float
    masks: tuple[UncompressedRLE, ...] | None = None
    """Run lengths at the size of the file, of detectors that give masks; ``decode_mask`` makes pixels of them."""


def load_detector_run(path: str | Path) -> DetectorRun:
    """The newest good checkpoint of a detector's run; the average of the parameters, where the run keeps one.

    Raises RunFolderError where the folder is none, is a classifier's or holds no checkpoint yet, and CheckpointError.
    """
    folder = RunFolder(path)
    config, num_classes = folder.detection(), folder.read()["num_classes"]
    restored = newest_state(folder, config, lambda: build_detector(config, num_classes))
    names = folder.class_names()
    names += tuple(f"class {number}" for number in range(len(names), num_classes))
    return DetectorRun(config, names, restored.state.evaluated, restored.state.stats, restored.record.step)


def find_objects(
    run: DetectorRun,
    paths: Sequence[Path],
    *,
    threshold: float | int = THRESHOLD,
    top: int | None = None,
    batch_size: int | None = None,
) -> list[FoundObjects]:
    """What is found in each image with a score of ``threshold`` or more, at most ``top`` objects of each.

    Images are prepared as in the run's evaluation. One program is compiled for each shape of batch. ``batch_size``
    None takes 8 where all images have one shape, and 1 where there are several: batches are filled with empty rows.
    Raises ValueError for a threshold outside 0..1, FileNotFoundError before anything is computed, CorruptImageError.
    """
    if not 0 <= threshold <= 1 or (top is not None and top < 1):
        raise ValueError(f"threshold={threshold}, top={top}; expected a score of 0 to 1, and 1 object or more")
    for path in paths:
        require_file(path)
    plan = eval_plan(run.config.data)
    several = len(plan.buckets.sizes) > 1
    rows = min(batch_size or (1 if several else BATCH_SIZE), len(paths))
    found: dict[int, FoundObjects] = {}
    waiting: dict[Size, list[DetectionExample]] = {}
    with progress_bar(len(paths), "finding objects", "image") as bar:
        for index, path in enumerate(paths):
            example = _prepared(run, plan, path, index)
            shape = _shape(plan.buckets, example)
            waiting.setdefault(shape, []).append(example)
            if len(waiting[shape]) == rows:
                _find(run, paths, waiting.pop(shape), shape, rows, (threshold, top), found)
                bar.update(rows)
        for shape, examples in waiting.items():
            _find(run, paths, examples, shape, rows, (threshold, top), found)
            bar.update(len(examples))
    return [found[index] for index in range(len(paths))]


def _prepared(run: DetectorRun, plan: Plan, path: Path, index: int) -> DetectionExample:
    """An image as the run's evaluation sees it, without objects."""
    image = decode_image(path, run.config.model.in_channels)
    size = (image.shape[0], image.shape[1])
    example = DetectionExample(image, np.zeros((0, 4), np.float32), np.zeros(0, np.int32), None, index, index, size)
    return plan.transform(example, np.random.default_rng(0))  # which draws nothing: evaluation is not random


def _shape(buckets: Buckets, example: DetectionExample) -> Size:
    """Of the batch that the image goes to; its own, on multiples of 32, for one of a shape that fits into none."""
    height, width = example.image.shape[:2]
    own = (-(-height // 32) * 32, -(-width // 32) * 32)
    return smallest_bucket(buckets, (height, width)) or own


def _find(
    run: DetectorRun,
    paths: Sequence[Path],
    examples: list[DetectionExample],
    shape: Size,
    rows: int,
    limits: tuple[float | int, int | None],
    found: dict[int, FoundObjects],
) -> None:
    """Add what is found in one batch to ``found``, by place in ``paths``."""
    data, channels, task = run.config.data, run.config.model.in_channels, run.config.task
    collate = Collate(max_objects=1, masks=False, describe=lambda index: str(paths[index]))
    batch: DetectionBatch = collate(examples, rows, shape, channels)
    detections = _detections(
        run.model,
        run.stats,
        batch,
        mean=tuple(data.mean),
        std=tuple(data.std),
        dtype=run.config.loop.compute_dtype,
        softmax=isinstance(task, SetPredictionConfig) and task.classification == "softmax",
    )
    host = jax.tree.map(np.asarray, detections)
    for row, example in enumerate(examples):
        one = jax.tree.map(lambda column, row=row: column[row], host)
        resized = (example.image.shape[0], example.image.shape[1])
        found[example.index] = _chosen(run, paths[example.index], one, example.original_size, shape, resized, limits)


@functools.partial(jax.jit, static_argnames=("mean", "std", "dtype", "softmax"))
def _detections(
    model: Any,
    stats: eqx.nn.State,
    batch: DetectionBatch,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: str,
    softmax: bool,
) -> Detections:
    """As the run's evaluation computes them, in pixels of the original images."""
    inputs = normalize_padded(batch.images, batch.size, mean, std)
    inputs = inputs._replace(images=inputs.images.astype(jnp.dtype(dtype)))
    return objects_of_batch(model, inputs, stats, batch.original_size, softmax=softmax)


def _chosen(
    run: DetectorRun,
    path: Path,
    one: Detections,
    size: Size,
    padded: Size,
    resized: Size,
    limits: tuple[float | int, int | None],
) -> FoundObjects:
    """The objects of one image that are wanted."""
    boxes, scores, labels = np.asarray(one.boxes), np.asarray(one.scores), np.asarray(one.labels)
    threshold, top = limits
    kept = np.flatnonzero(np.asarray(one.valid) & (scores >= threshold))[:top]
    masks = None
    if one.masks is not None:
        masks = _file_masks(run.model, np.asarray(one.masks)[kept], boxes[kept], (padded, resized, size))
    names = tuple(run.class_names[int(label)] for label in labels[kept])
    return FoundObjects(path, size, boxes[kept], scores[kept], labels[kept], names, float(scores.max()), masks)


def _file_masks(
    model: Any, masks: np.ndarray, boxes: np.ndarray, sizes: tuple[Size, Size, Size]
) -> tuple[UncompressedRLE, ...]:
    """Masks as the head gives them, at the size of the file; ``sizes`` are those of batch, image in it and file."""
    dialect = getattr(model, "dialect", None)
    if isinstance(dialect, RCNNDialect):  # probabilities in boxes
        return pasted_masks(masks, boxes, sizes[2], rule=dialect.paste)
    return tuple(encode_uncompressed(file_mask(mask, *sizes)) for mask in masks)


def file_mask(
    logits: Float32[np.ndarray, "rows columns"], padded: Size, resized: Size, size: Size
) -> Bool[np.ndarray, "h w"]:
    """The mask of an object at the size of its file, as DETR's PostProcessSegm makes it.

    Logits are resized to the padded image of the batch, cut to the ``resized`` image in it, and brought to ``size`` by
    nearest neighbours. The mask is where the probability is above a half.
    """
    from PIL import Image

    large = Image.fromarray(logits).resize((padded[1], padded[0]), Image.Resampling.BILINEAR)
    inside = Image.fromarray((np.asarray(large)[: resized[0], : resized[1]] > 0).astype(np.uint8))
    return np.asarray(inside.resize((size[1], size[0]), Image.Resampling.NEAREST)) != 0


# What is made of it


def draw_found(run: DetectorRun, found: FoundObjects, out: Path) -> Path:
    """The image with its objects, as PNG in the folder ``out``; small images are enlarged."""
    return draw_named(found, run.class_names, out)


def draw_named(found: FoundObjects, class_names: tuple[str, ...], out: Path) -> Path:
    """``draw_found`` with a name for each label."""
    from PIL import Image

    masks = None if found.masks is None else DecodedMasks(found.masks, found.size)
    objects = DrawnObjects(found.boxes, found.labels, found.scores, masks)
    drawn = draw_objects(decode_image(found.path), objects, class_names)
    out.mkdir(parents=True, exist_ok=True)
    target = free_name(out, found.path.stem)
    Image.fromarray(drawn).save(target)
    return target


def describe_found(found: FoundObjects, threshold: float | int, picture: Path) -> str:
    """A line for the image and one for each object: class, score, box."""
    count = len(found.names)
    best = "" if count else f" (the best has {found.best:.3f})"
    head = f"{found.path}: {count} object{'s' * (count != 1)} of score {threshold:g} or more{best}  -> {picture}"
    width = max(map(len, found.names), default=0)
    lines = [
        f"  {name:<{width}}  {score:.3f}  xyxy {' '.join(f'{side:.1f}' for side in box)}"
        for name, score, box in zip(found.names, found.scores, found.boxes, strict=True)
    ]
    return "\n".join([head, *lines])


def coco_results(run: DetectorRun, found: Sequence[FoundObjects]) -> list[dict[str, Any]]:
    """Detections as COCO's results files have them, with ``file_name`` and ``category_name`` besides.

    ``bbox`` is x, y, width, height; ``segmentation`` run lengths, of detectors that give masks (needs [coco]).
    ``image_id`` is the number that the file's name is, where all names are different numbers as in COCO, else the
    place among the images from 1 on. ``category_id`` is COCO's where the classes are COCO's, else the number of the
    class from 0 on.
    """
    stems = [each.path.stem for each in found]
    numbered = all(stem.isdecimal() for stem in stems) and len({int(stem) for stem in stems}) == len(stems)
    categories = _category_ids(run.class_names)
    results = []
    for place, each in enumerate(found, 1):
        image_id = int(each.path.stem) if numbered else place
        for i, (box, label) in enumerate(zip(each.boxes, each.labels, strict=True)):
            x1, y1, x2, y2 = (round(float(side), 2) for side in box)
            row = {
                "image_id": image_id,
                "category_id": categories[int(label)],
                "bbox": [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)],
                "score": round(float(each.scores[i]), 5),
                "category_name": each.names[i],
                "file_name": str(each.path),
            }
            results.append(row if each.masks is None else row | {"segmentation": _text_code(each.masks[i])})
    return results


def _text_code(mask: UncompressedRLE) -> dict[str, Any]:
    """Run lengths as COCO's files of results have them."""
    return {"size": list(mask.size), "counts": compress(mask, *mask.size).counts.decode()}


def write_results(run: DetectorRun, found: Sequence[FoundObjects], path: Path) -> Path:
    """``coco_results`` as a JSON file; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(coco_results(run, found), indent=1) + "\n")
    return path


def _category_ids(class_names: tuple[str, ...]) -> tuple[int, ...]:
    """COCO's ids where every class of theirs has its name at its place, else the numbers from 0 on."""
    ids, names = coco_category_ids(len(class_names)), coco_class_names(len(class_names))
    same = all(mine == theirs for mine, theirs in zip(class_names, names, strict=False) if "unused" not in theirs)
    return ids if ids and same else tuple(range(len(class_names)))


# Evaluation


def evaluate_detector_run(
    path: str | Path, *, data_path: str | None = None, split: str | None = None
) -> dict[str, float]:
    """COCO's figures and the loss of the newest checkpoint, such as ``test/AP`` and ``test/mask_AP``, on the run's test
    split or on another split or path (an instances file, or a folder with annotations/*.json).

    Raises ValueError for classes there that the run does not have, and what sources and ``load_detector_run`` raise.
    """
    folder = RunFolder(path)
    run = load_detector_run(path)
    data = dataclasses.replace(run.config.data, test_split=split or run.config.data.test_split)
    if data_path is not None:
        data = dataclasses.replace(data, kind="coco", path=data_path)
    config = dataclasses.replace(run.config, data=data, loop=loop_here(run.config.loop))
    family = choose_family(config)
    source = _test_source(config, folder.class_names(), family.masks)
    mesh = make_mesh()
    model, stats = jax.device_put((run.model, run.stats), NamedSharding(mesh, P()))
    problem = Detection(config, source, source, len(run.class_names), family)
    metrics = problem.evaluator(mesh)(model, stats).metrics
    return {f"test/{name}": value for name, value in metrics.items()}


def _test_source(config: DetectionConfig, names: tuple[str, ...], masks: bool) -> Any:
    """The images to evaluate on, labelled as the run's: classes may be fewer there, or in another order."""
    data, channels = config.data, config.model.in_channels
    source = load_detection(data, channels, data.test_split, masks=masks)
    if tuple(source.class_names) == names:
        return source
    others = [name for name in source.class_names if name not in names]
    if data.kind != "coco" or others:
        shown = ", ".join(names[:5]) + " ..." * (len(names) > 5)
        raise ValueError(
            f"{data.path or data.kind}, split {data.test_split}, has the classes {', '.join(others[:5])}, "
            f"which the run does not have; it has {shown}"
        )
    ids, unused = dict(zip(source.class_names, source.category_ids, strict=True)), itertools.count(-1, -1)
    categories = Categories(tuple(ids[name] if name in ids else next(unused) for name in names), names)
    return load_detection(data, channels, data.test_split, categories, masks=masks)
