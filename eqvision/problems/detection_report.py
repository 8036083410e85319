"""What people look at in the run folder of a detector."""

import importlib.util
import json
import sys
from typing import Any

import numpy as np

from eqvision.ops import PasteRule
from eqvision.report import plot_curves
from eqvision.run_folder import Row, RunFolder, without_nan


def write_detection_report(
    folder: RunFolder, rows: list[Row], evaluation: Any, source: Any, paste: PasteRule | None = None
) -> None:
    """``result.json`` and pictures of samples; plots where matplotlib is installed, else a line that says how.

    ``paste`` tells how masks in boxes are put into images; None where there are none.
    """
    from eqvision.detection_pictures import draw_pairs, plot_class_ap, plot_precision_recall

    result = folder.path / "result.json"
    metrics = {f"test/{name}": value for name, value in evaluation.metrics.items()}
    result.write_text(json.dumps(without_nan(metrics), indent=2))
    draw_pairs(
        [_pair(source, sample) for sample in evaluation.samples], source.class_names, folder.path / "predictions.png"
    )
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots were drawn: matplotlib is not installed (pip install 'eqvision[plots]')", file=sys.stderr)
        return
    plot_curves(folder.path / "learning_curve.png", rows, "AP")
    boxes = evaluation.coco.evaluate("boxes")
    plot_precision_recall(boxes, folder.path / "precision_recall.png")
    plot_class_ap(boxes, folder.path / "class_ap.png")


def _pair(source: Any, sample: Any) -> Any:
    from eqvision.detection_pictures import DrawnObjects, Pair, confident

    truth, found = source.truth(sample.index), sample.found
    drawn = confident(DrawnObjects(found.boxes, found.labels, found.scores), 0.4)
    image = np.asarray(source[sample.index].image)
    return Pair(image, drawn, DrawnObjects(truth.boxes, truth.labels), source.describe(sample.index))
