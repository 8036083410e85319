"""``eqvision checkpoint inspect PATH``: what a checkpoint holds, and whether it is undamaged."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from eqvision.commands.arguments import fail, parse, unknown


@dataclass(frozen=True)
class InspectOptions:
    """Step, score, versions, leaves with their digests; every array is read and verified."""

    path: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PATH")]
    """Run folder, its checkpoints folder, or the folder of one step."""
    leaves: int | None = 20
    """Largest leaves to list for a single step; None lists all."""


def run(arguments: list[str]) -> None:
    actions = ["inspect"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: eqvision checkpoint inspect PATH [options]")
        return
    if arguments[0] not in actions:
        fail(unknown("action", arguments[0], actions))
    options = parse(InspectOptions, arguments[1:], "eqvision checkpoint inspect")
    from eqvision.checkpoint import describe_checkpoint

    text = describe_checkpoint(options.path, leaves=options.leaves)
    print(text)
    if "DAMAGED" in text:
        raise SystemExit(1)
