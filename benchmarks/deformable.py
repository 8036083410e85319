"""Forms of multi-scale deformable sampling side by side: memory of temporaries and time, forward and gradient.

Run from the repository root::

    python benchmarks/deformable.py > benchmarks/results/deformable.md
    python benchmarks/deformable.py --rounds 3 --width 32 --image 400 667

The case is one encoder layer of Deformable DETR on one image: strides 8 to 64, every cell a query, 8 heads, 4 levels of
4 points. Times are taken at a reduced width; memory is also what the compiler plans at width 256. Every round calls
each form once, in turn, so that a slow minute of the machine meets all of them.
"""

import argparse
import functools
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import timing
from eqvision.ops import multi_scale_deformable_sampling

HEADS, POINTS, STRIDES, FULL_WIDTH = 8, 4, (8, 16, 32, 64), 256
PACKAGES = ("jax", "jaxlib", "numpy", "eqvision")


class Measured(NamedTuple):
    """Of one program: temporaries in bytes at the width timed and at 256, and its runs."""

    temp_bytes: int
    full_temp_bytes: int
    wall: timing.Summary
    cpu: timing.Summary
    others: timing.Summary


# The forms


def four_gathers(values, locations, weights):
    """The plain form: per level four gathers over all heads and queries, and nothing gathered twice."""
    return sum(_four(level, locations[:, :, :, i], weights[:, :, :, i]) for i, level in enumerate(values))


def _four(level, locations, weights):
    """One level, for images and heads in two ``vmap``."""
    one = jax.vmap(_four_of_head, in_axes=(2, 1, 1), out_axes=1)
    return jax.vmap(one)(level, locations, weights)


def _four_of_head(cells, locations, weights):
    height, width, _ = cells.shape
    x, y, left, top, weights = _corner(locations, weights, height, width)
    total = 0.0
    for row, share_y in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, share_x in ((left, 1 - (x - left)), (left + 1, x - left)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            at = (jnp.clip(row, 0, height - 1).astype(int), jnp.clip(column, 0, width - 1).astype(int))
            share = jnp.where(inside, share_y * share_x * weights, 0.0)
            total = total + jnp.einsum("qpd,qp->qd", cells[at], share)
    return total


def one_packed_gather(values, locations, weights):
    """Head by head; four corners side by side in a table of (h + 1) x (w + 1) cells with a border of zeros."""

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one_head(head):
        values, locations, weights = head
        levels = enumerate(values)
        return sum(jax.vmap(_packed_level)(level, locations[:, :, i], weights[:, :, i]) for i, level in levels)

    in_front = tuple(jnp.moveaxis(level, 3, 0) for level in values)
    heads = (in_front, jnp.moveaxis(locations, 2, 0), jnp.moveaxis(weights, 2, 0))
    return jnp.moveaxis(lax.map(one_head, heads), 0, 2)


def _packed_level(cells, locations, weights):
    height, width, depth = cells.shape
    x, y, left, top, weights = _corner(locations, weights, height, width)
    edged = jnp.pad(cells, ((1, 1), (1, 1), (0, 0)))
    corners = [edged[:-1, :-1], edged[:-1, 1:], edged[1:, :-1], edged[1:, 1:]]
    packed = jnp.concatenate(corners, axis=-1).reshape(-1, 4 * depth)
    at = ((top + 1) * (width + 1) + left + 1).astype(int)
    down, right = y - top, x - left
    shares = jnp.stack([(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right], axis=-1)
    rows = packed.at[at].get(mode="promise_in_bounds").reshape(*at.shape, 4, depth)
    return jnp.einsum("qpkd,qpk->qd", rows, shares * weights[..., None])


def _corner(locations, weights, height: int, width: int):
    """Coordinates in cells, those of the cell above and before, and weights that are zero for points far outside."""
    x, y = locations[..., 0] * width - 0.5, locations[..., 1] * height - 0.5
    near = (x > -1) & (x < width) & (y > -1) & (y < height)
    x, y, weights = (jnp.where(near, value, 0.0) for value in (x, y, weights))
    return x, y, jnp.floor(x), jnp.floor(y), weights


def forms(samples: int) -> dict[str, Callable]:
    """``samples``: queries times images."""
    ours = functools.partial(functools.partial, multi_scale_deformable_sampling)
    return {
        "four gathers per level": four_gathers,
        "one packed gather, head by head": one_packed_gather,
        "ours, head by head": ours(block_size=samples),
        "ours, blocks of 16384 (default)": ours(),
        "ours, blocks of 4096": ours(block_size=4096),
    }


# The case


def grid_of(image: tuple[int, int]) -> list[tuple[int, int]]:
    """(height, width) of each level."""
    return [(-(-image[0] // stride), -(-image[1] // stride)) for stride in STRIDES]


def case(grid: Sequence[tuple[int, int]], width: int):
    """Random values; every cell's query looks around its own place, 5 % of the image far (standard deviation)."""
    rng = np.random.default_rng(0)
    values = tuple(rng.normal(size=(1, *size, HEADS, width // HEADS)) for size in grid)
    places = np.concatenate([np.moveaxis(np.indices(size), 0, -1).reshape(-1, 2) + 0.5 for size in grid])
    places = places[:, ::-1] / np.concatenate([[(w, h)] * (h * w) for h, w in grid])
    locations = rng.normal(places[None, :, None, None, None], 0.05, (1, len(places), HEADS, len(grid), POINTS, 2))
    weights = rng.uniform(0, 2 / (len(grid) * POINTS), size=locations.shape[:-1])
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (values, locations, weights))


def gradient_of(form: Callable) -> Callable:
    """Gradients with respect to values, locations and weights, of a sum that is not linear."""
    return jax.grad(lambda *inputs: jnp.sum(jnp.sin(form(*inputs))), argnums=(0, 1, 2))


def measure(programs: dict[str, Callable], inputs, full_shapes, rounds: int) -> dict[str, Measured]:
    """Compile all, check that they agree, then time them in turn."""
    compiled = {name: timing.compile_ahead(program, inputs) for name, program in programs.items()}
    full = {name: timing.compile_ahead(program, full_shapes).temp_bytes for name, program in programs.items()}
    _check_equal({name: each.call(*inputs) for name, each in compiled.items()})
    runs: dict[str, list[timing.Runs]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, each in compiled.items():
            call = functools.partial(lambda each: jax.block_until_ready(each.call(*inputs)), each)
            runs[name].append(timing.time_runs(call, 1, warmup=0))
    return {name: _summary(compiled[name].temp_bytes, full[name], runs[name]) for name in programs}


def _summary(temp_bytes: int, full_temp_bytes: int, runs: list[timing.Runs]) -> Measured:
    columns = ([run[field][0] for run in runs] for field in range(3))
    return Measured(temp_bytes, full_temp_bytes, *map(timing.summarise, columns))


def _check_equal(results: dict[str, object]) -> None:
    """Gradients with respect to locations jump at cell borders, where forms may round to either side: 1 in 10,000."""
    first, *others = results.items()
    for name, result in others:
        for one, other in zip(jax.tree.leaves(first[1]), jax.tree.leaves(result), strict=True):
            scale = float(jnp.max(jnp.abs(one)))
            wrong = float(jnp.mean(jnp.abs(one - other) > 1e-3 * scale))
            if not wrong < 1e-4:
                raise ValueError(f"{name!r} differs from {first[0]!r} in {wrong:.2%} of its numbers")


# The report


def table(forward: dict[str, Measured], gradient: dict[str, Measured]) -> str:
    heads = ["form", *(f"{task} {what}" for task in ("forward", "gradient") for what in COLUMNS)]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for name in forward:
        cells = [name, *_cells(forward[name]), *_cells(gradient[name])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


COLUMNS = ("MB", "MB at width 256", "ms", "best ms", "processor ms")


def _cells(measured: Measured) -> list[str]:
    wall = f"{measured.wall.median * 1e3:.0f} ± {measured.wall.spread * 1e3:.0f}"
    memory = (f"{size / 1e6:.0f}" for size in (measured.temp_bytes, measured.full_temp_bytes))
    return [*memory, wall, f"{measured.wall.minimum * 1e3:.0f}", f"{measured.cpu.minimum * 1e3:.0f}"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=int, nargs=2, default=(800, 1333), help="height and width")
    parser.add_argument("--width", type=int, default=64, help="channels of all heads together, for the times")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args(arguments)
    grid = grid_of(tuple(given.image))
    inputs = case(grid, given.width)
    full = jax.eval_shape(lambda: case(grid, FULL_WIDTH))
    queries = inputs[1].shape[1]
    compared = forms(queries)
    forward = measure(compared, inputs, full, given.rounds)
    gradients = {name: gradient_of(form) for name, form in compared.items()}
    gradient = measure(gradients, inputs, full, given.rounds)
    command = shlex.join(["python", "benchmarks/deformable.py", *(sys.argv[1:] if arguments is None else arguments)])
    others = [each.others.median for each in gradient.values()]
    print("# Deformable sampling\n")
    print(f"Device: {jax.devices()[0].device_kind}, {timing.processor_name()}.\n")
    print(f"Versions: {timing.versions(PACKAGES)}.\n\nCommand: `{command}`\n")
    print(f"{given.image[0]} x {given.image[1]} pixels: levels of {' '.join(f'{h}x{w}' for h, w in grid)} cells,")
    print(f"{queries} queries, {HEADS} heads, {POINTS} points a level, width {given.width}, float32. MB (1e6 bytes)")
    print("are XLA's temporaries. Times: median ± half the interquartile range over")
    print(f"{given.rounds} rounds, the best, and the least processor time of a call over all threads. Other")
    print(f"processes took {min(others):.0%} to {max(others):.0%} of the machine meanwhile (medians, gradients).\n")
    print(table(forward, gradient))


if __name__ == "__main__":
    main()
