"""``eqvision eval RUN``: evaluate a run's newest checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from eqvision.commands.arguments import parse


@dataclass(frozen=True)
class EvalOptions:
    """Evaluate the newest checkpoint of a run on its own test split, or on other images."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN_FOLDER")]
    """Run folder."""
    data_path: str | None = None
    """Folder or file to evaluate on; default is the run's own. Evaluators on frozen features train there too."""
    split: str | None = None
    """Split to evaluate on; default is the run's test split."""
    evaluator: tuple[Literal["classification", "linear_probe", "few_shot", "knn"], ...] = ("classification",)
    """Any number of them. classification: what the run itself reports. linear_probe, few_shot, knn: classifiers on
    features of the frozen model, fitted to the training split."""


def run(arguments: list[str]) -> None:
    options = parse(EvalOptions, arguments, "eqvision eval")
    from eqvision.predict import evaluate_run

    metrics = evaluate_run(options.run, data_path=options.data_path, split=options.split, evaluators=options.evaluator)
    for metric, value in metrics.items():
        print(f"{metric} {value:.4f}")
