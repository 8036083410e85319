"""What people look at in a run folder: learning curves, sample predictions, the confusion matrix, as PNG."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from eqvision.evaluate import Evaluation
from eqvision.run_folder import Row, RunFolder
from eqvision.tasks import SingleLabel, Task


def write_report(
    folder: RunFolder, rows: list[Row], evaluation: Evaluation, class_names: tuple[str, ...], task: Task
) -> None:
    """``result.json`` always; the pictures where matplotlib is installed, else a line that says how to get them."""
    result = folder.path / "result.json"
    result.write_text(json.dumps({f"test/{name}": value for name, value in evaluation.metrics.items()}, indent=2))
    if importlib.util.find_spec("matplotlib") is None:
        print("no pictures were drawn: matplotlib is not installed (pip install 'eqvision[plots]')", file=sys.stderr)
        return
    plot_curves(folder.path / "learning_curve.png", rows, task.headline)
    if isinstance(task, SingleLabel) and evaluation.confusion is not None:
        plot_samples(folder.path / "predictions.png", evaluation, class_names)
        plot_confusion(folder.path / "confusion.png", evaluation.confusion, class_names)


def new_figure(width: float, height: float) -> Any:
    """A figure without a display and without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plot_curves(path: Path, rows: list[Row], headline: str) -> None:
    """Training and test loss on the left, the headline metric on the right."""
    figure = new_figure(10.0, 4.0)
    left, right = figure.subplots(1, 2)
    for name in ("train/loss", "test/loss"):
        _line(left, rows, name)
    _line(right, rows, f"test/{headline}")
    for axes, title in ((left, "loss"), (right, headline.replace("_", " "))):
        axes.set_xlabel("step")
        axes.set_title(title)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path)


def _line(axes: Any, rows: list[Row], name: str) -> None:
    points = [(row["step"], row[name]) for row in rows if name in row]
    if points:
        axes.plot(*zip(*points, strict=True), marker="." if len(points) < 60 else None, label=name)


def plot_samples(path: Path, evaluation: Evaluation, class_names: tuple[str, ...]) -> None:
    """A grid of test images; each title gives the prediction with its probability, red where it is wrong."""
    samples = evaluation.samples
    columns = 4
    lines = max(1, -(-len(samples.images) // columns))
    figure = new_figure(2.2 * columns, 2.4 * lines)
    grid = np.atleast_1d(figure.subplots(lines, columns)).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, image, label, outputs in zip(grid, samples.images, samples.labels, samples.outputs, strict=False):
        probabilities = np.exp(outputs - outputs.max()) / np.exp(outputs - outputs.max()).sum()
        guess = int(probabilities.argmax())
        right = guess == int(label)
        axes.imshow(image.squeeze(), cmap="gray" if image.shape[-1] == 1 else None, interpolation="nearest")
        wanted = "" if right else f"\nis {class_names[int(label)]}"
        axes.set_title(
            f"{class_names[guess]} {probabilities[guess]:.0%}{wanted}", color="black" if right else "red", fontsize=10
        )
    figure.savefig(path)


def plot_confusion(path: Path, counts: np.ndarray, class_names: tuple[str, ...]) -> None:
    """Rows are the true classes, columns the predicted ones; numbers where there are few classes."""
    few = len(class_names) <= 20
    size = 1.5 + 0.45 * len(class_names) if few else 9.0
    figure = new_figure(size + 1, size)
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    drawn = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if few:
        axes.set_xticks(range(len(class_names)), class_names, rotation=60, ha="right")
        axes.set_yticks(range(len(class_names)), class_names)
        for (i, j), count in np.ndenumerate(counts):
            if count:
                axes.text(
                    j, i, f"{count:.0f}", ha="center", va="center", color="white" if shares[i, j] > 0.5 else "black"
                )
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    figure.colorbar(drawn, label="share of the true class")
    figure.savefig(path)
