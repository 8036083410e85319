"""Masks of everything in one image by SAM: peak memory, programs that were compiled, seconds.

Run from the repository root, alone on the machine where seconds matter::

    python benchmarks/sam_memory.py > benchmarks/results/sam_memory.md
    python benchmarks/sam_memory.py --image photo.jpg --size 768 1024 --batch 32

The weights are random, which costs what trained ones cost. A random model's masks are noise that no threshold lets
through, so its logits are replaced, after they have been computed, by three discs around each point. Every mask is
then enlarged, measured, kept as run lengths and compared with all others: no less work than with trained weights, which
drop many masks before they are enlarged.
"""

import argparse
import collections
import logging
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import timing
from eqvision.data import decode_image
from eqvision.segmenters.sam import MaskSearch, Predictor, SmallMasks, find_masks, sam, to_input

PACKAGES = ("jax", "jaxlib", "numpy", "eqvision")
RADII = (0.02, 0.07, 0.2)  # of the discs, as shares of the longer side
LIMIT = 6e9  # bytes
FINISHED = re.compile(r"Finished XLA compilation of (?:jit\()?(\w+)")


class Programs(logging.Handler):
    """How often each program was compiled, by JAX's own log."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def emit(self, record: logging.LogRecord) -> None:
        found = FINISHED.search(record.getMessage())
        if found:
            self.counts[found.group(1)] += 1


class Step(NamedTuple):
    """What happened until a moment: seconds since the last one, and the peak of memory so far."""

    what: str
    seconds: float
    peak_bytes: int


def picture(height: int, width: int) -> np.ndarray:
    """Smooth hills of colour, of every size, as pictures have them."""
    rng, total = np.random.default_rng(0), np.zeros((height, width, 3))
    y, x = np.mgrid[:height, :width] / max(height, width)
    for octave in range(7):
        wave = 2**octave * 2 * np.pi
        for channel, (a, b, phase) in enumerate(rng.normal(size=(3, 3))):
            total[..., channel] += np.sin(wave * (a * x + b * y) + phase) / 1.6**octave
    low, high = total.min(), total.max()
    return ((total - low) / (high - low) * 255).astype(np.uint8)


def load_image(path: Path | None, size: tuple[int, int]) -> np.ndarray:
    if path is None:
        return picture(*size)
    from PIL import Image

    image = Image.fromarray(decode_image(path))
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC))


class Discs(Predictor):
    """Computes what a predictor computes, and gives discs around the points."""

    def logits(self, points=None, labels=None, boxes=None, masks=None):
        first = 0
        for batch in super().logits(points, labels, boxes, masks):
            count = len(batch.iou)
            places = to_input(points[first : first + count, 0], self.sizes) / self.side
            yield SmallMasks(discs(places, batch.logits.shape[-1]), np.ones_like(batch.iou))
            first += count


def discs(places: np.ndarray, cells: int) -> np.ndarray:
    """Steep logits of four masks each around places x, y in 0..1; the first is not used."""
    centres = (np.arange(cells) + 0.5) / cells
    x, y = (centres - places[:, axis, None] for axis in (0, 1))
    distance = np.sqrt(x[:, None, :] ** 2 + y[:, :, None] ** 2)
    return np.stack([1e4 * (radius - distance) for radius in (RADII[0], *RADII)], axis=1).astype(np.float32)


def random_sam(size: str):
    """A model with noise in every array; initialisers would take longer to compile."""
    shapes, state = eqx.filter_eval_shape(lambda: eqx.nn.make_with_state(sam)(size, key=jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.02 * rng.standard_normal(x.shape, np.float32)), shapes), state


def measure(image: np.ndarray, model_size: str, side: int, batch: int) -> tuple[list[Step], int]:
    """Build, compile, search; and how many masks were found."""
    steps, start, seen = [], time.perf_counter(), 0

    def done(what: str) -> None:
        nonlocal start
        now = time.perf_counter()
        steps.append(Step(what, now - start, timing.peak_rss_bytes()))
        start = now
        print(steps[-1], file=sys.stderr, flush=True)

    def progress(points: int) -> None:
        nonlocal seen
        seen += points
        print(f"{seen} of {side**2} points", file=sys.stderr, flush=True)
        if seen == points:
            done("image encoder and decoder compiled, image encoded, first batch")

    model, state = random_sam(model_size)
    done("random weights")
    predictor = Discs(model, state, prompts_per_batch=batch, max_points=1)
    found = find_masks(predictor, image, MaskSearch(points_per_side=side), progress=progress)
    done(f"all {side} x {side} points")
    return steps, len(found)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="b", choices=("b", "l", "h"), help="size of the image encoder")
    parser.add_argument("--image", type=Path, help="photograph; default is a drawn picture")
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 1024), help="height and width it is brought to")
    parser.add_argument("--points-per-side", type=int, default=32)
    parser.add_argument("--batch", type=int, default=64, help="prompts at a time")
    given = parser.parse_args(arguments)
    programs, log = Programs(), logging.getLogger("jax")
    log.addHandler(programs)
    log.propagate = False
    with jax.log_compiles():
        image = load_image(given.image, tuple(given.size))
        steps, count = measure(image, given.model, given.points_per_side, given.batch)
    print(report(given, steps, count, programs.counts, arguments))


def report(
    given: argparse.Namespace,
    steps: Sequence[Step],
    count: int,
    programs: collections.Counter[str],
    arguments: Sequence[str] | None,
) -> str:
    points, peak = given.points_per_side**2, steps[-1].peak_bytes
    batches = -(-points // given.batch)
    what = f"ViT-{given.model.upper()}, {given.size[0]} x {given.size[1]} pixels, float32, random weights."
    rows = [[each.what, f"{each.seconds:.1f}", f"{each.peak_bytes / 1e9:.2f}"] for each in steps]
    others = sum(programs.values()) - programs["_encode"] - programs["_decode"]
    verdict = "under" if peak < LIMIT else "OVER"
    return "\n".join(
        [
            timing.report_head("Masks of everything by SAM", "benchmarks/sam_memory.py", PACKAGES, arguments),
            f"{what} {points} points in {batches} batches of {given.batch}, each through the decoder at once;",
            f"{3 * points} masks were enlarged one after the other and kept as run lengths; non-maximum suppression "
            f"left {count}.\n",
            f"Peak resident memory {peak / 1e9:.2f} GB, {verdict} {LIMIT / 1e9:g} GB. Compiled: the image encoder",
            f"{_times(programs['_encode'])}, the decoder {_times(programs['_decode'])} (for all batches), and "
            f"{others} small programs around them.\n",
            timing.markdown_table(("until", "seconds", "peak GB so far"), rows),
        ]
    )


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


if __name__ == "__main__":
    main()
