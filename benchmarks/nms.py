"""Suppression side by side: in tiles, one pick after the other, and over the table of all pairs.

Run from the repository root::

    python benchmarks/nms.py --csv benchmarks/results/nms.csv > benchmarks/results/nms.md
    python benchmarks/nms.py --case 5x2000@0.7 --rounds 3

A case is problems x boxes @ threshold. Boxes stand around 100 centres in an image of 800 x 1333 pixels, with random
scores, so that about one in five falls out at 0.7. Every round times each contestant a few times, in turn, so that a
slow minute of the machine meets all of them.
"""

import argparse
import functools
import re
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
from eqvision import ops

CASES = ("1x4000@0.7", "1x4000@0.5", "5x2000@0.7")
CALLS = 3  # of each contestant in a round
BASELINE = "table of all pairs"
PACKAGES = ("jax", "jaxlib", "numpy", "eqvision")


class Case(NamedTuple):
    problems: int
    boxes: int
    threshold: float

    def __str__(self) -> str:
        return f"{self.problems}x{self.boxes}@{self.threshold:g}"


class Row(NamedTuple):
    """One contestant on one case: milliseconds a call, and what XLA holds meanwhile beside arguments and results.

    ``wrong`` is the number of boxes decided otherwise than by the picks one after the other, all problems together.
    """

    case: str
    contestant: str
    median_ms: float
    spread_ms: float
    best_ms: float
    processor_ms: float
    compile_s: float
    temporaries_mb: float
    ratio_to_table: float
    kept: int
    wrong: int
    disturbed: int


def parse_case(text: str) -> Case:
    """``1x4000@0.7``; ArgumentTypeError otherwise."""
    found = re.fullmatch(r"(\d+)x(\d+)@(0?\.\d+|0|1)", text)
    if not found or not int(found[1]) or not int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not PROBLEMSxBOXES@THRESHOLD, as in 1x4000@0.7")
    return Case(int(found[1]), int(found[2]), float(found[3]))


def generate(case: Case) -> tuple[jax.Array, jax.Array]:
    """Boxes (problems, boxes, 4) and scores."""
    rng = np.random.default_rng(0)
    shape = case.problems, case.boxes, 2
    centres = rng.uniform(0, (1333, 800), (case.problems, 100, 2))
    chosen = rng.integers(0, 100, shape[:2])
    centre = np.take_along_axis(centres, chosen[..., None], axis=1) + rng.normal(0, 15, shape)
    half = rng.uniform(10, 75, shape)
    scores = rng.random(shape[:2])
    return jnp.asarray(np.concatenate([centre - half, centre + half], -1), jnp.float32), jnp.asarray(
        scores, jnp.float32
    )


def picks(boxes: jax.Array, scores: jax.Array, threshold: float) -> jax.Array:
    """The definition as a loop: the best of what is left, then whatever overlaps it too much falls out."""

    def pick(state):
        left, kept = state
        best = jnp.argmax(jnp.where(left, scores, -jnp.inf))
        clash = ops.pairwise_iou(boxes[best][None], boxes)[0] > threshold
        here = jnp.arange(len(scores)) == best
        return left & ~clash & ~here, kept | here

    start = jnp.isfinite(scores), jnp.zeros_like(scores, bool)
    return lax.while_loop(lambda state: jnp.any(state[0]), pick, start)[1]


def table(boxes: jax.Array, scores: jax.Array, threshold: float) -> jax.Array:
    """All overlaps at once, then row after row in order of scores."""
    order = jnp.argsort(-scores, stable=True)
    clash = ops.pairwise_iou(boxes[order], boxes[order]) > threshold
    later = jnp.arange(len(scores))

    def row(i, kept):
        return kept & ~(kept[i] & clash[i] & (later > i))

    return jnp.zeros_like(scores, bool).at[order].set(lax.fori_loop(0, len(scores), row, jnp.isfinite(scores)))


def table_at_once(boxes: jax.Array, scores: jax.Array, threshold: float) -> jax.Array:
    """All overlaps at once, and all rows at once until nothing changes any more."""
    order = jnp.argsort(-scores, stable=True)
    place = jnp.arange(len(scores))
    clash = (ops.pairwise_iou(boxes[order], boxes[order]) > threshold) & (place[:, None] < place)
    every = jnp.isfinite(scores)

    def again(state):
        kept = every & ~jnp.any(clash & state[0][:, None], axis=0)
        return kept, jnp.any(kept != state[0])

    kept = lax.while_loop(lambda state: state[1], again, (every, jnp.bool_(True)))[0]
    return jnp.zeros_like(scores, bool).at[order].set(kept)


def contestants(threshold: float) -> dict[str, Callable]:
    """From boxes and scores of several problems to the boxes to keep."""
    vmapped = {"one pick after the other": picks, BASELINE: table, "table, all rows at once": table_at_once}
    ours = functools.partial(ops.nms, threshold=threshold)
    return {"tiles": ours, "tiles, best 1000": functools.partial(ours, max_kept=1000)} | {
        name: jax.vmap(functools.partial(function, threshold=threshold)) for name, function in vmapped.items()
    }


def measure(case: Case, rounds: int) -> list[Row]:
    """Every contestant in each round, after one call that is not timed."""
    jax.clear_caches()  # or a case with the shapes of the one before would compile in no time
    arrays = generate(case)
    programs = {name: timing.compile_ahead(run, arrays) for name, run in contestants(case.threshold).items()}
    runs = {name: timing.Runs([], [], []) for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            timed = timing.time_runs(lambda program=program: program.call(*arrays).block_until_ready(), CALLS, warmup=1)
            for kept, new in zip(runs[name], timed, strict=True):
                kept += new
    results = {name: np.asarray(program.call(*arrays)) for name, program in programs.items()}
    right = results["one pick after the other"]
    slowest = timing.summarise(runs[BASELINE].wall).median
    return [row(case, name, programs[name], runs[name], slowest, results[name], right, arrays[1]) for name in programs]


def row(
    case: Case, name: str, program: timing.Compiled, runs: timing.Runs, baseline: float, kept, right, scores
) -> Row:
    """``disturbed``: calls during which other processes took more than a tenth of the machine, where that is known."""
    if "best 1000" in name:
        right = right & (np.argsort(np.argsort(-np.where(right, scores, -1), axis=-1), axis=-1) < 1000)
    wall = timing.summarise(runs.wall)
    times = 1e3 * wall.median, 1e3 * wall.spread, 1e3 * wall.minimum, 1e3 * timing.summarise(runs.cpu).median
    cost = program.trace_s + program.compile_s, program.temp_bytes / 1e6, baseline / wall.median
    disturbed = sum(not timing.is_quiet(share) for share in runs.others)
    return Row(str(case), name, *times, *cost, int(kept.sum()), int((kept != right).sum()), disturbed)


def markdown(rows: Sequence[Row]) -> str:
    """One line for each row; ratios above 1 are faster than the table of all pairs."""
    heads = (
        "case",
        "form",
        "ms",
        "best ms",
        "processor ms",
        "compile s",
        "temporaries MB",
        "table / this",
        "kept",
        "wrong",
    )
    return timing.markdown_table(heads, [_cells(row) for row in rows], named=2)


def _cells(row: Row) -> tuple[str, ...]:
    time = f"{row.median_ms:.3g} ± {row.spread_ms:.2g}", f"{row.best_ms:.3g}", f"{row.processor_ms:.3g}"
    cost = f"{row.compile_s:.2f}", f"{row.temporaries_mb:.2f}", f"{row.ratio_to_table:.1f}"
    return row.case, row.contestant, *time, *cost, str(row.kept), str(row.wrong)


def main(arguments: Sequence[str] | None = None) -> None:
    options = timing.comparison_options(
        str(__doc__), arguments, parse_case=parse_case, cases=CASES, calls=CALLS, rounds=5
    )
    rows = [row for case in options.case for row in measure(case, options.rounds)]
    print(timing.report_head("NMS", "benchmarks/nms.py", PACKAGES, arguments))
    print(
        f"Median ± half the interquartile range over {options.rounds} rounds of {CALLS} calls of each form, in turn."
        " Cases are problems x boxes @ threshold. Temporaries are XLA's own figure. Wrong: boxes decided otherwise than"
        " by picking one after the other.\n"
    )
    print(markdown(rows))
    if options.csv:
        timing.write_csv(options.csv, rows)


if __name__ == "__main__":
    main()
