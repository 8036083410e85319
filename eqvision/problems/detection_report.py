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

    metrics = {f"test/{name}": value for name, value in evaluation.metrics.items()}
    (folder.path / "result.json").write_text(json.dumps(without_nan(metrics), indent=2))
    draw_pairs(
        [_pair(source, sample, paste) for sample in evaluation.samples],
        source.class_names,
        folder.path / "predictions.png",
    )
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots were drawn: matplotlib is not installed (pip install 'eqvision[plots]')", file=sys.stderr)
        return
    plot_curves(folder.path / "learning_curve.png", rows, "AP")
    for kind in ("boxes",) if paste is None else ("boxes", "masks"):
        result, suffix = evaluation.coco.evaluate(kind), "" if kind == "boxes" else "_masks"
        plot_precision_recall(result, folder.path / f"precision_recall{suffix}.png")
        plot_class_ap(result, folder.path / f"class_ap{suffix}.png")


def _pair(source: Any, sample: Any, paste: PasteRule | None) -> Any:
    from eqvision.detection_pictures import Pair
    from eqvision.drawn import drawn_found, drawn_truth

    image = np.asarray(source[sample.index].image)
    size = (image.shape[0], image.shape[1])
    expected = drawn_truth(source.truth(sample.index), size)
    if paste is None:
        expected = expected._replace(masks=None)
    found = drawn_found(sample.found, size, paste=paste, least_score=0.4)
    return Pair(image, found, expected, source.describe(sample.index))
