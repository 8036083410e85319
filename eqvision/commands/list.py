"""``eqvision list [PATTERN]``: names of models."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from eqvision.commands.arguments import fail, parse, unknown


@dataclass(frozen=True)
class ListOptions:
    """Names of models."""

    pattern: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATTERN")] = "*"
    """Shell pattern, quoted: 'vit*'."""


def run(arguments: list[str]) -> None:
    options = parse(ListOptions, arguments, "eqvision list")
    from eqvision.zoo import MODELS, list_models

    names = list_models(options.pattern)
    if not names:
        fail(unknown("model", options.pattern, list(MODELS)))
    print("\n".join(names))
