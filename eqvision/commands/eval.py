"""``eqvision eval RUN_OR_MODEL``: evaluate a run's newest checkpoint, or published weights of a classifier."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from eqvision.commands.arguments import (
    fail,
    is_classifier_run,
    is_detector,
    is_masked_run,
    is_model,
    is_segmenter,
    parse,
    refuse_options,
    refuse_weights_options,
)


@dataclass(frozen=True)
class EvalOptions:
    """Evaluate the newest checkpoint of a run on its own test split or on other images, or published weights of a
    classifier. Runs of detectors give COCO's figures, those of segmenters the mean IoU, others what they report."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN_OR_MODEL")]
    """Run folder, or a name of the zoo, which takes published weights and needs --data-path."""
    data_path: Annotated[str | None, tyro.conf.arg(aliases=("--data.path",))] = None
    """Folder or file to evaluate on; default is the run's own. Evaluators on frozen features train there too. For the
    run of a detector a COCO instances file, or a folder with annotations/*.json; of a segmenter a folder of images and
    label pictures."""
    split: str | None = None
    """Split to evaluate on; default is the run's test split, for a model `test`."""
    evaluator: tuple[Literal["classification", "linear_probe", "few_shot", "knn"], ...] = ("classification",)
    """Classifiers and masked autoencoders, any number of them. classification: what the run itself reports.
    linear_probe, few_shot, knn: classifiers on features of the frozen model, fitted to the training split."""
    untrained: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Run of a masked autoencoder with linear_probe, few_shot or knn: of the random encoder that the run began with, to
    compare with."""
    weights: str | None = None
    """Model only: file or folder of weights, hf:organisation/repository, a URL, or a tag that `eqvision info MODEL`
    lists; default is the first of those."""
    layout: str | None = None
    """Model only: names of the tensors in the file, where they do not tell it."""
    image_size: int | None = None
    """Model only: height and width of the images; default is that of the weights."""
    data_kind: Annotated[
        Literal["folder", "arrays", "tar", "array_record", "tfds", "huggingface"] | None,
        tyro.conf.arg(aliases=("--data.kind",)),
    ] = None
    """Model only: what --data-path is; default folder."""


def run(arguments: list[str]) -> None:
    options = parse(EvalOptions, arguments, "eqvision eval")
    metrics = _model(options) if is_model(options.run) else _run(options)
    for metric, value in metrics.items():
        print(f"{metric} {value:.4f}")


def _run(options: EvalOptions) -> dict[str, float]:
    only = {"--weights": options.weights, "--layout": options.layout, "--image-size": options.image_size}
    refuse_weights_options(options.run, only | {"--data-kind": options.data_kind})
    if is_masked_run(options.run):
        return _masked_run(options)
    _refuse_untrained(options)
    if is_detector(options.run):
        return _detector_run(options)
    if is_segmenter(options.run):
        return _segmenter_run(options)
    if not is_classifier_run(options.run):
        return _other_run(options)
    from eqvision.predict import evaluate_run

    return evaluate_run(options.run, data_path=options.data_path, split=options.split, evaluators=options.evaluator)


def _refuse_evaluators(options: EvalOptions, kind: str) -> None:
    others = [name for name in options.evaluator if name != "classification"]
    refuse_options({"--evaluator": " ".join(others) or None}, f"is for classifiers, and {options.run} is a {kind}")


def _refuse_untrained(options: EvalOptions) -> None:
    given = {"--untrained": options.untrained or None}
    refuse_options(given, f"is for runs of masked autoencoders, and {options.run} is none")


def _masked_run(options: EvalOptions) -> dict[str, float]:
    """The loss of the run, and what its encoder is worth."""
    from eqvision.evaluate_masked import evaluate_encoder
    from eqvision.evaluate_problem import evaluate_problem_run

    metrics, frozen = {}, [name for name in options.evaluator if name != "classification"]
    if "classification" in options.evaluator:
        why = "is for linear_probe, few_shot and knn; name them with --evaluator"
        refuse_options({"--untrained": options.untrained or None}, why)
        metrics = evaluate_problem_run(options.run, data_path=options.data_path, split=options.split)
    given = {"data_path": options.data_path, "split": options.split, "untrained": options.untrained}
    return metrics | evaluate_encoder(options.run, frozen, **given) if frozen else metrics


def _detector_run(options: EvalOptions) -> dict[str, float]:
    _refuse_evaluators(options, "detector")
    from eqvision.predict_objects import evaluate_detector_run

    return evaluate_detector_run(options.run, data_path=options.data_path, split=options.split)


def _segmenter_run(options: EvalOptions) -> dict[str, float]:
    _refuse_evaluators(options, "segmenter")
    from eqvision.predict_pixels import evaluate_segmenter_run

    return evaluate_segmenter_run(options.run, data_path=options.data_path, split=options.split)


def _other_run(options: EvalOptions) -> dict[str, float]:
    """Of a kind whose evaluation is its problem's, and nothing else."""
    from eqvision.evaluate_problem import evaluate_problem_run
    from eqvision.run_folder import RunFolder, model_kind

    _refuse_evaluators(options, model_kind(RunFolder(options.run).config()))
    return evaluate_problem_run(options.run, data_path=options.data_path, split=options.split)


def _model(options: EvalOptions) -> dict[str, float]:
    _refuse_untrained(options)
    if is_detector(options.run):
        fail(
            f"{options.run} is a detector, and published weights are evaluated for classifiers only; "
            "eqvision predict takes it, and eqvision eval takes the run folders of detectors"
        )
    if is_segmenter(options.run):
        fail(
            f"{options.run} is a segmenter, and published weights are evaluated for classifiers only; "
            "eqvision eval takes the run folders of segmenters"
        )
    if options.data_path is None:
        fail(f"{options.run} is a model of the zoo and has no data of its own; name images with --data-path PATH")
    from eqvision.published import evaluate_published

    return evaluate_published(
        str(options.run),
        options.weights,
        data_path=options.data_path,
        data_kind=options.data_kind or "folder",
        split=options.split,
        evaluators=options.evaluator,
        layout=options.layout,
        image_size=options.image_size,
    )
