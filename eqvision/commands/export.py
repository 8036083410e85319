"""``eqvision export RUN_OR_MODEL``: a model as a file for elsewhere."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from eqvision.commands.arguments import fail, parse, unknown

if TYPE_CHECKING:
    from eqvision.export import ModelFile


@dataclass(frozen=True)
class ExportOptions:
    """Write a model as a StableHLO program or as safetensors, to be read by eqvision.export.load_exported and
    load_safetensors."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_OR_MODEL")]
    """Run folder, of which the newest checkpoint is taken, or a name of the zoo, which gives an untrained model."""
    format: Literal["stablehlo", "safetensors"]
    """stablehlo: a program, images -> logits (detectors: images, size -> boxes, scores, labels), for any batch size.
    safetensors: parameters and statistics. For other libraries: eqvision convert."""
    out: Path
    """File to write; stablehlo writes FILE.json beside it."""
    image_size: int | None = None
    """Height and width of the images. A run has its own (others only for stablehlo); default for the zoo is 224."""
    num_classes: int | None = None
    """Zoo only: outputs of the head; default 1000, or a detector's own."""
    in_channels: int | None = None
    """Zoo only: channels of the images; default 3."""
    seed: int | None = None
    """Zoo only: seed of the random parameters; default 0."""
    normalize: bool = True
    """stablehlo: take uint8 pixels 0..255 and normalise inside; without it take floats that are normalised already."""
    platforms: tuple[Literal["cpu", "cuda", "rocm", "tpu"], ...] = ("cpu", "cuda", "tpu")
    """stablehlo: where the program will run."""
    force: bool = False
    """Replace files that exist."""


def run(arguments: list[str]) -> None:
    options = parse(ExportOptions, arguments, "eqvision export")
    try:
        _export(options)
    except (ImportError, OSError) as error:  # no flatbuffers, a file that exists, no permission, a full disk
        fail(str(error))


def _export(options: ExportOptions) -> None:
    from eqvision.export import export_safetensors, export_stablehlo, sidecar

    _check_target(options)
    source = _model(options)
    print(_heading(source))
    if options.format == "safetensors":
        export_safetensors(source, options.out, force=options.force)
        print(f"{options.out}  {_megabytes(options.out)}  parameters, statistics and how to prepare images")
        return
    program = export_stablehlo(
        source, options.out, normalize=options.normalize, platforms=options.platforms, force=options.force
    )
    what = "pixels 0..255" if options.normalize else "normalised images"
    result = program.output if program.card.task == "detection" else f"{program.output} logits"
    print(f"{options.out}  {_megabytes(options.out)}  {program.input} {what} -> {result}")
    print(f"{sidecar(options.out)}  classes, size, mean, std, versions; runs on {', '.join(program.platforms)}")


def _check_target(options: ExportOptions) -> None:
    """Before anything is computed; the export checks again."""
    if options.out.exists() and not options.force and options.out.is_file():
        fail(f"{options.out} exists; nothing was written. Choose another --out, or --force to replace it")


def _model(options: ExportOptions) -> "ModelFile":
    from eqvision.export import model_of_run
    from eqvision.zoo import DETECTORS, MODELS, SEGMENTERS

    path, known = Path(options.source), [*MODELS, *DETECTORS]
    if path.is_dir() and (options.source not in known or (path / "config.yaml").exists()):
        _refuse_zoo_options(options)
        return _resized(model_of_run(path), options)
    if options.source in known:
        return _zoo(options)
    if "/" in options.source:
        raise FileNotFoundError(f"there is no run folder {path.absolute()}")
    if options.source in SEGMENTERS:
        fail(f"{options.source} is a segmenter, and models are exported of classifiers and detectors")
    fail(f"{options.source} is no run folder, and {unknown('model', options.source, known)}")


def _zoo(options: ExportOptions) -> "ModelFile":
    from eqvision.export import model_of_zoo

    given = {
        "num_classes": options.num_classes,
        "image_size": options.image_size,
        "in_channels": options.in_channels,
        "seed": options.seed,
    }
    return model_of_zoo(options.source, **{name: value for name, value in given.items() if value is not None})


def _refuse_zoo_options(options: ExportOptions) -> None:
    given = {"--num-classes": options.num_classes, "--in-channels": options.in_channels, "--seed": options.seed}
    for name, value in given.items():
        if value is not None:
            fail(f"{name} {value} is for models of the zoo; the run {options.source} has its own")


def _resized(source: "ModelFile", options: ExportOptions) -> "ModelFile":
    """A program may take images of another size than the run's; position embeddings are resampled in it."""
    size = source.card.image_size if options.image_size is None else (options.image_size, options.image_size)
    if size == source.card.image_size:
        return source
    if options.format == "safetensors":
        fail(f"--image-size {size[0]}: the run was trained at {source.card.image_size[0]}, which its parameters keep")
    return source._replace(card=dataclasses.replace(source.card, image_size=size))


def _heading(source: "ModelFile") -> str:
    import jax

    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(source.model))
    return f"{source.card.model}, {source.card.origin}, {count:,} parameters"


def _megabytes(file: Path) -> str:
    return f"{file.stat().st_size / 1e6:.1f} MB"
