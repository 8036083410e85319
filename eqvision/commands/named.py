"""``eqvision predict`` for models of images and text, which tell images by the names of what may be in them."""

from pathlib import Path
from typing import TYPE_CHECKING

from eqvision.commands.arguments import fail, is_model, refuse_options, refuse_weights_options
from eqvision.commands.prompted import refuse_prompts

if TYPE_CHECKING:
    from eqvision.commands.predict import PredictOptions
    from eqvision.predict_pairs import ContrastiveRun


def is_clip(source: Path) -> bool:
    """Whether the argument names a model of images and text, or is the run folder of one."""
    from eqvision.recipes import ContrastiveConfig
    from eqvision.run_folder import RunFolder
    from eqvision.zoo_language import clip_names

    if is_model(source):
        return str(source) in clip_names()
    return isinstance(RunFolder(source).config(), ContrastiveConfig)


def name_images(options: "PredictOptions") -> None:
    """Print and draw which of the names fit each image best."""
    refuse_options(
        {"--image-size": options.image_size}, f"is not for {options.run}: its images have a size of their own"
    )
    if not is_model(options.run):
        refuse_weights_options(options.run, {"--weights": options.weights, "--layout": options.layout})
    refuse_prompts(options)
    why = f"is for detectors, and {options.run} is a model of images and text"
    refuse_options({"--threshold": options.threshold, "--json": options.json}, why)
    from eqvision.predict import draw
    from eqvision.predict_pairs import tell_by_name

    if is_model(options.run) and not options.queries:
        fail(f"{options.run} knows no classes: say what may be in the images, --queries cat dog")
    run = _loaded(options)
    names = options.queries or run.class_names
    if not names:
        fail(f"{options.run} was trained on captions without classes: say what may be in the images, --queries cat dog")
    default = Path("predictions") / options.run if is_model(options.run) else options.run / "predictions"
    out = default if options.out is None else options.out
    images, size = list(options.images), options.batch_size or 32
    for told in tell_by_name(run, images, names=names, top=options.top or 3, batch_size=size):
        scores = ", ".join(f"{label} {score:.3f}" for label, score in zip(told.labels, told.scores, strict=True))
        print(f"{told.path}: {scores}  -> {draw(told, out)}")


def _loaded(options: "PredictOptions") -> "ContrastiveRun":
    if is_model(options.run):
        from eqvision.published_clip import load_published_clip

        return load_published_clip(str(options.run), options.weights, layout=options.layout)
    from eqvision.predict_pairs import load_contrastive_run

    return load_contrastive_run(options.run)
