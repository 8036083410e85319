"""What all commands share: parsing by tyro, and errors that the user can mend."""

import argparse
import dataclasses
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

import tyro

from eqvision.commands.pairs import REGISTRY

if TYPE_CHECKING:
    from eqvision.recipes import RunConfig

T = TypeVar("T")


def parse(kind: type[T], arguments: list[str], program: str) -> T:
    """The dataclass ``kind`` from the command line; its docstrings are the help."""
    return tyro.cli(kind, args=arguments, prog=program)


def parse_recipe(arguments: list[str], program: str) -> "RunConfig | None":
    """The configuration of ``RECIPE [--config FILE] [options]``: the recipe's, then the file's, then the options'.

    None where there are no arguments or only a call for help: the recipes are printed then. Exits with code 2 for an
    unknown recipe or option; raises ValueError for what is wrong in the file.
    """
    from eqvision.recipes import RECIPES

    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: {program} RECIPE [--config FILE] [options]; recipes:\n")
        width = max(map(len, RECIPES))
        for name, recipe in RECIPES.items():
            print(f"  {name:<{width}}  {(recipe.__doc__ or '').strip().splitlines()[0]}")
        return None
    name = arguments[0]
    if name not in RECIPES:
        fail(unknown("recipe", name, list(RECIPES)))
    before = argparse.ArgumentParser(prog=f"{program} {name}", add_help=False, allow_abbrev=False)
    before.add_argument("--config", type=Path)
    given, options = before.parse_known_args(arguments[1:])
    recipe = RECIPES[name]
    default = dataclasses.replace(recipe(), out=f"runs/{name}")
    default = default if given.config is None else _with_file(default, given.config)
    text = inspect.cleandoc(recipe.__doc__ or "")
    description = f"{text}\n\n--config FILE: YAML as `eqvision config` prints it, or a part of it; options win."
    with REGISTRY:
        return tyro.cli(
            type(default),
            default=default,
            args=options,
            prog=f"{program} {name}",
            description=description,
            config=(tyro.conf.AvoidSubcommands,),  # the loss is of the recipe's kind
        )


def _with_file(config: "RunConfig", file: Path) -> "RunConfig":
    """The configuration with what a YAML file says; the ``config.yaml`` of a run folder is such a file too."""
    import yaml

    from eqvision.recipes.serialise import overlay

    if not file.is_file():
        raise FileNotFoundError(f"no configuration at {file.absolute()}" + ", which is a folder" * file.is_dir())
    try:
        values = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no YAML: {error}") from error
    if isinstance(values, dict) and isinstance(values.get("config"), dict):
        values = values["config"]
    if not isinstance(values, dict):
        given = "nothing" if values is None else f"{type(values).__name__} {str(values)[:40]!r}"
        raise ValueError(f"{file}: expected options, such as `loop: {{batch_size: 64}}`, got {given}")
    try:
        return overlay(config, values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def is_model(source: Path) -> bool:
    """Whether the argument is a name of the zoo and no run folder. Exits with code 2 where it is neither: a path with
    one part that does not exist, which may be a misspelt name."""
    from eqvision.zoo import TABLES

    name, known = str(source), [name for table in TABLES.values() for name in table]
    if name in known:
        return not (source / "config.yaml").exists()
    if not source.exists() and len(source.parts) == 1:
        fail(f"{name} is no run folder, and {unknown('model', name, known)}")
    return False


def is_detector(source: Path) -> bool:
    """Whether a name of the zoo, or a run folder, is a detector's. Raises RunFolderError where it is neither."""
    from eqvision.recipes import DetectionConfig
    from eqvision.run_folder import RunFolder
    from eqvision.zoo import DETECTORS

    if is_model(source):
        return str(source) in DETECTORS
    return isinstance(RunFolder(source).config(), DetectionConfig)


def is_segmenter(source: Path) -> bool:
    """Whether a name of the zoo, or a run folder, is a segmenter's. Raises RunFolderError where it is neither."""
    from eqvision.recipes import SegmentationConfig
    from eqvision.run_folder import RunFolder
    from eqvision.zoo import SEGMENTERS

    if is_model(source):
        return str(source) in SEGMENTERS
    return isinstance(RunFolder(source).config(), SegmentationConfig)


def is_classifier_run(run: Path) -> bool:
    """Whether a run folder is an image classifier's. Raises RunFolderError where it is none."""
    from eqvision.recipes import TrainConfig
    from eqvision.run_folder import RunFolder

    return isinstance(RunFolder(run).config(), TrainConfig)


def is_masked_run(run: Path) -> bool:
    """Whether a run folder is a masked autoencoder's. Raises RunFolderError where it is none."""
    from eqvision.recipes import MaskedConfig
    from eqvision.run_folder import RunFolder

    return isinstance(RunFolder(run).config(), MaskedConfig)


def refuse_options(options: Mapping[str, object], why: str) -> None:
    """Exit with code 2 for the first option that was given; ``why`` says what it is for."""
    for name, value in options.items():
        if value is not None:
            fail(f"{name} {value} {why}")


def refuse_weights_options(run: Path, options: Mapping[str, object]) -> None:
    """Exit with code 2 for options that only published weights have, given together with a run folder."""
    refuse_options(options, f"is for models of the zoo; the run {run} has its own")


def fail(message: str) -> NoReturn:
    """Print the message and exit with code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def unknown(what: str, name: str, valid: list[str]) -> str:
    """The message for a name that does not exist, with the nearest that do."""
    from eqvision.names import nearest

    return str(nearest(name, valid, what))
