"""Operations of two-stage detectors beside their plain forms, and torch's: memory of temporaries and time.

Run from the repository root::

    python benchmarks/detection_ops.py > benchmarks/results/detection_ops.md
    python benchmarks/detection_ops.py --rounds 3 --image 512 512 --boxes 128 --objects 20 --candidates 1000

RoIAlign of boxes of all sizes on the pyramid of one image, non-maximum suppression, and masks pasted into an image.
Matching to ground truth has a program of its own (benchmarks/assignment.py). Times are taken at ``--channels``; memory
is also what the compiler plans at 256. Every round calls each form once, in turn.
"""

import argparse
import functools
import importlib
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import timing
from eqvision import ops

STRIDES, BINS, RATIO, FULL_CHANNELS, MASK = (4, 8, 16, 32), 7, 2, 256, 28
PACKAGES = ("jax", "jaxlib", "numpy", "eqvision", "torch", "torchvision")


class Form(NamedTuple):
    """``call`` takes the inputs of its section. What is not ``jitted`` runs on the host, where memory is not known;
    what is not ``same`` computes something else on purpose and is not compared."""

    call: Callable
    jitted: bool = True
    same: bool = True


class Row(NamedTuple):
    """``temp_bytes`` and ``full_temp_bytes`` (at 256 channels) are -1 where nobody knows them."""

    form: str
    temp_bytes: int
    full_temp_bytes: int
    wall: timing.Summary
    cpu: timing.Summary


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
    return forms | ({"torchvision": Form(torchvision_align, jitted=False)} if not missing_torchvision() else {})


def missing_torchvision() -> str:
    """Why it cannot be used, or nothing. Its operators are missing where it was built for another torch."""
    try:
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
    return forms | ({"torchvision": Form(torchvision_nms, jitted=False)} if not missing_torchvision() else {})


def nms_case(image: tuple[int, int], count: int):
    _, boxes, _ = align_case(image, count, 1)
    return boxes, jnp.asarray(np.random.default_rng(1).uniform(size=count), jnp.float32)


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


# Measuring and the report


def measure(forms: dict[str, Form], inputs: Any, rounds: int, full: Any = None) -> list[Row]:
    """Compile all, check that they agree, then time them in turn; ``full``: shapes for the second figure of memory."""
    calls, memory = {}, {}
    for name, form in forms.items():
        compiled = timing.compile_ahead(form.call, inputs) if form.jitted else None
        calls[name] = compiled.call if compiled else form.call
        whole = timing.compile_ahead(form.call, full).temp_bytes if compiled and full is not None else -1
        memory[name] = (compiled.temp_bytes if compiled else -1, whole)
    _check_equal({name: call(*inputs) for name, call in calls.items() if forms[name].same})
    runs: dict[str, list[timing.Runs]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, call in calls.items():
            runs[name].append(timing.time_runs(lambda call=call: jax.block_until_ready(call(*inputs)), 1, warmup=0))
    return [_row(name, memory[name], runs[name]) for name in forms]


def _row(name: str, memory: tuple[int, int], runs: list[timing.Runs]) -> Row:
    wall, cpu = (timing.summarise([run[field][0] for run in runs]) for field in range(2))
    return Row(name, *memory, wall, cpu)


def _check_equal(results: dict[str, Any]) -> None:
    """Booleans may flip where a value meets the threshold, and samples at the border of a cell: 1 in 10 000."""
    first, *others = results.items()
    for name, result in others:
        for one, other in zip(jax.tree.leaves(first[1]), jax.tree.leaves(result), strict=True):
            one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
            wrong = float(np.mean(np.abs(one - other) > 1e-3 * np.max(np.abs(one))))
            if not wrong < 1e-4:
                raise ValueError(f"{name!r} differs from {first[0]!r} in {wrong:.2%} of its numbers")


HEADS = ("form", "MB", "MB at 256 channels", "ms", "best ms", "processor ms")


def table(rows: list[Row]) -> str:
    lines = ["| " + " | ".join(HEADS) + " |", "|---|" + "---:|" * (len(HEADS) - 1)]
    for row in rows:
        memory = (f"{size / 1e6:.1f}" if size >= 0 else "" for size in (row.temp_bytes, row.full_temp_bytes))
        wall = f"{row.wall.median * 1e3:.1f} ± {row.wall.spread * 1e3:.1f}"
        times = wall, f"{row.wall.minimum * 1e3:.1f}", f"{row.cpu.minimum * 1e3:.1f}"
        lines.append("| " + " | ".join([row.form, *memory, *times]) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=int, nargs=2, default=(1024, 1024), help="height and width")
    parser.add_argument("--boxes", type=int, default=512, help="of RoIAlign")
    parser.add_argument("--channels", type=int, default=64, help="of the maps, for the times")
    parser.add_argument("--candidates", type=int, default=4000, help="boxes of non-maximum suppression")
    parser.add_argument("--objects", type=int, default=100, help="masks to paste")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args(arguments)
    command = shlex.join(["python", "benchmarks/detection_ops.py", *(sys.argv[1:] if arguments is None else arguments)])
    print("# Operations of two-stage detectors\n")
    print(f"Device: {jax.devices()[0].device_kind}, {timing.processor_name()}.\n")
    print(f"Versions: {timing.versions(PACKAGES)}.\n\nCommand: `{command}`\n")
    print("MB (1e6 bytes) are XLA's temporaries. Times: median ± half the interquartile range over")
    print(f"{given.rounds} rounds, the best, and the least processor time of a call over all threads; float32.")
    print(missing_torchvision())
    for title, rows in sections(given):
        print(f"\n## {title}\n\n{table(rows)}")


def sections(given: argparse.Namespace):
    """The title and rows of each table, in turn."""
    image = tuple(given.image)
    inputs = align_case(image, given.boxes, given.channels)
    full = jax.eval_shape(lambda: align_case(image, given.boxes, FULL_CHANNELS))
    forms = align_forms()
    what = f"{given.boxes} boxes, {image[0]} x {image[1]} pixels, {given.channels} channels"
    yield f"RoIAlign, {what}", measure(forms, inputs, given.rounds, full)
    gradients = {name: gradient_of(form) for name, form in forms.items() if form.jitted}
    yield "RoIAlign, gradient", measure(gradients, inputs, given.rounds, full)
    candidates = nms_case(image, given.candidates)
    yield f"Non-maximum suppression, {given.candidates} boxes", measure(nms_forms(), candidates, given.rounds)
    objects = paste_case(image, given.objects)
    yield f"Mask paste, {given.objects} objects", measure(paste_forms(image), objects, given.rounds)


if __name__ == "__main__":
    main()
