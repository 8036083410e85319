"""``eqvision replay RUN --step K``: see one step of a run again."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from eqvision.commands.arguments import fail, parse


@dataclass(frozen=True)
class ReplayOptions:
    """Repeat a run from its last checkpoint before a step, and show that step's loss, gradient and examples."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN_FOLDER")]
    """Run folder; it is only read."""
    step: int | None = None
    """Step to show, from 1; default is the one at which the run diverged."""


def run(arguments: list[str]) -> None:
    options = parse(ReplayOptions, arguments, "eqvision replay")
    from eqvision.replay import replay, reported_step

    step = reported_step(options.run) if options.step is None else options.step
    if step is None:
        fail(f"{options.run} has not diverged; name the step with --step")
    print(replay(options.run, step).text())
