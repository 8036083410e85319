"""What the benchmark programs share: ahead-of-time compilation, timed runs, memory, the machine, options and tables."""

import argparse
import csv
import math
import os
import platform
import resource
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

# glibc's defaults give XLA's large buffers back to the kernel after every step, and each step faults their
# pages in anew. Huge pages make those faults 512 times fewer; a single arena that never trims avoids them
# but can double the resident memory of larger models. Both are read once, when a process starts.
MALLOC_SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "tuned": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
    "one_arena": {
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_TRIM_THRESHOLD_": str(2**34),
        "MALLOC_MMAP_THRESHOLD_": str(2**34),
        "MALLOC_TOP_PAD_": str(2**30),
    },
}


QUIET = 0.1  # share of the machine that other processes may take while a call is timed


class Compiled(NamedTuple):
    """A compiled program and what it cost to get there; ``trace_s`` includes lowering.

    ``temp_bytes`` is XLA's peak of temporaries, ``peak_bytes`` adds arguments and results (donated ones once).
    """

    call: Callable
    trace_s: float
    compile_s: float
    temp_bytes: int
    peak_bytes: int


class Runs(NamedTuple):
    """Of each timed call: seconds on the wall clock, processor seconds over all threads, and ``others``.

    ``others`` is the share of the machine's processor time that other processes took meanwhile, 0 to 1; nan where
    the system does not say, or the call was too short for its clock.
    """

    wall: list[float]
    cpu: list[float]
    others: list[float]


class Summary(NamedTuple):
    """Median, half the interquartile range, and minimum."""

    median: float
    spread: float
    minimum: float


def compile_ahead(function: Callable, arguments: Sequence[Any], donate: tuple[int, ...] = ()) -> Compiled:
    """Trace and lower, then compile, ``function`` for ``arguments`` (arrays or shapes), each timed apart."""
    import jax

    start = time.perf_counter()
    lowered = jax.jit(function, donate_argnums=donate).trace(*arguments).lower()
    middle = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    temporary = memory.temp_size_in_bytes
    return Compiled(compiled, middle - start, end - middle, temporary, held + temporary)


def time_runs(call: Callable[[], Any], repeats: int, warmup: int = 2) -> Runs:
    """Call ``call`` (which must wait for its own result) ``warmup`` times unmeasured, then ``repeats`` times."""
    for _ in range(warmup):
        call()
    runs = Runs([], [], [])
    for _ in range(repeats):
        wall, cpu, busy = time.perf_counter(), time.process_time(), busy_s()
        call()
        wall, cpu, busy = time.perf_counter() - wall, time.process_time() - cpu, busy_s() - busy
        runs.wall.append(wall)
        runs.cpu.append(cpu)
        runs.others.append(max(0.0, busy - cpu) / (wall * os.cpu_count()) if wall > 0.1 else math.nan)
    return runs


def busy_s() -> float:
    """Processor seconds that all processes have used since boot, all cores together; nan where /proc is missing."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return math.nan
    user, nice, system, _, _, interrupt, soft, steal = map(int, stat.read_text().split(maxsplit=9)[1:9])
    return (user + nice + system + interrupt + soft + steal) / os.sysconf("SC_CLK_TCK")


def is_quiet(others: float) -> bool:
    """Whether other processes left a timed call alone; yes where it is not known (nan)."""
    return not others > QUIET


def wait_until_quiet(limit_s: float) -> None:
    """Return once other processes leave the machine alone for a second, or after ``limit_s``."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        before = busy_s()
        time.sleep(1)
        if is_quiet((busy_s() - before) / os.cpu_count()):
            return


def summarise(values: Sequence[float]) -> Summary:
    """Median, half the interquartile range (0 for a single value) and minimum of at least one value."""
    if len(values) < 2:
        return Summary(values[0], 0.0, values[0])
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Summary(statistics.median(values), (high - low) / 2, min(values))


def peak_rss_bytes() -> int:
    """Peak resident memory of this process since it started its program."""
    status = Path("/proc/self/status")
    if status.exists():  # VmHWM starts anew at exec; ru_maxrss can carry over the parent's peak
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def processor_name() -> str:
    """Processor model and the number of cores this process may use."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def versions(packages: Sequence[str]) -> str:
    """``name version`` of every listed package that is installed, with Python's, in one line."""
    found = {dist: metadata.version(dist) for dist in packages if _installed(dist)}
    return ", ".join([f"python {platform.python_version()}", *(f"{name} {number}" for name, number in found.items())])


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def adamw_step(train: Callable, num_classes: int) -> tuple[Callable, Callable]:
    """``(init, step)`` of the training step that every program here times: softmax cross-entropy, then AdamW.

    ``train(params, state, images) -> (logits, state)``. ``step(carry, images) -> (carry, loss)`` with
    ``carry = (params, state, optimizer state)``; its labels are the row numbers modulo ``num_classes``.
    """
    import jax
    import jax.numpy as jnp
    import optax

    optimizer = optax.adamw(1e-3, weight_decay=1e-4)

    def mean_loss(params, state, images):
        logits, state = train(params, state, images)
        labels = jnp.arange(len(images)) % num_classes
        return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels).mean(), state

    def step(carry, images):
        params, state, moments = carry
        (loss, state), gradients = jax.value_and_grad(mean_loss, has_aux=True)(params, state, images)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), state, moments), loss

    return lambda params, state: (params, state, optimizer.init(params)), step


def repeated_step(compiled: Callable, carry: Any, images: Any) -> Callable[[], Any]:
    """A call without arguments that advances a donated ``carry`` by one step and waits for the loss it returns."""
    held = [carry]

    def call():
        held[0], loss = compiled(held[0], images)
        return loss.block_until_ready()

    return call


def comparison_options(
    description: str,
    arguments: Sequence[str] | None,
    *,
    parse_case: Callable[[str], Any],
    cases: Sequence[str],
    calls: int,
    rounds: int,
) -> argparse.Namespace:
    """The command line of programs that time contestants on cases: ``case``, ``rounds`` and ``csv``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=parse_case, nargs="+", default=[parse_case(case) for case in cases])
    parser.add_argument("--rounds", type=int, default=rounds, help=f"of {calls} timed calls each (default: {rounds})")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the unrounded rows to this file")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: expected at least 1")
    if options.csv and not options.csv.parent.is_dir():
        parser.error(f"--csv {options.csv}: the folder {options.csv.parent} does not exist; create it first")
    return options


def report_head(title: str, program: str, packages: Sequence[str], arguments: Sequence[str] | None) -> str:
    """Title, device, load, versions and the command, as paragraphs; call it when all is measured."""
    import jax

    command = shlex.join(["python", program, *(sys.argv[1:] if arguments is None else arguments)])
    device = jax.devices()[0].device_kind if jax.default_backend() != "cpu" else processor_name()
    load = f"load average {os.getloadavg()[0]:.1f} at the end"
    return f"# {title}\n\nDevice: {device}; {load}.\n\nVersions: {versions(packages)}.\n\nCommand: `{command}`\n"


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, named: int = 1) -> str:
    """Cells as they are; the first ``named`` columns hold words, the others figures."""
    lines = [heads, ["---"] * named + ["---:"] * (len(heads) - named), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_csv(path: Path, rows: Sequence[Any]) -> None:
    """Unrounded figures of at least one NamedTuple, with the names of its fields as header."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(rows[0]._fields)
        writer.writerows(rows)
