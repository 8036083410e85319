"""``eqvision predict`` for models that take prompts, such as ``sam_vit_b``."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from eqvision.commands.arguments import fail, is_model, refuse_options, refuse_weights_options

if TYPE_CHECKING:
    from eqvision.commands.predict import PredictOptions
    from eqvision.segmenters.sam import Predictor

BATCH_SIZE = 64  # points of a grid that are computed at a time


def is_prompted(source: Path) -> bool:
    """Whether the argument names a model that takes prompts, or the run folder of one."""
    from eqvision.recipes import PromptedConfig
    from eqvision.run_folder import RunFolder
    from eqvision.zoo import PROMPTED

    if is_model(source):
        return str(source) in PROMPTED
    return isinstance(RunFolder(source).config(), PromptedConfig)


def refuse_prompts(options: "PredictOptions") -> None:
    """Exit with code 2 for options that only models with prompts have."""
    given = {**_of_prompts(options), **_of_everything(options), "--everything": options.everything or None}
    refuse_options(
        given, f"is for models that take prompts (eqvision list --kind prompted), and {options.run} takes none"
    )


def draw_masks(options: "PredictOptions") -> None:
    """Print, draw and write the masks of each image."""
    only = {"--image-size": options.image_size, "--json": options.json}
    refuse_options(only, f"is not for {options.run}: its images have the size of its weights, and JSON lies in --out")
    if options.everything:
        refuse_options(_of_prompts(options), "is a prompt, and --everything asks without prompts; give one of them")
    else:
        only = {**_of_everything(options), "--threshold": options.threshold, "--top": options.top}
        refuse_options({**only, "--batch-size": options.batch_size}, "is for --everything, which is not given")
    default = Path("predictions") / options.run if is_model(options.run) else options.run / "predictions"
    out = default if options.out is None else options.out
    from eqvision.predict_prompted import summary, write_masks

    for found in _everything(options) if options.everything else _prompted(options):
        print(f"{summary(found)}  -> {write_masks(found, out)}")


def _prompted(options: "PredictOptions"):
    from eqvision.predict_prompted import Choice, Prompt, ask, check_prompt

    prompt, choice = Prompt(options.prompt_points, options.prompt_box), options.masks or "auto"
    if choice not in get_args(Choice):
        fail(f"--masks {choice}; expected one of {', '.join(get_args(Choice))}")
    check_prompt(prompt)
    slots = max(1, len(prompt.points))
    predictor = _predictor(options, prompts_per_batch=1, max_points=slots)
    for path in options.images:
        yield ask(predictor, path, prompt, choice)


def _everything(options: "PredictOptions"):
    from eqvision.predict_prompted import find_everything
    from eqvision.segmenters.sam import MaskSearch

    given = {
        "points_per_side": options.points_per_side,
        "crop_layers": options.crop_layers,
        "least_iou": options.threshold,
    }
    search = MaskSearch(**{name: value for name, value in given.items() if value is not None})
    size = options.batch_size or min(BATCH_SIZE, search.points_per_side**2)
    predictor = _predictor(options, prompts_per_batch=size, max_points=1)
    for path in options.images:
        yield find_everything(predictor, path, search, most=options.top)


def _predictor(options: "PredictOptions", *, prompts_per_batch: int, max_points: int) -> "Predictor":
    from eqvision.predict_prompted import load_predictor, run_predictor

    if is_model(options.run):
        name, layout = str(options.run), options.layout
        return load_predictor(
            name, options.weights, layout=layout, prompts_per_batch=prompts_per_batch, max_points=max_points
        )
    refuse_weights_options(options.run, {"--weights": options.weights, "--layout": options.layout})
    return run_predictor(options.run, prompts_per_batch=prompts_per_batch, max_points=max_points)


def _of_prompts(options: "PredictOptions") -> Mapping[str, object]:
    points = " ".join(f"{x:g} {y:g} {label}" for x, y, label in options.prompt_points)
    box = options.prompt_box and " ".join(f"{side:g}" for side in options.prompt_box)
    return {"--prompt-points": points or None, "--prompt-box": box, "--masks": options.masks}


def _of_everything(options: "PredictOptions") -> Mapping[str, object]:
    return {"--points-per-side": options.points_per_side, "--crop-layers": options.crop_layers}
