"""Tables of the peer comparison: medians over all rounds, each contestant's best allocator setting, ratios to ours."""

import csv
import itertools
import math
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import timing

PACKAGES = ("jax", "equinox", "optax", "flax", "torch", "transformers")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class Row(NamedTuple):
    """One contestant under one setting, in seconds and bytes; ``run_s`` is the median."""

    model: str
    task: str
    contestant: str
    malloc: str
    batch: int
    image_size: int
    parameters: int
    trace_s: float
    compile_s: float
    run_s: float
    spread_s: float
    min_s: float
    cpu_s: float
    others_share: float
    temp_bytes: float
    peak_rss_bytes: float
    samples: int


def row(job, results) -> Row:
    """All rounds of one job in one row."""
    runs = quiet_runs(results)
    wall, cpu, others = (timing.summarise(values) for values in zip(*runs, strict=True))
    left_alone = [result for result in results if timing.is_quiet(timing.summarise(result.others).median)] or results
    trace, compile_s, rss = (
        timing.summarise([getattr(result, name) for result in left_alone]).median
        for name in ("trace_s", "compile_s", "peak_rss_bytes")
    )
    first = results[0]
    where = (job.model, job.task, job.contestant, job.malloc, job.batch, job.image_size)
    costs = (first.parameters, trace, compile_s, *wall, cpu.median, others.median)
    return Row(*where, *costs, first.temp_bytes, rss, len(runs))


def quiet_runs(results) -> list[tuple[float, float, float]]:
    """Wall, processor seconds and others' share of each run that others left alone; of all where fewer than three are.

    The choice looks only at what other processes took, never at the time measured.
    """
    runs = [run for result in results for run in zip(result.wall, result.cpu, result.others, strict=True)]
    quiet = [run for run in runs if timing.is_quiet(run[2])]
    return quiet if len(quiet) >= 3 else runs


def rows(results) -> list[Row]:
    """One row per job."""
    return [row(job, runs) for job, runs in results.items()]


def best(table: Iterable[Row]) -> list[Row]:
    """Each contestant's fastest setting, within one model and task, in the given order."""
    chosen: dict[str, Row] = {}
    for entry in table:
        current = chosen.get(entry.contestant)
        if current is None or entry.run_s < current.run_s:
            chosen[entry.contestant] = entry
    return list(chosen.values())


def build_s(entry: Row) -> float:
    """Trace and compile together; nan where nothing is compiled. PyTorch reports both as one."""
    return entry.compile_s if math.isnan(entry.trace_s) else entry.trace_s + entry.compile_s


def markdown(table: Sequence[Row]) -> str:
    """The ratio table of one model and task: ratios are contestant / ours, so above 1 ours is faster."""
    chosen = best(table)
    ours = next((entry for entry in chosen if entry.contestant == "ours"), None)
    lines = [
        "| contestant | malloc | trace s | compile s | run s | temp MB | peak RSS MB | run ratio | build ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in chosen:
        cells = [
            entry.contestant,
            entry.malloc,
            number(entry.trace_s, 2),
            number(entry.compile_s, 2),
            f"{entry.run_s:.4f} ± {entry.spread_s:.4f}"
            + ("" if timing.is_quiet(entry.others_share) else " (disturbed)"),
            number(entry.temp_bytes / 1e6, 0),
            number(entry.peak_rss_bytes / 1e6, 0),
            number(entry.run_s / ours.run_s if ours else math.nan, 2),
            number(build_s(entry) / build_s(ours) if ours else math.nan, 2),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def settings_markdown(table: Sequence[Row]) -> str:
    """Run time and memory of every contestant under every allocator setting."""
    lines = ["| contestant | malloc | run s | min s | processor s | others % | runs | peak RSS MB |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for entry in sorted(table, key=lambda entry: entry.contestant):
        times = f"{entry.run_s:.4f} ± {entry.spread_s:.4f} | {entry.min_s:.4f} | {entry.cpu_s:.4f}"
        rest = f"{number(100 * entry.others_share, 0)} | {entry.samples} | {entry.peak_rss_bytes / 1e6:.0f}"
        lines.append(f"| {entry.contestant} | {entry.malloc} | {times} | {rest} |")
    return "\n".join(lines)


def number(value: float, digits: int) -> str:
    """Fixed digits, or a dash for nan."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def header(load_before: tuple[float, ...], arguments: Sequence[str] | None) -> list[str]:
    """Device, versions, command, load of the machine, and how to read the table."""
    command = shlex.join(["python", "benchmarks/peers.py", *(sys.argv[1:] if arguments is None else arguments)])
    load = f"load average {load_before[0]:.1f} before, {os.getloadavg()[0]:.1f} after"
    pages = HUGE_PAGES.read_text().strip() if HUGE_PAGES.exists() else "not available"
    settings = "; ".join(
        f"{name}: {' '.join(f'{key}={value}' for key, value in env.items()) or 'nothing set'}"
        for name, env in timing.MALLOC_SETTINGS.items()
    )
    return [
        f"Device: {timing.processor_name()}; {load}; transparent huge pages {pages}.",
        f"Versions: {timing.versions(PACKAGES)}.",
        f"Command: `{command}`",
        f"Allocator settings: {settings}.",
        "Run: median ± half the interquartile range over all rounds, of the runs during which other processes took at"
        f" most {timing.QUIET:.0%} of the machine (of all, if fewer than three:"
        " then marked as disturbed, and no ratio to rely on)."
        " Temp: XLA's own figure. Run ratio: contestant / ours; build ratio: the same for trace + compile"
        " (for torch.compile, the first call less a later one).",
    ]


def write(path: Path, head: Sequence[str], table: Sequence[Row]) -> None:
    """The Markdown file, and the CSV with every row beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = ["# Peers", "\n\n".join(head)]
    for (model, task), group in itertools.groupby(table, key=lambda entry: (entry.model, entry.task)):
        entries = list(group)
        first = entries[0]
        parts.append(f"## {model}, {task}, batch {first.batch}, {first.image_size} px, {first.parameters:,} parameters")
        parts += [markdown(entries), settings_markdown(entries)]
    path.write_text("\n\n".join(parts) + "\n")
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*Row._fields, "device", "versions", "command"])
        notes = [line.split(": ", 1)[1].strip("`.") for line in head[:3]]
        writer.writerows([*entry, *notes] for entry in table)
