"""``eqvision list [PATTERN]``: names of models, or their published weights."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from eqvision.commands.arguments import fail, parse, unknown


@dataclass(frozen=True)
class ListOptions:
    """Names of models."""

    pattern: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATTERN")] = "*"
    """Shell pattern, quoted: 'vit*'."""
    pretrained: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """A table of published weights; the first of each model is what --weights and eqvision.load take by default."""


def run(arguments: list[str]) -> None:
    options = parse(ListOptions, arguments, "eqvision list")
    from eqvision.zoo import MODELS, list_models

    names = list_models(options.pattern)
    if not names:
        fail(unknown("model", options.pattern, list(MODELS)))
    print(_table(options.pattern) if options.pretrained else "\n".join(names))


def _table(pattern: str) -> str:
    """One line for each file. Exits with code 2 where no model that matches has published weights."""
    from eqvision.pretrained.cards import cards
    from eqvision.pretrained.cards.text import table

    found = cards(pattern)
    if not found:
        fail(f"no published weights of {pattern!r} are known; all: eqvision list --pretrained")
    return table(found)
