"""The losses of CLIP and SigLIP, with their gradients: peak memory and seconds, in chunks and over the table of pairs.

Run from the repository root, alone on the machine where seconds matter::

    python benchmarks/contrastive.py > benchmarks/results/contrastive.md
    python benchmarks/contrastive.py --batches 512 1024 --width 64

The plain forms are the published formulas, which hold a logit for each pair of the batch; the chunked ones are those of
``eqvision.losses``. Memory is what XLA plans for beside arguments and results, so that large batches need not be run.
On several devices, each holds its share of the rows and plans for itself.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import timing
from eqvision.losses import CHUNK, contrastive_loss, sigmoid_loss

PACKAGES = ("jax", "jaxlib", "numpy", "eqvision")
BATCHES = (512, 1024, 2048, 4096, 8192, 16384)
DEVICES = 8
Loss = Callable[..., Any]


class Row(NamedTuple):
    """Memory in bytes of each form, on one device and on each of several; seconds of a call, nan where not run."""

    loss: str
    batch: int
    plain_bytes: int
    chunked_bytes: int
    shared_bytes: int
    plain_s: float
    chunked_s: float


def plain_softmax(image, text, scale, bias, weights):
    """Without padding: all weights are taken for 1."""
    del bias, weights
    logits = scale * image @ text.T
    both = jax.nn.log_softmax(logits, axis=1) + jax.nn.log_softmax(logits, axis=0)
    return -jnp.mean(jnp.diagonal(both)) / 2


def plain_sigmoid(image, text, scale, bias, weights):
    """Without padding: all weights are taken for 1."""
    del weights
    signs = 2 * jnp.eye(len(image)) - 1
    return -jnp.sum(jax.nn.log_sigmoid(signs * (scale * image @ text.T + bias))) / len(image)


def softmax(image, text, scale, bias, weights):
    del bias
    return contrastive_loss(image, text, scale, weights)


LOSSES: dict[str, tuple[Loss, Loss]] = {"softmax": (plain_softmax, softmax), "sigmoid": (plain_sigmoid, sigmoid_loss)}


def gradients(loss: Loss) -> Callable:
    """Value, and gradient by image, text, scale and bias."""
    return jax.value_and_grad(loss, argnums=(0, 1, 2, 3))


def shared(loss: Loss, devices: int) -> tuple[Callable, Any]:
    """The same over several devices, as a training step takes it, and how its rows are laid out."""
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))

    def device(image, text, scale, bias, weights):
        scale, bias = (lax.pcast(x, "data", to="varying") for x in (scale, bias))
        value, grads = gradients(loss)(image, text, scale, bias, weights)
        return lax.psum(value, "data"), (*grads[:2], *lax.psum(grads[2:], "data"))

    rows = P("data")
    specs = {"in_specs": (rows, rows, P(), P(), rows), "out_specs": (P(), (rows, rows, P(), P()))}
    return jax.shard_map(device, mesh=mesh, **specs), NamedSharding(mesh, rows)


def shapes(batch: int, width: int, layout: Any = None) -> tuple[jax.ShapeDtypeStruct, ...]:
    sizes = ((batch, width), (batch, width), (), (), (batch,))
    return tuple(jax.ShapeDtypeStruct(size, jnp.float32, sharding=layout if size else None) for size in sizes)


def data(batch: int, width: int) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((2, batch, width), np.float32)
    image, text = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    return tuple(map(jnp.asarray, (image, text, np.float32(14.3), np.float32(-10), np.ones(batch, np.float32))))


def measure(name: str, batch: int, width: int, repeats: int, timed: int) -> Row:
    """One loss at one batch. Raises AssertionError where the forms do not agree."""
    plain, chunked = (timing.compile_ahead(gradients(loss), shapes(batch, width)) for loss in LOSSES[name])
    on_many, layout = shared(LOSSES[name][1], DEVICES)
    many = timing.compile_ahead(on_many, shapes(batch, width, layout))
    seconds = [float("nan")] * 2
    if batch <= timed:
        given = data(batch, width)
        values = [np.asarray(each.call(*given)[0]) for each in (plain, chunked)]
        np.testing.assert_allclose(values[0], values[1], rtol=1e-5)
        for i, each in enumerate((plain, chunked)):
            runs = timing.time_runs(lambda call=each.call: jax.block_until_ready(call(*given)), repeats, warmup=0)
            seconds[i] = timing.summarise(runs.wall).median
    row = Row(name, batch, plain.temp_bytes, chunked.temp_bytes, many.temp_bytes, *seconds)
    print(row, file=sys.stderr, flush=True)
    return row


def growth(rows: Sequence[Row], name: str, field: str) -> float:
    """By what memory grows where the batch doubles, over the last doubling; nan where there is none."""
    values = {row.batch: getattr(row, field) for row in rows if row.loss == name}
    last = max(values)
    return values[last] / values[last // 2] if last // 2 in values else float("nan")


def report(given: argparse.Namespace, rows: Sequence[Row], arguments: Sequence[str] | None) -> str:
    heads = ("loss", "batch", "plain MB", "chunked MB", f"MB on each of {DEVICES}", "plain ms", "chunked ms")
    cells = [
        [row.loss, str(row.batch)]
        + [f"{value / 1e6:.1f}" for value in row[2:5]]
        + ["-" if value != value else f"{1e3 * value:.0f}" for value in row[5:]]
        for row in rows
    ]
    kinds = list(dict.fromkeys(row.loss for row in rows))
    doubled = "; ".join(
        f"{name} plain {growth(rows, name, 'plain_bytes'):.1f}, chunked {growth(rows, name, 'chunked_bytes'):.1f}, "
        f"on {DEVICES} devices {growth(rows, name, 'shared_bytes'):.1f}"
        for name in kinds
    )
    return "\n".join(
        [
            timing.report_head("Contrastive losses", "benchmarks/contrastive.py", PACKAGES, arguments),
            f"Vectors of {given.width} numbers, float32, {CHUNK} texts at a time; value and gradient. Memory is XLA's",
            "peak of temporaries; seconds are medians, and - where only the plan was made.\n",
            f"By what memory grew when the batch doubled for the last time: {doubled}.\n",
            timing.markdown_table(heads, cells),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="global batch sizes")
    parser.add_argument("--width", type=int, default=512, help="numbers in a vector")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--timed", type=int, default=2048, help="largest batch that is run, not only planned")
    given = parser.parse_args(arguments)
    if jax.config.jax_num_cpu_devices != DEVICES:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_num_cpu_devices", DEVICES)
    rows = [measure(name, batch, given.width, given.repeats, given.timed) for name in LOSSES for batch in given.batches]
    print(report(given, rows, arguments))


if __name__ == "__main__":
    main()
