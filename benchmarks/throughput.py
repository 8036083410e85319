"""Images per second of any model of the zoo, in timm's column names, one CSV row per model.

    python benchmarks/throughput.py --models resnet50 vit_b16 --batch 256 --dtype bfloat16 [--train]

Programs are traced, lowered and compiled ahead of time and each stage is timed apart. Out of memory halves
the batch and tries again (an accelerator says so; a CPU process is killed by its system instead). The peak
memory is the program's own, from XLA's buffer assignment: arguments, results and temporaries.
"""

import argparse
import csv
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from benchmarks import timing  # noqa: E402

Measured = TypeVar("Measured")
DTYPES = ("float32", "bfloat16")
PACKAGES = ("jax", "equinox", "optax")


class Case(NamedTuple):
    """What is measured for one model."""

    model: str
    train: bool
    dtype: str
    image_size: int
    num_classes: int
    repeats: int
    warmup: int


class Figures(NamedTuple):
    """What was measured, per call, in seconds and bytes.

    ``gmacs`` (1e9 multiply-adds) and ``macts`` (1e6 activations) are per image of the forward pass, nan in training.
    """

    batch: int
    step: timing.Summary
    trace_s: float
    compile_s: float
    peak_bytes: int
    parameters: int
    gmacs: float
    macts: float


def halve_until_fits(measure: Callable[[int], Measured], batch: int) -> Measured:
    """``measure(batch)``, with half the batch after each RESOURCE_EXHAUSTED; at one image the error stands."""
    while True:
        try:
            return measure(batch)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or batch == 1:
                raise
        batch //= 2
        print(f"out of memory: trying batch {batch}", file=sys.stderr, flush=True)


def measure(case: Case, batch: int) -> Figures:
    """Build, compile and time one model at one batch size."""
    import eqvision

    model, state = eqvision.create(
        case.model, num_classes=case.num_classes, image_size=case.image_size, key=jax.random.key(0)
    )
    shape = (batch, case.image_size, case.image_size, 3)
    images = jax.random.normal(jax.random.key(1), shape, case.dtype)
    counts = (math.nan, math.nan) if case.train else forward_counts(model, state, images)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model))
    compiled, call = (training if case.train else inference)(model, state, images, case.num_classes)
    del model, state  # the training step has donated them
    runs = timing.time_runs(call, case.repeats, case.warmup)
    step = timing.summarise(runs.wall)
    return Figures(batch, step, compiled.trace_s, compiled.compile_s, compiled.peak_bytes, parameters, *counts)


def inference(model, state, images, num_classes: int) -> tuple[timing.Compiled, Callable]:
    """The compiled forward pass and a call that runs it to completion."""
    del num_classes
    compiled = timing.compile_ahead(lambda model, state, images: model(images, state)[0], (model, state, images))
    return compiled, lambda: compiled.call(model, state, images).block_until_ready()


def training(model, state, images, num_classes: int) -> tuple[timing.Compiled, Callable]:
    """The compiled training step, with parameters and moments in float32, and a call that advances it by one."""
    key = jax.random.key(2)

    def train(model, state, images):
        return model(images, state, train=True, key=key)

    init, step = timing.adamw_step(train, num_classes)
    carry = init(model, state)
    compiled = timing.compile_ahead(step, (carry, images), donate=(0,))
    return compiled, timing.repeated_step(compiled.call, carry, images)


def forward_counts(model, state, images) -> tuple[float, float]:
    """Multiply-adds (1e9) and activations (1e6) of one image's forward pass."""
    from eqvision.counting import count

    one = jax.ShapeDtypeStruct((1, *images.shape[1:]), jnp.float32)
    counts = count(lambda model, state, images: model(images, state)[0], *jax.eval_shape(lambda: (model, state)), one)
    return counts.macs / 1e9, counts.activations / 1e6


def row(case: Case, figures: Figures, command: str) -> dict[str, str | int | float]:
    """One CSV row; ``step_time`` in ms, ``param_count`` in 1e6 and ``peak_mem`` in MB, as timm prints them."""
    kind = "train" if case.train else "infer"
    work = {} if case.train else {"infer_gmacs": round(figures.gmacs, 2), "infer_macts": round(figures.macts, 2)}
    return {
        "model": case.model,
        f"{kind}_samples_per_sec": round(figures.batch / figures.step.median, 2),
        f"{kind}_step_time": round(1e3 * figures.step.median, 3),
        f"{kind}_step_time_spread": round(1e3 * figures.step.spread, 3),
        f"{kind}_batch_size": figures.batch,
        f"{kind}_img_size": case.image_size,
        **work,
        "param_count": round(figures.parameters / 1e6, 2),
        "trace_s": round(figures.trace_s, 3),
        "compile_s": round(figures.compile_s, 3),
        "dtype": case.dtype,
        "peak_mem": math.ceil(figures.peak_bytes / 1e6),
        "device": jax.devices()[0].device_kind if jax.default_backend() != "cpu" else timing.processor_name(),
        "versions": timing.versions(PACKAGES),
        "command": command,
    }


def append(path: Path, entry: dict[str, str | int | float]) -> None:
    """Add one row to a CSV file, with a header where the file is new; ValueError where its columns are others."""
    columns = list(entry)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        with path.open(newline="") as file:
            found = next(csv.reader(file), [])
        if found != columns:
            raise ValueError(f"{path} has the columns {found}, this row has {columns}: name another file with --out")
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerow(entry)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, help="names or patterns of the zoo, such as 'vit_*'")
    parser.add_argument(
        "--train", action="store_true", help="time the training step (AdamW) in place of the forward pass"
    )
    parser.add_argument("--batch", type=int, default=256, help="images per call, halved while memory is short")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the activations")
    parser.add_argument("--image-size", type=int, default=224, help="pixels")
    parser.add_argument("--num-classes", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=10, help="timed calls; the median counts")
    parser.add_argument("--warmup", type=int, default=2, help="calls before the timed ones")
    parser.add_argument(
        "--out", type=Path, help="CSV file to add to (benchmarks/results/throughput-infer.csv or -train)"
    )
    return parser.parse_args(arguments)


def expand(patterns: Sequence[str]) -> list[str]:
    """Names of the zoo that the patterns match; a plain name passes, and ``create`` refuses it if it is unknown."""
    import eqvision

    names = [name for pattern in patterns for name in (eqvision.list_models(pattern) or [pattern])]
    return list(dict.fromkeys(names))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every model and add its row as soon as it is known."""
    options = parse(arguments)
    kind = "train" if options.train else "infer"
    out = options.out or ROOT / f"benchmarks/results/throughput-{kind}.csv"
    command = shlex.join(["python", "benchmarks/throughput.py", *(sys.argv[1:] if arguments is None else arguments)])
    for model in expand(options.models):
        case = Case(
            model,
            options.train,
            options.dtype,
            options.image_size,
            options.num_classes,
            options.repeats,
            options.warmup,
        )
        figures = halve_until_fits(lambda batch, case=case: measure(case, batch), options.batch)
        entry = row(case, figures, command)
        append(out, entry)
        print(f"{model}: {entry[f'{kind}_samples_per_sec']} images/s, {entry[f'{kind}_step_time']} ms", flush=True)


if __name__ == "__main__":
    main()
