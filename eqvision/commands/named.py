"""``eqvision predict`` for runs of models of images and text, which tell images by the names of classes."""

from pathlib import Path
from typing import TYPE_CHECKING

from eqvision.commands.arguments import fail, is_model, refuse_options, refuse_weights_options
from eqvision.commands.prompted import refuse_prompts

if TYPE_CHECKING:
    from eqvision.commands.predict import PredictOptions


def is_clip_run(source: Path) -> bool:
    """Whether the argument is the run folder of a model of images and text."""
    from eqvision.recipes import ContrastiveConfig
    from eqvision.run_folder import RunFolder

    return not is_model(source) and isinstance(RunFolder(source).config(), ContrastiveConfig)


def name_images(options: "PredictOptions") -> None:
    """Print and draw which of the names fit each image best."""
    only = {"--weights": options.weights, "--layout": options.layout, "--image-size": options.image_size}
    refuse_weights_options(options.run, only)
    refuse_prompts(options)
    why = f"is for detectors, and {options.run} is a run of a model of images and text"
    refuse_options({"--threshold": options.threshold, "--json": options.json}, why)
    from eqvision.predict import draw
    from eqvision.predict_pairs import load_contrastive_run, tell_by_name

    run = load_contrastive_run(options.run)
    names = options.queries or run.class_names
    if not names:
        fail(f"{options.run} was trained on captions without classes: say what may be in the images, --queries cat dog")
    out = options.run / "predictions" if options.out is None else options.out
    images, size = list(options.images), options.batch_size or 32
    for told in tell_by_name(run, images, names=names, top=options.top or 3, batch_size=size):
        scores = ", ".join(f"{label} {score:.3f}" for label, score in zip(told.labels, told.scores, strict=True))
        print(f"{told.path}: {scores}  -> {draw(told, out)}")
