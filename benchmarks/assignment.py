"""Matchers side by side: the solver that visits valid targets only, optax, SciPy on the host, greedy, Sinkhorn.

Run from the repository root::

    python benchmarks/assignment.py --csv benchmarks/results/assignment.csv > benchmarks/results/assignment.md
    python benchmarks/assignment.py --case 48x300x100:7 --rounds 3

A case is problems x queries x targets, then the mean number of valid targets (none given: all are valid). Every round
times each contestant a few times, in turn, so that a slow minute of the machine meets all of them. The costs are
those of DETR (Carion et al. 2020, section 3.1) for random boxes and class scores; padded columns hold one constant,
which is what a solver without a mask is given.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import timing
from eqvision import ops
from eqvision.ops.assignment import solve_on_host

CASES = ("48x100x100:7", "8x300x100:7", "8x300x100", "8x100x20")
CALLS = 3  # of each contestant in a round
OURS, BASELINE = "hungarian", "optax, vmapped"
PACKAGES = ("jax", "jaxlib", "optax", "scipy", "numpy", "eqvision")


class Case(NamedTuple):
    """``valid`` is the mean number of valid targets of a problem, None for all of them."""

    problems: int
    queries: int
    targets: int
    valid: int | None

    def __str__(self) -> str:
        return f"{self.problems}x{self.queries}x{self.targets}" + (f", about {self.valid} valid" if self.valid else "")


class Row(NamedTuple):
    """One matcher on one case: milliseconds a call, and how far its total is above the least one, in per cent of it.

    ``processor_ms`` (median) is that of all threads of this process: other processes lengthen it less than the wall.
    """

    case: str
    matcher: str
    median_ms: float
    spread_ms: float
    best_ms: float
    processor_ms: float
    compile_s: float
    ratio_to_optax: float
    ratio_of_best: float
    above_optimum: float
    disturbed: int


def parse_case(text: str) -> Case:
    """``48x100x100:7``; ArgumentTypeError otherwise."""
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)(?::(\d+))?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not PROBLEMSxQUERIESxTARGETS or PROBLEMSxQUERIESxTARGETS:VALID")
    problems, queries, targets, valid = (int(group) if group else None for group in found.groups())
    if not problems or not queries or not targets or targets > queries or (valid or 0) > targets:
        raise argparse.ArgumentTypeError(f"{text!r}: expected at least one of each and valid <= targets <= queries")
    return Case(problems, queries, targets, valid)


def generate(case: Case) -> tuple[jax.Array, jax.Array]:
    """Costs with a constant in padded columns, and which targets are valid (the first ones, at least one)."""
    rng = np.random.default_rng(0)
    box = rng.uniform(size=(case.problems, case.queries, 1, 4)), rng.uniform(size=(case.problems, 1, case.targets, 4))
    boxes = [jnp.asarray(np.concatenate([b[..., :2], 0.3 * b[..., 2:] + 0.02], -1), jnp.float32) for b in box]
    overlap = ops.pairwise_giou(*(ops.cxcywh_to_xyxy(b).reshape(case.problems, -1, 4) for b in boxes))
    score = rng.dirichlet(np.ones(20), (case.problems, case.queries))[..., rng.integers(0, 20, case.targets)]
    cost = 5 * jnp.abs(boxes[0] - boxes[1]).sum(-1) - 2 * overlap - jnp.asarray(score, jnp.float32)
    full = np.full(case.problems, case.targets)
    counts = full if case.valid is None else rng.poisson(case.valid, case.problems).clip(1, case.targets)
    valid = jnp.arange(case.targets) < jnp.asarray(counts)[:, None]
    return jnp.where(valid[:, None], cost, 10.0), valid


def optax_vmapped(cost: jax.Array, valid: jax.Array) -> jax.Array:
    """optax knows no mask: padding is solved too, then taken out."""
    rows, columns = jax.vmap(optax.assignment.hungarian_algorithm)(cost)
    return jnp.where(valid, jnp.take_along_axis(rows, jnp.argsort(columns, axis=1), 1), -1)


def contestants() -> dict[str, tuple[Callable, bool]]:
    """Of each: the matcher, and whether it is compiled (SciPy's loop runs on arrays of the host as they are)."""
    return {
        OURS: (ops.hungarian, True),
        BASELINE: (optax_vmapped, True),
        "scipy, callback": (ops.scipy_assignment, True),
        "scipy, loop on the host": (solve_on_host, False),
        "greedy": (ops.greedy, True),
        "sinkhorn": (ops.sinkhorn, True),
    }


def prepare(matcher: Callable, compiled: bool, cost, valid) -> tuple[Callable[[], np.ndarray], float]:
    """A call that waits for its result, and the seconds to trace, lower and compile it."""
    if not compiled:
        host = np.asarray(cost), np.asarray(valid)
        return lambda: matcher(*host), 0.0
    program = timing.compile_ahead(matcher, (cost, valid))
    return lambda: program.call(cost, valid).block_until_ready(), program.trace_s + program.compile_s


def measure(case: Case, rounds: int) -> list[Row]:
    """Every contestant in each round, after one call that is not timed."""
    jax.clear_caches()  # or a case with the shapes of the one before would compile in no time
    cost, valid = generate(case)
    prepared = {name: prepare(*entry, cost, valid) for name, entry in contestants().items()}
    runs = {name: timing.Runs([], [], []) for name in prepared}
    for _ in range(rounds):
        for name, (call, _) in prepared.items():
            timed = timing.time_runs(call, CALLS, warmup=1)
            for kept, new in zip(runs[name], timed, strict=True):
                kept += new
    totals = {name: total(cost, valid, call()) for name, (call, _) in prepared.items()}
    least, slowest = totals["scipy, loop on the host"], timing.summarise(runs[BASELINE].wall)
    return [
        row(case, name, runs[name], prepared[name][1], slowest, 100 * (totals[name] - least) / abs(least))
        for name in prepared
    ]


def total(cost, valid, query) -> float:
    """The sum of the matched costs of all problems."""
    picked = np.take_along_axis(np.asarray(cost, np.float64), np.asarray(query)[:, None], 1)[:, 0]
    return float(picked[np.asarray(valid)].sum())


def row(case: Case, name: str, runs: timing.Runs, compile_s: float, baseline: timing.Summary, above: float) -> Row:
    """``disturbed``: calls during which other processes took more than a tenth of the machine, where that is known."""
    wall = timing.summarise(runs.wall)
    disturbed = sum(not timing.is_quiet(share) for share in runs.others)
    times = (1e3 * wall.median, 1e3 * wall.spread, 1e3 * wall.minimum)
    ratios = baseline.median / wall.median, baseline.minimum / wall.minimum
    processor = 1e3 * timing.summarise(runs.cpu).median
    return Row(str(case), name, *times, processor, compile_s, *ratios, above, disturbed)


def markdown(rows: Sequence[Row]) -> str:
    """One line for each row; ratios above 1 are faster than optax."""
    heads = (
        "case",
        "matcher",
        "ms",
        "best ms",
        "processor ms",
        "compile s",
        "optax / this",
        "best",
        "above least total",
    )
    return timing.markdown_table(heads, [_cells(row) for row in rows], named=2)


def _cells(row: Row) -> tuple[str, ...]:
    time = f"{row.median_ms:.3g} ± {row.spread_ms:.2g}"
    compiled = f"{row.compile_s:.2f}" if row.compile_s else "-"
    above = "0" if abs(row.above_optimum) < 1e-4 else f"{row.above_optimum:+.2g} %"
    ratios = f"{row.ratio_to_optax:.1f}", f"{row.ratio_of_best:.1f}"
    return row.case, row.matcher, time, f"{row.best_ms:.3g}", f"{row.processor_ms:.3g}", compiled, *ratios, above


def main(arguments: Sequence[str] | None = None) -> None:
    options = timing.comparison_options(
        str(__doc__), arguments, parse_case=parse_case, cases=CASES, calls=CALLS, rounds=10
    )
    rows = [row for case in options.case for row in measure(case, options.rounds)]
    print(timing.report_head("Assignment", "benchmarks/assignment.py", PACKAGES, arguments))
    print(
        f"Median ± half the interquartile range over {options.rounds} rounds of {CALLS} calls of each matcher, in turn."
        " Cases are problems x queries x targets. The total is that of all problems together, beside SciPy's."
        " optax / this: of the medians, then of the best calls, on which other processes weigh least.\n"
    )
    print(markdown(rows))
    if options.csv:
        timing.write_csv(options.csv, rows)


if __name__ == "__main__":
    main()
