"""``eqvision predict RUN IMAGE...``: label images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from eqvision.commands.arguments import fail, parse


@dataclass(frozen=True)
class PredictOptions:
    """Label images with the newest checkpoint of a run, and draw the labels on them."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN_FOLDER")]
    """Run folder."""
    images: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE...")]
    """Image files."""
    out: Path | None = None
    """Folder of the annotated PNGs; default is RUN_FOLDER/predictions."""
    top: int = 3
    """Classes to print for each image."""


def run(arguments: list[str]) -> None:
    options = parse(PredictOptions, arguments, "eqvision predict")
    if not options.images:
        fail("name at least one image: eqvision predict RUN_FOLDER IMAGE...")
    from eqvision.predict import draw, load_run, predict

    run = load_run(options.run)
    out = options.run / "predictions" if options.out is None else options.out
    for prediction in predict(run, list(options.images), top=options.top):
        picture = draw(prediction, out)
        scores = ", ".join(
            f"{label} {score:.3f}" for label, score in zip(prediction.labels, prediction.scores, strict=True)
        )
        print(f"{prediction.path}: {scores}  -> {picture}")
