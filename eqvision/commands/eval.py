"""``eqvision eval RUN``: evaluate a run's newest checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from eqvision.commands.arguments import parse


@dataclass(frozen=True)
class EvalOptions:
    """Evaluate the newest checkpoint of a run on its own test split, or on other images of the same classes."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN_FOLDER")]
    """Run folder."""
    data_path: str | None = None
    """Folder or file to evaluate on; default is the run's own."""
    split: str | None = None
    """Split to evaluate on; default is the run's test split."""


def run(arguments: list[str]) -> None:
    options = parse(EvalOptions, arguments, "eqvision eval")
    from eqvision.predict import evaluate_run

    evaluation = evaluate_run(options.run, data_path=options.data_path, split=options.split)
    for metric, value in evaluation.metrics.items():
        print(f"test/{metric} {value:.4f}")
