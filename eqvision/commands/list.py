"""``eqvision list [PATTERN]``: names of models, or their published weights."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from eqvision.commands.arguments import fail, parse, unknown


@dataclass(frozen=True)
class ListOptions:
    """Names of models."""

    pattern: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATTERN")] = "*"
    """Shell pattern, quoted: 'vit*'."""
    pretrained: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """A table of published weights; the first of each model is what --weights and eqvision.load take by default."""
    kind: Literal["classifier", "detector", "segmenter", "prompted", "language", "masked"] = "classifier"
    """Which models; language: of text, and of text and images; masked: masked autoencoders."""


def run(arguments: list[str]) -> None:
    options = parse(ListOptions, arguments, "eqvision list")
    from eqvision.zoo import list_models

    names = list_models(options.pattern, kind=options.kind)
    if not names:
        what = {
            "classifier": "model",
            "prompted": "prompted model",
            "language": "model of text",
            "masked": "masked model",
        }.get(options.kind, options.kind)
        fail(unknown(what, options.pattern, list_models(kind=options.kind)))
    print(_table(options.pattern, names) if options.pretrained else "\n".join(names))


def _table(pattern: str, names: list[str]) -> str:
    """One line for each file of these models. Exits with code 2 where no model that matches has published weights."""
    from eqvision.pretrained.cards import cards
    from eqvision.pretrained.cards.text import table

    found = [card for card in cards(pattern) if card.name in names]
    if not found:
        kinds = "eqvision list --pretrained [--kind detector|prompted|language|masked]"
        fail(f"no published weights of {pattern!r} are known; all: {kinds}")
    return table(found)
