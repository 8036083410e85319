"""Forms of the operations of two-stage detectors, and the cases they are compared on: see detection_ops.py."""

import functools
import importlib
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.peer_models.torchvision_operators import has_kernels, usable_torchvision
from eqvision import ops
from eqvision.ops.anchors import pyramid_anchors
from eqvision.ops.iou_assignment import RPN_RULES, assign_by_iou

STRIDES, BINS, RATIO, FULL_CHANNELS, MASK = (4, 8, 16, 32), 7, 2, 256, 28
ANCHOR_SIZES = ((32,), (64,), (128,), (256,), (512,))


class Form(NamedTuple):
    """``call`` takes the inputs of its section. What is not ``jitted`` runs on the host, where memory is not known;
    what is not ``same`` computes something else on purpose and is not compared."""

    call: Callable
    jitted: bool = True
    same: bool = True


class Sizes(NamedTuple):
    """Of all cases; images are (height, width) in pixels."""

    image: tuple[int, int]
    boxes: int
    channels: int
    candidates: int
    targets: int
    objects: int
    paste_image: tuple[int, int]


class Section(NamedTuple):
    """``inputs`` makes the arrays; ``full`` tells their shapes at 256 channels, where channels matter."""

    title: str
    forms: dict[str, Form]
    inputs: Callable[[], Any]
    full: Callable[[], Any] | None = None


def sections(sizes: Sizes) -> dict[str, Section]:
    """By short name, in the order of the report."""
    image, align = sizes.image, align_forms()
    inputs = functools.partial(align_case, image, sizes.boxes, sizes.channels)
    full = functools.partial(jax.eval_shape, functools.partial(align_case, image, sizes.boxes, FULL_CHANNELS))
    what = f"{sizes.boxes} boxes, {image[0]} x {image[1]} pixels, {sizes.channels} channels"
    gradients = {name: gradient_of(form) for name, form in align.items() if form.jitted}
    anchors = len(anchors_of(image))
    pasted = f"{sizes.objects} objects, {sizes.paste_image[0]} x {sizes.paste_image[1]} pixels"
    return {
        "align": Section(f"RoIAlign, {what}", align, inputs, full),
        "gradient": Section("RoIAlign, gradient", gradients, inputs, full),
        "nms": Section(
            f"Non-maximum suppression, {sizes.candidates} boxes",
            nms_forms(),
            functools.partial(nms_case, image, sizes.candidates),
        ),
        "assignment": Section(
            f"Assignment by overlap, {anchors} anchors, {sizes.targets} objects",
            assignment_forms(),
            functools.partial(assignment_case, image, sizes.targets),
        ),
        "paste": Section(
            f"Mask paste, {pasted}",
            paste_forms(sizes.paste_image),
            functools.partial(paste_case, sizes.paste_image, sizes.objects),
        ),
    }


# RoIAlign


def corners(boxes, levels, sizes):
    """For boxes (r, 4): two cells and their shares for each sample along y and x, (r, bins * ratio, 2)."""
    boxes = boxes / jnp.asarray(STRIDES, jnp.float32)[levels][:, None] - 0.5
    fraction = (jnp.arange(BINS * RATIO) + 0.5) / (BINS * RATIO)
    size = jnp.asarray(sizes, jnp.float32)[levels]
    axes = []
    for low, high, cells in ((boxes[:, 1], boxes[:, 3], size[:, :1]), (boxes[:, 0], boxes[:, 2], size[:, 1:])):
        at = low[:, None] + fraction * (high - low)[:, None]
        near = (at >= -1) & (at <= cells)
        at = jnp.clip(at, 0, cells - 1)
        first = jnp.floor(at)
        second = jnp.minimum(first + 1, cells - 1)
        shares = jnp.stack([1 - at + first, at - first], axis=-1) * near[..., None]
        axes.append((jnp.stack([first, second], axis=-1).astype(jnp.int32), shares))
    return axes


def all_at_once(features, boxes, levels):
    """Four gathers of all samples of all boxes, then their mean."""
    sizes = [level.shape[1:3] for level in features]
    table = jnp.concatenate([level[0].reshape(-1, level.shape[-1]) for level in features])
    start = jnp.asarray(np.cumsum([0] + [h * w for h, w in sizes[:-1]]), jnp.int32)[levels]
    width = jnp.asarray([w for _, w in sizes], jnp.int32)[levels]
    (rows, shares_y), (columns, shares_x) = corners(boxes, levels, sizes)
    total = 0.0
    for i, j in np.ndindex(2, 2):
        cell = (start[:, None] + rows[..., i] * width[:, None])[:, :, None] + columns[:, None, :, j]
        total = total + table[cell] * (shares_y[:, :, None, i] * shares_x[:, None, :, j])[..., None]
    return total.reshape(-1, BINS, RATIO, BINS, RATIO, total.shape[-1]).mean(axis=(2, 4))


def in_blocks(features, boxes, levels, block: int = 64):
    """``all_at_once`` for 64 boxes after the other, and again in the gradient."""
    one = jax.checkpoint(lambda part: all_at_once(features, *part), prevent_cse=False)
    pad = -len(boxes) % block
    padded = jnp.pad(boxes, ((0, pad), (0, 0))), jnp.pad(levels, (0, pad))
    split = jax.tree.map(lambda x: x.reshape(-1, block, *x.shape[1:]), padded)
    values = lax.map(one, split)
    return values.reshape(-1, *values.shape[2:])[: len(boxes)]


def matrices(features, boxes, levels):
    """Every level times interpolation matrices for every box; those of other levels are zero."""
    sizes = [level.shape[1:3] for level in features]
    (rows, shares_y), (columns, shares_x) = corners(boxes, levels, sizes)
    total = 0.0
    for number, level in enumerate(features):
        here = (levels == number)[:, None, None]
        by_row = _matrix(rows, shares_y * here, level.shape[1])
        by_column = _matrix(columns, shares_x, level.shape[2])
        total = total + jnp.einsum("rph,hwc,rqw->rpqc", by_row, level[0], by_column, precision=lax.Precision.HIGHEST)
    return total


def _matrix(cells, shares, count: int):
    hits = jax.nn.one_hot(cells, count) * shares[..., None]
    return hits.sum(axis=2).reshape(len(cells), BINS, RATIO, count).mean(axis=2)


def ours(features, boxes, levels, sampling_ratio: int = RATIO):
    pooled = ops.roi_align(
        features, boxes[None], levels[None], strides=STRIDES, bins=BINS, sampling_ratio=sampling_ratio
    )
    return pooled.values[0]


def torchvision_align(features, boxes, levels):
    """Level by level, as torchvision's ``MultiScaleRoIAlign``; channels lie in front."""
    import torch
    import torchvision

    maps = [torch.from_numpy(np.asarray(level)).permute(0, 3, 1, 2) for level in features]
    boxes, levels = torch.from_numpy(np.asarray(boxes)), torch.from_numpy(np.asarray(levels))
    result = torch.zeros(len(boxes), maps[0].shape[1], BINS, BINS)
    for number, (level, stride) in enumerate(zip(maps, STRIDES, strict=True)):
        own = torch.nonzero(levels == number)[:, 0]
        result[own] = torchvision.ops.roi_align(level, [boxes[own]], BINS, 1 / stride, RATIO, aligned=True)
    return result.permute(0, 2, 3, 1).numpy()


def align_case(image: tuple[int, int], boxes: int, channels: int):
    """Sides from 16 pixels to two thirds of the image, evenly in their logarithm; half cells cut off at the borders."""
    rng = np.random.default_rng(0)
    features = tuple(rng.normal(size=(1, image[0] // s, image[1] // s, channels)) for s in STRIDES)
    limit = np.array([image[1], image[0]] * 2)
    sides = np.exp(rng.uniform(np.log(16), np.log(min(image) * 2 / 3), (boxes, 2)))
    centres = rng.uniform(0, limit[:2], (boxes, 2))
    corners = np.clip(np.concatenate([centres - sides / 2, centres + sides / 2], axis=1), 0, limit)
    boxes = jnp.asarray(corners, jnp.float32)
    features = tuple(jnp.asarray(level, jnp.float32) for level in features)
    return features, boxes, ops.fpn_levels(boxes, num_levels=len(STRIDES))


def align_forms() -> dict[str, Form]:
    forms = {
        "all samples at once": Form(all_at_once),
        "all samples, 64 boxes at a time": Form(in_blocks),
        "interpolation matrices, every level": Form(matrices),
        "ours": Form(ours),
        "ours, adaptive sampling": Form(functools.partial(ours, sampling_ratio=0), same=False),
    }
    return forms | torchvision_forms(torchvision_align)


def torchvision_forms(call: Callable) -> dict[str, Form]:
    """torchvision's row: its compiled operators where they can be loaded, else their forms in PyTorch."""
    if missing_torchvision():
        return {}
    name = "torchvision" if has_kernels() else "torchvision's rule in PyTorch, not compiled"
    return {name: Form(call, jitted=False)}


@functools.cache
def missing_torchvision() -> str:
    """Why it cannot be used, or nothing."""
    try:
        usable_torchvision()
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError) as error:
        return f"torchvision cannot be imported ({error}), and is left out."
    return ""


def gradient_of(form: Form) -> Form:
    """With respect to the maps, of a sum that is not linear."""

    def gradient(features, boxes, levels):
        return jax.grad(lambda features: jnp.sum(jnp.sin(form.call(features, boxes, levels))))(features)

    return form._replace(call=gradient)


# Non-maximum suppression


def table_of_pairs(boxes, scores, threshold: float = 0.7):
    """All overlaps at once, and one box after the other."""
    order = jnp.argsort(-scores)
    above = ops.pairwise_iou(boxes[order], boxes[order]) > threshold
    later = jnp.arange(len(scores))

    def step(i, keep):
        return keep & ~(above[i] & keep[i] & (later > i))

    keep = lax.fori_loop(0, len(scores), step, jnp.ones(len(scores), bool))
    return jnp.zeros(len(scores), bool).at[order].set(keep)


def torchvision_nms(boxes, scores, threshold: float = 0.7):
    import torch
    import torchvision

    kept = torchvision.ops.nms(*(torch.from_numpy(np.asarray(x)) for x in (boxes, scores)), threshold)
    return np.isin(np.arange(len(scores)), kept.numpy())


def nms_forms() -> dict[str, Form]:
    forms = {"table of all pairs": Form(table_of_pairs), "ours": Form(functools.partial(ops.nms, threshold=0.7))}
    return forms | torchvision_forms(torchvision_nms)


def nms_case(image: tuple[int, int], count: int):
    _, boxes, _ = align_case(image, count, 1)
    return boxes, jnp.asarray(np.random.default_rng(1).uniform(size=count), jnp.float32)


# Assignment of anchors to objects by overlap


def table_of_overlaps(anchors, targets):
    """All overlaps at once; labels as of ``assign_by_iou``, and rows of targets where they are positive."""
    rule, overlaps = RPN_RULES["torchvision"], ops.pairwise_iou(targets, anchors)
    best, which = overlaps.max(axis=0), overlaps.argmax(axis=0)
    label = jnp.where(best >= rule.high, 1, jnp.where(best < rule.low, 0, -1))
    label = jnp.where(jnp.any(overlaps == overlaps.max(axis=1, keepdims=True), axis=0), 1, label)
    return label, jnp.where(label == 1, which, 0)


def our_assignment(anchors, targets):
    assigned = assign_by_iou(anchors, targets, jnp.ones(len(targets), bool), rule=RPN_RULES["torchvision"])
    return assigned.label, jnp.where(assigned.label == 1, assigned.target, 0)


def torchvision_matcher(anchors, targets):
    import torch
    from torchvision.models.detection._utils import Matcher
    from torchvision.ops import box_iou

    anchors, targets = (torch.from_numpy(np.asarray(x)) for x in (anchors, targets))
    found = Matcher(0.7, 0.3, allow_low_quality_matches=True)(box_iou(targets, anchors)).numpy()
    return np.where(found >= 0, 1, np.where(found == -1, 0, -1)), np.maximum(found, 0)


def assignment_forms() -> dict[str, Form]:
    forms = {"table of all overlaps": Form(table_of_overlaps), "ours": Form(our_assignment)}
    return forms | ({} if missing_torchvision() else {"torchvision": Form(torchvision_matcher, jitted=False)})


def anchors_of(image: tuple[int, int]) -> np.ndarray:
    strides = [(4 * 2**i,) * 2 for i in range(5)]
    grids = [tuple(-(-side // s) for side, s in zip(image, pair, strict=True)) for pair in strides]
    return np.concatenate(pyramid_anchors(grids, strides, sizes=ANCHOR_SIZES, dialect="torchvision"))


def assignment_case(image: tuple[int, int], targets: int):
    _, boxes, _ = align_case(image, targets, 1)
    return jnp.asarray(anchors_of(image), jnp.float32), boxes


# Mask paste


def gather_every_pixel(masks, boxes, size: tuple[int, int]):
    """Each pixel of each object's image reads its mask."""

    def one(mask, box):
        y = (jnp.arange(size[0]) + 0.5 - box[1]) / (box[3] - box[1]) * MASK - 0.5
        x = (jnp.arange(size[1]) + 0.5 - box[0]) / (box[2] - box[0]) * MASK - 0.5
        at = jnp.meshgrid(y, x, indexing="ij")
        return jax.scipy.ndimage.map_coordinates(mask, at, order=1) >= 0.5

    return jax.vmap(one)(masks, boxes)


def torch_grid_sample(masks, boxes, size: tuple[int, int]):
    """All objects in one call, as detectron2 does on a GPU."""
    import torch

    masks, boxes = (torch.tensor(np.asarray(x)) for x in (masks, boxes))
    x0, y0, x1, y1 = (boxes[:, i, None] for i in range(4))
    y = (torch.arange(size[0]) + 0.5 - y0) / (y1 - y0) * 2 - 1
    x = (torch.arange(size[1]) + 0.5 - x0) / (x1 - x0) * 2 - 1
    grid = torch.stack(
        [x[:, None, :].expand(-1, size[0], -1), y[:, :, None].expand(-1, -1, size[1])],
        dim=3,
    )
    return (torch.nn.functional.grid_sample(masks[:, None], grid, align_corners=False)[:, 0] >= 0.5).numpy()


def paste_forms(size: tuple[int, int]) -> dict[str, Form]:
    forms = {
        "gather at every pixel": Form(functools.partial(gather_every_pixel, size=size)),
        "ours, on the device": Form(lambda masks, boxes: ops.paste_masks(masks[None], boxes[None], size)[0]),
        "ours, on the host, run lengths": Form(functools.partial(_run_lengths, size=size), jitted=False, same=False),
    }
    torch_form = {"torch, grid_sample": Form(functools.partial(torch_grid_sample, size=size), jitted=False)}
    return forms | (torch_form if find_spec("torch") else {})


def _run_lengths(masks, boxes, size: tuple[int, int]):
    return sum(len(code["counts"]) for code in ops.pasted_run_lengths(np.asarray(masks), np.asarray(boxes), size))


def paste_case(image: tuple[int, int], objects: int):
    _, boxes, _ = align_case(image, objects, 1)
    return jnp.asarray(np.random.default_rng(2).uniform(size=(objects, MASK, MASK)), jnp.float32), boxes
