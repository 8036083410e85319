"""Tables of the input-pipeline benchmark: medians over all rounds, and ratios to PyTorch's DataLoader."""

import argparse
import csv
import math
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import timing

PACKAGES = ("jax", "grain", "numpy", "pillow", "simplejpeg", "opencv-python-headless", "torch")


class Row(NamedTuple):
    """One contestant; images/s as median, half the interquartile range and best window; processor seconds per image."""

    loader: str
    decoder: str
    threads: int
    workers: int
    images_per_s: float
    spread: float
    best: float
    cpu_s: float
    others_share: float
    start_s: float
    windows: int


def row(job, results) -> Row:
    """All rounds of one job in one row."""
    windows = quiet_windows(results)
    speeds, cpu, others = (list(values) for values in zip(*windows, strict=True))
    speed, start = timing.summarise(speeds), timing.summarise([result.start_s for result in results]).median
    costs = (timing.summarise(cpu).median, timing.summarise(others).median)
    return Row._make([*job, speed.median, speed.spread, max(speeds), *costs, start, len(windows)])


def quiet_windows(results) -> list[tuple[float, float, float]]:
    """Of each window that other processes left alone, or of all where fewer than three are: its three figures.

    The choice looks only at what other processes took, never at the speed measured.
    """
    windows = [w for result in results for w in zip(*result[1:], strict=True)]
    quiet = [w for w in windows if timing.is_quiet(w[2])]
    return quiet if len(quiet) >= 3 else windows


def markdown(rows: Sequence[Row]) -> str:
    """Ratios above 1 mean faster than the DataLoader with as many workers."""
    theirs = {r.workers: r.images_per_s for r in rows if r.loader == "torch"}
    lines = [
        "| loader | decoder | reads | images/s | best | processor ms | others % | first batch s "
        "| / torch 0 | / torch 2 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        reads = f"{r.workers} workers" if r.workers else f"{r.threads} threads" if r.threads else "main thread"
        note = "" if timing.is_quiet(r.others_share) else " (disturbed)"
        ratios = " | ".join(number(r.images_per_s / theirs.get(workers, math.nan), 2) for workers in (0, 2))
        lines.append(
            f"| {r.loader} | {r.decoder} | {reads} | {r.images_per_s:.0f} ± {r.spread:.0f}{note} | {r.best:.0f} "
            f"| {1000 * r.cpu_s:.2f} | {100 * r.others_share:.0f} | {r.start_s:.1f} | {ratios} |"
        )
    return "\n".join(lines)


def wait_markdown(waits) -> str:
    """What the stream and the step take alone, and how long the step waited when both ran."""
    lines = [
        "| stream alone, s/batch | step alone, s | step / stream | waiting for data | steps |",
        "|---|---|---|---|---|",
    ]
    for w in waits:
        times = f"{w.stream_s:.4f} | {w.step_s:.4f} | {w.step_s / w.stream_s:.2f}"
        lines.append(f"| {times} | {100 * w.wait_share:.2f} % | {w.steps} |")
    return "\n".join(lines)


def number(value: float, digits: int) -> str:
    """Fixed digits, or a dash for nan."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def header(
    load_before: tuple[float, ...], arguments: Sequence[str] | None, options: argparse.Namespace, image_bytes: float
) -> list[str]:
    """Device, versions, command, load of the machine, and how to read the table."""
    command = shlex.join(
        ["python", "benchmarks/input_pipeline.py", *(sys.argv[1:] if arguments is None else arguments)]
    )
    load = f"load average {load_before[0]:.1f} before, {os.getloadavg()[0]:.1f} after"
    return [
        f"Device: {timing.processor_name()}; {load}.",
        f"Versions: {timing.versions(PACKAGES)}.",
        f"Command: `{command}`",
        f"{options.images} generated JPEGs, longer side {options.long_side} px, {image_bytes / 1000:.0f} KB on average,"
        f" quality 90, in the page cache; random resized crop to {options.image_size} (bicubic), flip, uint8 batches"
        f" of {options.batch}.",
        "Images/s: median ± half the interquartile range over the windows of all rounds during which other processes "
        f"took at most {timing.QUIET:.0%} of the machine (of all, if fewer than three: then marked as disturbed, and"
        " no ratio to rely on). Processor ms: per image, all threads and workers together. Ratios: images/s over those"
        " of the DataLoader with 0 and with 2 workers.",
    ]


def write(path: Path, head: Sequence[str], results, waits) -> None:
    """The Markdown file, and the CSV with every row beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [row(job, runs) for job, runs in results.items()]
    parts = ["# Input pipeline", "\n\n".join(head), markdown(rows)]
    if waits:
        parts += [
            "## Waiting for data",
            "A stream of one thread (Pillow) feeds a compiled step of one thread that takes 1.5 times as long as the "
            "stream alone needs for a batch; one row per round.",
            wait_markdown(waits),
        ]
    path.write_text("\n\n".join(parts) + "\n")
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*Row._fields, "wait_share", "device", "versions", "command"])
        share = timing.summarise([w.wait_share for w in waits]).median if waits else math.nan
        notes = [line.split(": ", 1)[1].strip("`.") for line in head[:3]]
        writer.writerows([*entry, share, *notes] for entry in rows)
