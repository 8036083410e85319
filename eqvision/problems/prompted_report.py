"""What people look at in the run folder of a model with prompts."""

import importlib.util
import json
import sys
from typing import Any

import numpy as np
from jaxtyping import Bool

from eqvision.problems.prompted_evaluator import PromptedEvaluation, PromptedSample
from eqvision.report import plot_curves
from eqvision.run_folder import Row, RunFolder, without_nan


def write_prompted_report(folder: RunFolder, rows: list[Row], evaluation: PromptedEvaluation, source: Any) -> None:
    """``result.json`` and ``predictions.png``: masks found for the boxes of objects, with their IoU, beside the true
    ones; the learning curve where matplotlib is installed, else a line that says how."""
    from eqvision.detection_pictures import draw_pairs

    metrics = {f"test/{name}": value for name, value in evaluation.metrics.items()}
    (folder.path / "result.json").write_text(json.dumps(without_nan(metrics), indent=2))
    pairs = [_pair(sample, source.describe(sample.index)) for sample in evaluation.samples]
    draw_pairs(pairs, ("IoU",), folder.path / "predictions.png")
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots were drawn: matplotlib is not installed (pip install 'eqvision[plots]')", file=sys.stderr)
        return
    plot_curves(folder.path / "learning_curve.png", rows, "click_iou")


def _pair(sample: PromptedSample, title: str) -> Any:
    from eqvision.detection_pictures import DrawnObjects, Pair

    size, labels = (sample.image.shape[0], sample.image.shape[1]), np.zeros(len(sample.boxes), int)
    found, truth = (_enlarged(masks, size) for masks in (sample.found, sample.masks))
    return Pair(
        sample.image,
        DrawnObjects(sample.boxes, labels, sample.iou, found),
        DrawnObjects(sample.boxes, labels, masks=truth),
        title,
    )


def _enlarged(masks: Bool[np.ndarray, "n h w"], size: tuple[int, int]) -> list[Bool[np.ndarray, "h2 w2"]]:
    """A cell becomes a square of pixels; what is beyond the image was padding."""
    if not len(masks):
        return []
    # The batch's image is square, and the part that is no padding reaches its longer side.
    factor = max(1, round(max(size) / max(masks.shape[1:])))
    wide = masks.repeat(factor, axis=1).repeat(factor, axis=2)
    return list(wide[:, : size[0], : size[1]])
