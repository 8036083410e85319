"""Operations of two-stage detectors beside their plain forms, and torch's: memory of temporaries and time.

Run from the repository root::

    python benchmarks/detection_ops.py > benchmarks/results/detection_ops.md
    python benchmarks/detection_ops.py --quick
    python benchmarks/detection_ops.py --rows paste nms/ours --objects 20
    python benchmarks/detection_ops.py --rows align --rounds 0

RoIAlign of boxes of all sizes on the pyramid of one image and its gradient, non-maximum suppression, the assignment of
anchors to objects, and masks pasted into an image. Matching of sets has a program of its own (assignment.py), and so
has suppression at other sizes (nms.py). Times are taken at ``--channels``; memory is also what the compiler plans at
256. Every row runs in a process of its own, one after the other, that may not hold more than ``--memory`` GB: programs
that plan more than three quarters of it are compiled and not run. ``--rounds 0`` compiles only.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import timing
from benchmarks.detection_forms import Form, Section, Sizes, missing_torchvision, sections

PACKAGES = ("jax", "jaxlib", "numpy", "eqvision", "torch", "torchvision")
QUICK = {"image": (256, 256), "boxes": 32, "channels": 8, "candidates": 200, "targets": 10, "objects": 5}
QUICK |= {"paste_image": (96, 128), "rounds": 2}
WAIT, LIMIT = 60.0, 1200.0  # seconds to wait for a quiet machine before a row, and a row may take


class Row(NamedTuple):
    """``temp_bytes`` and ``full_temp_bytes`` (at 256 channels) are XLA's, -1 where nobody knows them.

    ``grown_bytes`` is how far the resident memory of the process rose above what it held before the first call.
    ``wall`` and ``cpu`` are empty where the form was not run; ``note`` says why.
    """

    form: str
    temp_bytes: int = -1
    full_temp_bytes: int = -1
    grown_bytes: int = -1
    wall: Sequence[float] = ()
    cpu: Sequence[float] = ()
    note: str = ""


# One row, in a process of its own


def measure(name: str, form: Form, section: Section, *, rounds: int, memory: float, results: Path) -> Row:
    """Compile, call once and keep the result for the comparison, then time ``rounds`` calls."""
    inputs = jax.block_until_ready(section.inputs())
    compiled = timing.compile_ahead(form.call, inputs) if form.jitted else None
    shapes = section.full() if form.jitted and section.full else None
    full = timing.compile_ahead(form.call, shapes).temp_bytes if shapes else -1
    row = Row(name, compiled.temp_bytes if compiled else -1, full)
    if compiled and compiled.peak_bytes > 0.75 * memory * 1e9:
        return row._replace(note=f"not run: plans {compiled.peak_bytes / 1e9:.1f} GB")
    if not rounds:
        return row._replace(note="not run")
    call = compiled.call if compiled else form.call
    before = timing.peak_rss_bytes()
    values = jax.tree.leaves(jax.block_until_ready(call(*inputs)))
    grown = timing.peak_rss_bytes() - before
    np.savez(results, *map(np.asarray, values))
    runs = timing.time_runs(lambda: jax.block_until_ready(call(*inputs)), rounds, warmup=0)
    return row._replace(grown_bytes=grown, wall=runs.wall, cpu=runs.cpu)


def run_one(given: argparse.Namespace) -> None:
    """The row of ``--one``, as JSON in the last line of standard output."""
    resource.setrlimit(resource.RLIMIT_DATA, (int(given.memory * 1e9),) * 2)
    short, name = given.one.split("/", 1)
    section = sections(sizes_of(given))[short]
    options = {"rounds": given.rounds, "memory": given.memory, "results": given.results}
    print(json.dumps(measure(name, section.forms[name], section, **options)._asdict()))


def run_apart(short: str, name: str, results: Path, arguments: Sequence[str], *, wait: bool) -> Row:
    """``run_one`` in another process; a row with a note where that fails or takes too long."""
    command = [sys.executable, __file__, *arguments, "--one", f"{short}/{name}", "--results", str(results)]
    if wait:
        timing.wait_until_quiet(WAIT)
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return Row(name, note=f"stopped after {LIMIT:.0f} s")
    if answer.returncode:
        last = (answer.stderr.strip() or "no message").splitlines()[-1]
        return Row(name, note=f"failed, exit code {answer.returncode}: {last[:200]}")
    return Row(**json.loads(answer.stdout.splitlines()[-1]))


# All rows


def rows_of(short: str, section: Section, chosen: Sequence[str], arguments: Sequence[str], *, wait: bool) -> list[Row]:
    """Those ``chosen``, all compared with the first one that has run."""
    rows, first = [], None
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, form) in enumerate(section.forms.items()):
            if not is_chosen(short, name, chosen):
                continue
            results = Path(folder) / f"{number}.npz"
            rows.append(run_apart(short, name, results, arguments, wait=wait))
            if form.same and results.exists():
                first = first or (name, results)
                check_equal(first, (name, results))
    return rows


def is_chosen(short: str, name: str, chosen: Sequence[str]) -> bool:
    return not chosen or short in chosen or f"{short}/{name}" in chosen


def check_equal(first: tuple[str, Path], other: tuple[str, Path]) -> None:
    """Booleans may flip where a value meets the threshold, and samples at the border of a cell: 1 in 10 000."""
    arrays: list[Any] = [np.load(path) for _, path in (first, other)]
    for key in arrays[0].files:
        one, two = (np.asarray(each[key], np.float32) for each in arrays)
        wrong = float(np.mean(np.abs(one - two) > 1e-3 * np.max(np.abs(one), initial=0)))
        if not wrong < 1e-4:
            raise ValueError(f"{other[0]!r} differs from {first[0]!r} in {wrong:.2%} of its numbers")


HEADS = ("form", "MB", "MB at 256 channels", "process MB", "ms", "best ms", "processor ms", "")


def table(rows: Sequence[Row]) -> str:
    return timing.markdown_table(HEADS, [_cells(row) for row in rows])


def _cells(row: Row) -> tuple[str, ...]:
    sizes = row.temp_bytes, row.full_temp_bytes, row.grown_bytes
    memory = tuple(f"{size / 1e6:.1f}" if size >= 0 else "" for size in sizes)
    if not row.wall:
        return row.form, *memory, "", "", "", row.note
    wall, cpu = timing.summarise(row.wall), timing.summarise(row.cpu)
    times = f"{wall.median * 1e3:.1f} ± {wall.spread * 1e3:.1f}", f"{wall.minimum * 1e3:.1f}"
    return row.form, *memory, *times, f"{cpu.minimum * 1e3:.1f}", row.note


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=int, nargs=2, default=(1024, 1024), help="height and width")
    parser.add_argument("--boxes", type=int, default=512, help="of RoIAlign")
    parser.add_argument("--channels", type=int, default=64, help="of the maps, for the times")
    parser.add_argument("--candidates", type=int, default=4000, help="boxes of non-maximum suppression")
    parser.add_argument("--targets", type=int, default=100, help="objects of the assignment")
    parser.add_argument("--objects", type=int, default=100, help="masks to paste")
    parser.add_argument("--paste-image", type=int, nargs=2, default=(800, 1333), help="height and width")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each form; 0: compile only")
    parser.add_argument("--memory", type=float, default=8.0, help="GB that a row's process may hold")
    parser.add_argument("--rows", nargs="+", default=(), metavar="SECTION[/FORM]", help="these alone")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the program")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.quick:
        vars(given).update(QUICK)
    _check(parser, given)
    return given


def _check(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    if given.rounds < 0 or min(sizes_of(given)._replace(image=1, paste_image=1)) < 1:
        parser.error("expected at least one box, channel, candidate, target and object, and rounds of at least 0")
    if min(*given.image, *given.paste_image) < 64:
        parser.error(f"--image {given.image}, --paste-image {given.paste_image}: expected sides of at least 64 pixels")


def sizes_of(given: argparse.Namespace) -> Sizes:
    values = {name: getattr(given, name) for name in Sizes._fields}
    return Sizes(**values | {"image": tuple(given.image), "paste_image": tuple(given.paste_image)})


def check_rows(every: dict[str, Section], chosen: Sequence[str]) -> None:
    names = [f"{short}/{name}" for short, section in every.items() for name in section.forms]
    for each in chosen:
        if each not in every and each not in names:
            raise SystemExit(f"--rows {each!r} is unknown; choose from {', '.join(every)} or {', '.join(names)}")


def main(arguments: Sequence[str] | None = None) -> None:
    given = read_options(arguments)
    if given.one:
        return run_one(given)
    every = sections(sizes_of(given))
    check_rows(every, given.rows)
    texts, wait = [], given.rounds > 0 and not given.quick
    given_on = sys.argv[1:] if arguments is None else arguments
    for short, section in every.items():
        rows = rows_of(short, section, given.rows, given_on, wait=wait)
        texts += [f"\n## {section.title}\n\n{table(rows)}"] if rows else []
    print(timing.report_head("Operations of two-stage detectors", "benchmarks/detection_ops.py", PACKAGES, arguments))
    print("MB (1e6 bytes) are XLA's temporaries; process MB is what the resident memory rose by in the first call.")
    print("Times: median ± half the interquartile range, the best, and the least processor time of a call over all")
    print(f"threads; {given.rounds} calls after one that is not timed, in float32. A row that is not compiled runs")
    print("PyTorch or NumPy on the host.")
    print("\n".join([missing_torchvision(), *texts]))


if __name__ == "__main__":
    main()
