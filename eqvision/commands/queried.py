"""``eqvision predict`` for open-vocabulary detectors, which are told by texts what to look for."""

from pathlib import Path
from typing import TYPE_CHECKING

from eqvision.commands.arguments import is_model, refuse_options, refuse_weights_options
from eqvision.commands.prompted import refuse_prompts

if TYPE_CHECKING:
    from eqvision.commands.predict import PredictOptions


def is_open_vocabulary(source: Path) -> bool:
    """Whether the argument names an open-vocabulary detector, or is the run folder of one."""
    from eqvision.recipes import OpenVocabularyConfig
    from eqvision.run_folder import RunFolder
    from eqvision.zoo_language import open_vocabulary_names

    if is_model(source):
        return str(source) in open_vocabulary_names()
    return isinstance(RunFolder(source).config(), OpenVocabularyConfig)


def find_named(options: "PredictOptions") -> None:
    """Print and draw what is found of the queries in each image."""
    refuse_options(
        {"--image-size": options.image_size}, f"is not for {options.run}: its images have a size of their own"
    )
    if not is_model(options.run):
        refuse_weights_options(options.run, {"--weights": options.weights, "--layout": options.layout})
    refuse_prompts(options)
    refuse_options({"--json": options.json}, "is for detectors of fixed classes, whose numbers it writes")
    from eqvision import predict_queried
    from eqvision.predict_objects import describe_found, draw_named

    threshold = predict_queried.THRESHOLD if options.threshold is None else options.threshold
    run, size = _loaded(options), options.batch_size or predict_queried.BATCH_SIZE
    default = Path("predictions") / options.run if is_model(options.run) else options.run / "predictions"
    out = default if options.out is None else options.out
    names = options.queries or run.class_names
    found = predict_queried.find_named(
        run, list(options.images), names, threshold=threshold, top=options.top, batch_size=size
    )
    for each in found:
        print(describe_found(each, threshold, draw_named(each, names, out)))


def _loaded(options: "PredictOptions"):
    from eqvision.predict_queried import load_open_vocabulary_run, load_published_open_vocabulary

    if is_model(options.run):
        return load_published_open_vocabulary(str(options.run), options.weights, layout=options.layout)
    return load_open_vocabulary_run(options.run)
