"""``eqvision info MODEL_OR_RUN``: counts and shapes of a model, and its published weights; or how far a run is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from eqvision.commands.arguments import parse, refuse_options


@dataclass(frozen=True)
class InfoOptions:
    """Parameters, multiply-adds, activations and feature shapes of a model, and its published weights, or the last
    figures of a run; nothing is allocated or downloaded."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL_OR_RUN")]
    """Name in the zoo, or a run folder."""
    image_size: int | None = None
    """Model only: height and width in pixels; default 224, or 1024 for models that take prompts."""
    num_classes: int | None = None
    """Model only: classes; None takes 1000, or a detector's own."""
    in_channels: int | None = None
    """Model only: channels of the images; default 3."""


def run(arguments: list[str]) -> None:
    options = parse(InfoOptions, arguments, "eqvision info")
    if _is_run(Path(options.model)):
        given = {
            "image-size": options.image_size,
            "num-classes": options.num_classes,
            "in-channels": options.in_channels,
        }
        why = f"is for models of the zoo; the run {options.model} has its own"
        refuse_options({f"--{name}": value for name, value in given.items()}, why)
        from eqvision.info import describe_run

        print(describe_run(options.model))
        return
    from eqvision.pretrained.cards import cards
    from eqvision.pretrained.cards.text import describe_card

    print(_described(options))
    for card in cards(options.model):
        print(describe_card(card))


def _described(options: InfoOptions) -> str:
    from eqvision.info import describe, describe_language, usual_image_size
    from eqvision.zoo import LANGUAGE, MAES

    name, classes = options.model, options.num_classes
    if name in LANGUAGE or name in MAES:
        return describe_language(
            name, image_size=options.image_size, num_classes=classes, in_channels=options.in_channels
        )
    size = options.image_size or usual_image_size(name)
    return describe(name, image_size=size, num_classes=classes, in_channels=options.in_channels or 3)


def _is_run(path: Path) -> bool:
    """Whether a run folder is meant: a name of the zoo has one part, and no folder of that name holds a run."""
    return (path / "config.yaml").exists() or len(path.parts) > 1
