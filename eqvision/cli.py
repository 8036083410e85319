"""``eqvision train | eval | predict | info | list``. Heavy imports wait until a command needs them."""

import dataclasses
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

USAGE = """usage: eqvision COMMAND ...

  train RECIPE [options]          train, or resume, a recipe; --help lists its options
  eval RUN_FOLDER [options]       evaluate the newest checkpoint of a run
  predict RUN_FOLDER IMAGE...     label images and draw the labels on them
  info MODEL [options]            parameters, multiply-adds and feature shapes of a model
  list [PATTERN]                  names of models, such as: eqvision list 'vit*'

recipes: {recipes}
Each command explains its options with --help."""

# Under glibc's defaults XLA on the CPU gives its buffers back and faults them in anew in every step. Huge pages make
# those faults few: training steps take a fifth to a quarter less time, at the same memory. Other settings that keep
# freed memory gain no more and can double what larger models hold. It acts only if set before the process starts, and
# needs glibc 2.35 and transparent huge pages set to madvise or always.
ALLOCATOR = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def main(arguments: list[str] | None = None) -> None:
    """Entry point; errors that the user can mend are printed without a trace and exit with code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help"):
        print(_usage())
        return
    if command not in COMMANDS:
        _fail(_unknown("command", command, list(COMMANDS)))
    try:
        COMMANDS[command](rest)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has gone: nothing more can be printed, at exit neither
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except _expected_errors() as error:
        if os.environ.get("EQVISION_TRACEBACK"):
            raise
        # JAX adds a note of its own, about its traceback, which begins with a rule.
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()) if not note.startswith("--"))
        _fail(f"{error.args[0] if isinstance(error, KeyError) else error}{notes}")


def _expected_errors() -> tuple[type[Exception], ...]:
    """Errors about what was given. Anything else is a defect and shows its trace."""
    from eqvision.data import CorruptImageError
    from eqvision.run_folder import RunFolderError
    from eqvision.train import DivergedError

    return (
        ValueError,
        FileNotFoundError,
        NotADirectoryError,
        KeyError,
        CorruptImageError,
        RunFolderError,
        DivergedError,
    )


def _usage() -> str:
    from eqvision.recipes import RECIPES

    return USAGE.format(recipes=", ".join(RECIPES))


def _unknown(what: str, name: str, valid: list[str]) -> str:
    from eqvision.names import nearest

    return str(nearest(name, valid, what))


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _train(arguments: list[str]) -> None:
    from eqvision.recipes import RECIPES, TrainConfig

    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: eqvision train RECIPE [options]; recipes:\n")
        for name, recipe in RECIPES.items():
            print(f"  {name:<12}{(recipe.__doc__ or '').strip().splitlines()[0]}")
        return
    name, rest = arguments[0], arguments[1:]
    if name not in RECIPES:
        _fail(_unknown("recipe", name, list(RECIPES)))
    recipe = RECIPES[name]
    default = dataclasses.replace(recipe(), out=f"runs/{name}")
    config = tyro.cli(
        TrainConfig, default=default, args=rest, prog=f"eqvision train {name}", description=recipe.__doc__
    )
    _tune_allocator()
    from eqvision.train import train

    result = train(config)
    if result.num_skipped:
        print(f"skipped {result.num_skipped} corrupt images; their paths are in the log above", file=sys.stderr)
    for metric, value in result.metrics.items():
        print(f"test/{metric} {value:.4f}")
    print(f"run folder: {result.folder}")


def _tune_allocator() -> None:
    """Start this process again with the allocator set for XLA on the CPU; on other devices do nothing.

    EQVISION_ALLOCATOR=default keeps glibc's own settings.
    """
    import jax

    command = Path(sys.argv[0]).stem in ("eqvision", "cli", "train")  # and not a notebook that called main([...])
    if not command or os.environ.get("EQVISION_ALLOCATOR") or sys.platform != "linux" or jax.default_backend() != "cpu":
        return
    print(
        "CPU run: starting again with memory allocation tuned (EQVISION_ALLOCATOR=default turns it off)",
        file=sys.stderr,
    )
    os.execve(
        sys.executable, [sys.executable, *sys.orig_argv[1:]], {**ALLOCATOR, **os.environ, "EQVISION_ALLOCATOR": "tuned"}
    )


@dataclass(frozen=True)
class EvalOptions:
    """Evaluate the newest checkpoint of a run on its own test split, or on other images of the same classes."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN_FOLDER")]
    """Run folder."""
    data_path: str | None = None
    """Folder or file to evaluate on; default is the run's own."""
    split: str | None = None
    """Split to evaluate on; default is the run's test split."""


def _eval(arguments: list[str]) -> None:
    options = _parse(EvalOptions, arguments, "eqvision eval")
    from eqvision.predict import evaluate_run

    evaluation = evaluate_run(options.run, data_path=options.data_path, split=options.split)
    for metric, value in evaluation.metrics.items():
        print(f"test/{metric} {value:.4f}")


@dataclass(frozen=True)
class PredictOptions:
    """Label images with the newest checkpoint of a run, and draw the labels on them."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN_FOLDER")]
    """Run folder."""
    images: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE...")]
    """Image files."""
    out: Path | None = None
    """Folder of the annotated PNGs; default is RUN_FOLDER/predictions."""
    top: int = 3
    """Classes to print for each image."""


def _predict(arguments: list[str]) -> None:
    options = _parse(PredictOptions, arguments, "eqvision predict")
    if not options.images:
        _fail("name at least one image: eqvision predict RUN_FOLDER IMAGE...")
    from eqvision.predict import draw, load_run, predict

    run = load_run(options.run)
    out = options.run / "predictions" if options.out is None else options.out
    for prediction in predict(run, list(options.images), top=options.top):
        picture = draw(prediction, out)
        scores = ", ".join(
            f"{label} {score:.3f}" for label, score in zip(prediction.labels, prediction.scores, strict=True)
        )
        print(f"{prediction.path}: {scores}  -> {picture}")


@dataclass(frozen=True)
class InfoOptions:
    """Parameters, multiply-adds, activations and feature shapes of a model; nothing is allocated."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Name in the zoo."""
    image_size: int = 224
    """Height and width in pixels."""
    num_classes: int = 1000
    """Outputs of the head."""
    in_channels: int = 3
    """Channels of the images."""


def _info(arguments: list[str]) -> None:
    options = _parse(InfoOptions, arguments, "eqvision info")
    from eqvision.info import describe

    print(
        describe(
            options.model,
            image_size=options.image_size,
            num_classes=options.num_classes,
            in_channels=options.in_channels,
        )
    )


@dataclass(frozen=True)
class ListOptions:
    """Names of models."""

    pattern: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATTERN")] = "*"
    """Shell pattern, quoted: 'vit*'."""


def _list(arguments: list[str]) -> None:
    options = _parse(ListOptions, arguments, "eqvision list")
    from eqvision.zoo import MODELS, list_models

    names = list_models(options.pattern)
    if not names:
        _fail(_unknown("model", options.pattern, list(MODELS)))
    print("\n".join(names))


def _parse(kind: type, arguments: list[str], program: str):
    return tyro.cli(kind, args=arguments, prog=program)


COMMANDS = {"train": _train, "eval": _eval, "predict": _predict, "info": _info, "list": _list}

if __name__ == "__main__":
    main()
