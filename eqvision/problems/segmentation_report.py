"""What people look at in the run folder of a segmenter."""

import importlib.util
import json
import sys
from typing import Any

from eqvision.report import plot_curves
from eqvision.run_folder import Row, RunFolder, without_nan


def write_segmentation_report(folder: RunFolder, rows: list[Row], evaluation: Any, source: Any) -> None:
    """``result.json``, ``classes.txt`` (the figures of each class) and pictures of samples; the confusion and the
    learning curve where matplotlib is installed, else a line that says how."""
    from eqvision.segmentation_pictures import LabelPair, draw_label_pairs, plot_pixel_confusion

    metrics = {f"test/{name}": value for name, value in evaluation.metrics.items()}
    (folder.path / "result.json").write_text(json.dumps(without_nan(metrics), indent=2))
    (folder.path / "classes.txt").write_text(evaluation.pixels.table() + "\n")
    pairs = [LabelPair(s.image, s.predicted, s.labels, source.describe(s.index)) for s in evaluation.samples]
    draw_label_pairs(pairs, source.class_names, folder.path / "predictions.png")
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots were drawn: matplotlib is not installed (pip install 'eqvision[plots]')", file=sys.stderr)
        return
    plot_curves(folder.path / "learning_curve.png", rows, "mean_iou")
    plot_pixel_confusion(evaluation.pixels, folder.path / "confusion.png")
