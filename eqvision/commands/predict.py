"""``eqvision predict RUN_OR_MODEL IMAGE...``: label images."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from eqvision.commands.arguments import fail, is_model, parse, refuse_weights_options

if TYPE_CHECKING:
    from eqvision.predict import Run


@dataclass(frozen=True)
class PredictOptions:
    """Label images with the newest checkpoint of a run, or with published weights, and draw the labels on them."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN_OR_MODEL")]
    """Run folder, or a name of the zoo, which takes published weights."""
    images: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE...")]
    """Image files."""
    weights: str | None = None
    """Model only: file or folder of weights, hf:organisation/repository, a URL, or a tag that `eqvision info MODEL`
    lists; default is the first of those."""
    layout: str | None = None
    """Model only: names of the tensors in the file, where they do not tell it."""
    image_size: int | None = None
    """Model only: height and width of the images; default is that of the weights."""
    out: Path | None = None
    """Folder of the annotated PNGs; default is RUN_FOLDER/predictions, for a model predictions/MODEL."""
    top: int = 3
    """Classes to print for each image."""


def run(arguments: list[str]) -> None:
    options = parse(PredictOptions, arguments, "eqvision predict")
    if not options.images:
        fail("name at least one image: eqvision predict RUN_OR_MODEL IMAGE...")
    from eqvision.predict import draw, predict

    published = is_model(options.run)
    loaded, default = _published(options) if published else _run(options)
    out = default if options.out is None else options.out
    for prediction in predict(loaded, list(options.images), top=options.top):
        picture = draw(prediction, out)
        scores = ", ".join(
            f"{label} {score:.3f}" for label, score in zip(prediction.labels, prediction.scores, strict=True)
        )
        print(f"{prediction.path}: {scores}  -> {picture}")


def _published(options: PredictOptions) -> "tuple[Run, Path]":
    from eqvision.published import load_published

    name = str(options.run)
    loaded = load_published(name, options.weights, layout=options.layout, image_size=options.image_size)
    return loaded, Path("predictions") / name


def _run(options: PredictOptions) -> "tuple[Run, Path]":
    from eqvision.predict import load_run

    only = {"--weights": options.weights, "--layout": options.layout, "--image-size": options.image_size}
    refuse_weights_options(options.run, only)
    return load_run(options.run), options.run / "predictions"
