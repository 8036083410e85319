"""What people look at in the run folder of a model of images and text."""

import importlib.util
import json
import sys

from eqvision.data.pairs import PairSource
from eqvision.problems.contrastive_evaluator import ContrastiveEvaluation
from eqvision.report import plot_curves
from eqvision.run_folder import Row, RunFolder, without_nan


def write_contrastive_report(
    folder: RunFolder, rows: list[Row], evaluation: ContrastiveEvaluation, source: PairSource, headline: str
) -> None:
    """``result.json`` and ``predictions.png`` (test images with what the model says of them); where matplotlib is
    installed ``similarity.png`` (images against captions) and the learning curve, else a line that says how."""
    from eqvision.pairs_pictures import SaidOfImage, draw_said, plot_similarities

    metrics = {f"test/{name}": value for name, value in evaluation.metrics.items()}
    (folder.path / "result.json").write_text(json.dumps(without_nan(metrics), indent=2))
    said = [SaidOfImage(s.image, s.found, s.scores, s.truth) for s in evaluation.samples]
    draw_said(said, folder.path / "predictions.png")
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots were drawn: matplotlib is not installed (pip install 'eqvision[plots]')", file=sys.stderr)
        return
    images, captions = [s.image for s in evaluation.samples], [s.caption for s in evaluation.samples]
    plot_similarities(images, captions, evaluation.similarities, folder.path / "similarity.png")
    plot_curves(folder.path / "learning_curve.png", rows, headline)
