"""Every layout of published weights against its reference: prints the table of docs/weights.md.

    python benchmarks/weights.py                  # measure all, and print the table
    python benchmarks/weights.py --layouts hf_    # measure those that begin so, and print what has been measured
    python benchmarks/weights.py --layouts --write  # measure none; into docs/weights.md, between its markers

Needs the extra [parity]. Each reference is built small with random parameters and statistics, saved under its
published names, loaded by ``eqvision.load``, and run on the same images in single precision. What is measured is kept
in benchmarks/results/weights.json.
"""

import argparse
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.peer_models.torchvision_operators import usable_torchvision  # noqa: E402
from benchmarks.prompted_references import clicks  # noqa: E402
from benchmarks.weight_references import Case, cases  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "weights.json"
PAGE = ROOT / "docs" / "weights.md"
BEGIN, END = "<!-- printed by benchmarks/weights.py -->", "<!-- end -->"
CLASSES = 3  # of the fresh layer, where the file has none
NAME = "toy"


class Row(NamedTuple):
    """What was measured for one reference."""

    layout: str
    source: str
    reference: str
    compared: str
    difference: float
    """Largest difference over the largest value of the reference."""
    read: int
    ignored: int
    """Tensors of the file that the layout lists as not read."""
    unused: int
    missing: int


def measure(case: Case) -> Row:
    """Raises WeightsError where the file does not load, AssertionError where its layout is not recognised."""
    from eqvision.pretrained.assemble import Sizes
    from eqvision.pretrained.load import read_model
    from eqvision.zoo import DETECTORS, MODELS, PROMPTED

    images = case.scale * np.random.default_rng(1).normal(size=(2, *case.size, 3))
    images = images.astype(np.float32)
    for each in (MODELS, DETECTORS, PROMPTED):
        each.pop(NAME, None)
    (PROMPTED if case.prompted else DETECTORS if case.detector else MODELS)[NAME] = case.row
    with tempfile.TemporaryDirectory() as folder:
        path, theirs = case.make(Path(folder), images)
        sizes = Sizes(CLASSES if case.headless else None, case.size if case.sized else None)
        loaded = read_model(NAME, path, sizes, layout=case.layout if case.given else None)
        assert loaded.layout.name == case.layout, f"{case.layout} was read as {loaded.layout.name}"
        counts = _counts(path, loaded)
    several = case.detector or case.prompted
    difference = max(map(_difference, _ours(case, loaded, images), theirs if several else (theirs,)))
    what = "logits, boxes" if case.detector else "masks, IoU" if case.prompted else "logits"
    what = "features" if case.headless else what
    reference = f"{case.library} {version(case.library)}"
    return Row(case.layout, loaded.layout.source, reference, what, difference, *counts)


def _ours(case: Case, loaded, images: np.ndarray) -> tuple:
    """Logits, or features, or a detector's last logits and boxes, or logits of masks and the IoU that is expected."""
    from eqvision.layers import mask_prompts
    from eqvision.types import PaddedImages, PromptedImages

    def outputs(model, state, images):
        if case.detector:
            size = np.tile(np.array(images.shape[1:3], np.int32), (len(images), 1))
            found = model(PaddedImages(images, jax.numpy.asarray(size)), state)[0]
            return found.logits[-1], found.boxes_cxcywh[-1]
        if case.prompted:
            found = model(PromptedImages(images, mask_prompts(*clicks(len(images)))), state)[0]
            return found.logits, found.iou
        return (model.pooled(images, state) if case.headless else model(images, state)[0],)

    # It runs once, so compiling it well would take longer than it gains.
    run = jax.jit(outputs, compiler_options={"xla_backend_optimization_level": 0})
    return run(loaded.model, loaded.state, images)


def _difference(ours, theirs) -> float:
    """The largest one over the largest value of the reference."""
    return float(np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max())


def _counts(path: Path, loaded) -> tuple[int, int, int, int]:
    """Tensors read, ignored, unused and missing; those of a last layer that the file does not have are not missing."""
    from eqvision.pretrained.files import read_tensors

    layout, tensors = loaded.layout, read_tensors(path)
    names = set(tensors if layout.prepare is None else layout.prepare(loaded.model, tensors, str(path)))
    last = layout.classes.rsplit(".", 1)[0]
    rules = layout.rules(loaded.model)
    wanted = {name for rule in rules for name in rule.their_names}
    head = {name for rule in rules if rule.our_names[0].startswith(last) for name in rule.their_names}
    wanted -= set() if head & names else head
    rest = names - wanted
    ignored = {name for name in rest if layout.ignores(name)}
    return len(names & wanted), len(ignored), len(rest - ignored), len(wanted - names)


def table(rows: list[Row]) -> str:
    """Markdown."""
    heading = ("layout", "files of", "reference", "compared", "max difference", "read", "ignored", "unused", "missing")
    cells = [
        (f"`{r.layout}`", r.source, r.reference, r.compared, f"{r.difference:.1e}", *map(str, r[5:])) for r in rows
    ]
    rule = ("---",) * 4 + ("---:",) * 5
    return "\n".join(f"| {' | '.join(row)} |" for row in (heading, rule, *cells))


def versions() -> str:
    return f"jax {jax.__version__} on {jax.default_backend()}, numpy {np.__version__}"


def stored() -> dict[str, list]:
    """Rows by case, and the versions that they were measured with."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def store(key: str, row: Row) -> None:
    RESULTS.write_text(json.dumps({**stored(), key: [*row, versions()]}, indent=1) + "\n")


def report(keys: list[str]) -> str:
    """The table of all cases that have been measured, and with what."""
    found = [stored()[key] for key in keys if key in stored()]
    rows = [Row(*entry[:-1]) for entry in found]
    return f"{table(rows)}\n\n{'; '.join(sorted({entry[-1] for entry in found}))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="*", help="measure those that begin so; default all")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.relative_to(ROOT)}")
    given = parser.parse_args()
    usable_torchvision()
    named = {f"{number:02d} {case.layout}": case for number, case in enumerate(cases())}
    for key, case in named.items():
        if given.layouts is None or case.layout.startswith(tuple(given.layouts)):
            row = measure(case)
            store(key, row)
            print(f"{key}: {row.difference:.1e}", file=sys.stderr, flush=True)
    text = report(list(named))
    print(text)
    if given.write:
        write(text)


def write(text: str) -> None:
    """Replace what stands between the markers of the page."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
