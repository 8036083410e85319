"""What a file says about a detector of a run: how images are prepared for it, and the names of its classes."""

from pathlib import Path
from typing import Any

from eqvision.export.card import Card
from eqvision.predict_objects import DetectorRun, load_detector_run
from eqvision.recipes import DetectionConfig
from eqvision.run_folder import versions


def detector_card(
    run: DetectorRun, origin: str, options: dict[str, Any], *, num_classes: int, named: bool = True
) -> Card:
    """The card of a detector; ``options`` are arguments of the zoo's builder that differ from the model's row."""
    config = run.config
    return Card(
        model=config.model.name,
        num_classes=num_classes,
        image_size=config.data.size,
        in_channels=config.model.in_channels,
        class_names=run.class_names if named else (),
        task="detection",
        mean=config.data.mean,
        std=config.data.std,
        interpolation="bilinear",
        crop_fraction=0.0,
        origin=origin,
        versions=versions(),
        options=options,
        transform=config.data.transform,
        sides=(config.data.scales[-1], config.data.longest),
    )


def detector_of_run(path: str | Path) -> tuple[Card, DetectorRun]:
    """The newest checkpoint of a detector's run with its card. Raises what ``load_detector_run`` raises."""
    run = load_detector_run(path)
    origin = f"run {Path(path).resolve().name}, step {run.step}"
    return detector_card(run, origin, _options(run.config), num_classes=len(run.class_names)), run


def _options(config: DetectionConfig) -> dict[str, Any]:
    """What decides which parameters there are, and what an R-CNN makes of them; dropout and rematerialisation are the
    zoo's."""
    names = ("num_queries", "norm", "dialect")
    given = {name: getattr(config.model, name) for name in names}
    return {name: value for name, value in given.items() if value is not None}
