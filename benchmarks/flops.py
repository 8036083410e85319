"""Parameters, multiply-adds and activations of zoo models, beside published figures.

Run from the repository root::

    python benchmarks/flops.py                                  # every model with a published figure
    python benchmarks/flops.py 'vit_*' resnet50 --image-size 384 --csv counts.csv

Nothing is compiled and no parameter is allocated: the model is built and traced on shapes, and the traced
program is walked.
What is counted and where conventions differ is said in eqvision/counting.py.
"""

import argparse
import csv
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import eqvision
from benchmarks import timing
from eqvision.counting import count_model
from eqvision.names import nearest


class Published(NamedTuple):
    """Figures at 224 px with 1000 classes: multiply-adds in 1e9, parameters and activations in millions."""

    params: float
    gmacs: float
    activations: float
    source: str


class Row(NamedTuple):
    """One line of the table, in the units of ``Published``; deviations are in per cent of that figure."""

    model: str
    image_size: int
    params: float
    params_deviation: float | None
    gmacs: float
    gmacs_deviation: float | None
    activations: float
    activations_deviation: float | None
    source: str


# timm: results/benchmark-infer-amp-nchw-pt240-cu124-rtx4090.csv of huggingface/pytorch-image-models, columns
# param_count, infer_gmacs and infer_macts; the last field names the row.
# torchvision: num_params and _ops of the weight enums in torchvision/models/resnet.py. It publishes no
# activations, so those of its rows are timm's. timm's vit_large_patch32_224 and vit_huge_patch14_224 have no
# 1000-class head, so their parameters are num_params of torchvision/models/vision_transformer.py.
PUBLISHED = {
    "resnet18": Published(11.689512, 1.814, 2.48, "torchvision ResNet18_Weights"),
    "resnet34": Published(21.797672, 3.664, 3.74, "torchvision ResNet34_Weights"),
    "resnet50": Published(25.557032, 4.089, 11.11, "torchvision ResNet50_Weights"),
    "resnet101": Published(44.549160, 7.801, 16.23, "torchvision ResNet101_Weights"),
    "resnet152": Published(60.192808, 11.514, 22.56, "torchvision ResNet152_Weights"),
    "vit_ti16": Published(5.72, 1.26, 5.97, "timm vit_tiny_patch16_224"),
    "vit_s16": Published(22.05, 4.61, 11.95, "timm vit_small_patch16_224"),
    "vit_s32": Published(22.88, 1.15, 2.5, "timm vit_small_patch32_224"),
    "vit_b8": Published(86.58, 78.22, 161.69, "timm vit_base_patch8_224"),
    "vit_b16": Published(86.57, 17.58, 23.9, "timm vit_base_patch16_224"),
    "vit_b32": Published(88.22, 4.41, 5.01, "timm vit_base_patch32_224"),
    "vit_l16": Published(304.33, 61.6, 63.52, "timm vit_large_patch16_224"),
    "vit_l32": Published(306.535400, 15.39, 13.3, "timm vit_large_patch32_224, torchvision ViT_L_32"),
    "vit_h14": Published(632.045800, 167.4, 139.41, "timm vit_huge_patch14_224, torchvision ViT_H_14"),
    "vit_g14": Published(1012.61, 267.18, 192.64, "timm vit_giant_patch14_224"),
    "vit_G14": Published(1844.44, 483.95, 275.37, "timm vit_gigantic_patch14_224"),
    "mixer_b16": Published(59.88, 12.62, 14.53, "timm mixer_b16_224"),
    "mixer_l16": Published(208.2, 44.6, 41.69, "timm mixer_l16_224"),
    "bit_r50x1": Published(25.55, 4.23, 11.11, "timm resnetv2_50x1_bit"),
    "bit_r50x3": Published(217.32, 37.06, 33.34, "timm resnetv2_50x3_bit"),
    "bit_r101x1": Published(44.54, 8.04, 16.23, "timm resnetv2_101x1_bit"),
    "bit_r101x3": Published(387.93, 71.23, 48.7, "timm resnetv2_101x3_bit"),
    "bit_r152x2": Published(236.34, 46.95, 45.11, "timm resnetv2_152x2_bit"),
    "bit_r152x4": Published(936.53, 186.9, 90.22, "timm resnetv2_152x4_bit"),
}
PUBLISHED_SIZE = 224

# Blocks per stage and width factor: Kolesnikov et al. 2020, section 3.1.
BIT = {
    "bit_r50x1": ((3, 4, 6, 3), 1),
    "bit_r50x3": ((3, 4, 6, 3), 3),
    "bit_r101x1": ((3, 4, 23, 3), 1),
    "bit_r101x3": ((3, 4, 23, 3), 3),
    "bit_r152x2": ((3, 8, 36, 3), 2),
    "bit_r152x4": ((3, 8, 36, 3), 4),
}


def fvcore_additions(name: str) -> int:
    """What timm's figure of a BiT holds beside products: 5 per normalised element, 4 per standardised weight, pooling.

    Elsewhere fvcore's additions are below 0.7 % and left in the deviation.
    """
    if name not in BIT:
        return 0
    blocks, factor = BIT[name]
    channels, size = 64 * factor, 56
    normalised, standardised = 0, 7 * 7 * 3 * channels
    for stage, depth in enumerate(blocks):
        middle, out = 64 * factor * 2**stage, 256 * factor * 2**stage
        for block in range(depth):
            small = size // 2 if stage and not block else size
            normalised += (channels + middle) * size**2 + middle * small**2
            standardised += channels * middle + 9 * middle**2 + middle * out
            standardised += 0 if block else channels * out  # the projection
            channels, size = out, small
    normalised += channels * size**2
    return 5 * normalised + 4 * standardised + channels * size**2


def row(name: str, image_size: int) -> Row:
    """The table's line for one model; deviations are None where nothing is published for this size."""
    counts = count_model(name, image_size)
    params, gmacs, activations = counts.params / 1e6, counts.macs / 1e9, counts.activations / 1e6
    if name not in PUBLISHED or image_size != PUBLISHED_SIZE:
        return Row(name, image_size, params, None, gmacs, None, activations, None, "")
    known = PUBLISHED[name]
    comparable = (params, gmacs + fvcore_additions(name) / 1e9, activations)
    off = [deviation(*pair) for pair in zip(comparable, known[:3], strict=True)]
    source = known.source + (" (with its additions for norms)" if name in BIT else "")
    return Row(name, image_size, params, off[0], gmacs, off[1], activations, off[2], source)


def deviation(value: float, published: float) -> float:
    """In per cent of the published figure."""
    return 100 * (value / published - 1)


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table; a dash stands where nothing is published."""
    heads = (
        "model",
        "image size",
        "params (M)",
        "dev. %",
        "GMACs",
        "dev. %",
        "activations (M)",
        "dev. %",
        "published by",
    )
    lines = [heads, ("---", *["---:"] * 7, "---"), *[_cells(row) for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cells(row: Row) -> tuple[str, ...]:
    params = (f"{row.params:.2f}", _percent(row.params_deviation))
    gmacs = (f"{row.gmacs:.3f}", _percent(row.gmacs_deviation))
    activations = (f"{row.activations:.2f}", _percent(row.activations_deviation))
    return (row.model, str(row.image_size), *params, *gmacs, *activations, row.source or "-")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Unrounded figures, one row per model, with the field names of ``Row`` as header."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows(rows)


def resolve(patterns: Sequence[str]) -> list[str]:
    """Zoo names that the patterns match, once each; UnknownNameError for a pattern that matches nothing."""
    names = []
    for pattern in patterns:
        found = eqvision.list_models(pattern)
        if not found:
            raise nearest(pattern, eqvision.list_models("*"), "model")
        names += found
    return list(dict.fromkeys(names))


def published_names() -> list[str]:
    """Models with a published figure; those that the zoo does not have are left out and named on stderr."""
    zoo = eqvision.list_models("*")
    missing = [name for name in PUBLISHED if name not in zoo]
    if missing:
        print(f"published, but not in the zoo: {', '.join(missing)}", file=sys.stderr)
    return [name for name in PUBLISHED if name in zoo]


def read_options(arguments: Sequence[str] | None) -> tuple[list[str], int, Path | None]:
    """Names, image size and CSV file; leaves the program with a message where they make no sense."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names_help = "names or quoted shell patterns of zoo models (default: all with a published figure)"
    size_help = f"height and width in pixels (default: {PUBLISHED_SIZE})"
    parser.add_argument("names", nargs="*", metavar="NAME", help=names_help)
    parser.add_argument("--image-size", type=int, default=PUBLISHED_SIZE, metavar="PIXELS", help=size_help)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the unrounded rows to this file")
    options = parser.parse_args(arguments)
    if options.csv and not options.csv.parent.is_dir():
        parser.error(f"--csv {options.csv}: the folder {options.csv.parent} does not exist; create it first")
    try:
        return resolve(options.names) or published_names(), options.image_size, options.csv
    except eqvision.UnknownNameError as error:
        parser.error(str(error))


def main(arguments: Sequence[str] | None = None) -> None:
    names, image_size, csv_file = read_options(arguments)
    rows = [row(name, image_size) for name in tqdm(names, delay=2, leave=False)]
    given = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "benchmarks/flops.py", *given])
    print(f"`{command}` with {timing.versions(['jax', 'equinox', 'eqvision'])}\n\n{markdown(rows)}")
    if csv_file:
        write_csv(csv_file, rows)


if __name__ == "__main__":
    main()
