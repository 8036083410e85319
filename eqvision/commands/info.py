"""``eqvision info MODEL``: counts and shapes of a model, and its published weights."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from eqvision.commands.arguments import parse


@dataclass(frozen=True)
class InfoOptions:
    """Parameters, multiply-adds, activations and feature shapes of a model, and its published weights; nothing is
    allocated or downloaded."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Name in the zoo."""
    image_size: int = 224
    """Height and width in pixels."""
    num_classes: int | None = None
    """Classes; None takes 1000, or a detector's own."""
    in_channels: int = 3
    """Channels of the images."""


def run(arguments: list[str]) -> None:
    options = parse(InfoOptions, arguments, "eqvision info")
    from eqvision.info import describe
    from eqvision.pretrained.cards import cards
    from eqvision.pretrained.cards.text import describe_card

    print(
        describe(
            options.model,
            image_size=options.image_size,
            num_classes=options.num_classes,
            in_channels=options.in_channels,
        )
    )
    for card in cards(options.model):
        print(describe_card(card))
