"""``eqvision convert SOURCE OUT``: weights in the names of another library."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from eqvision.commands.arguments import parse


@dataclass(frozen=True)
class ConvertOptions:
    """Read weights of any layout that is known here, or of a run, and write them in the names of another."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """File or folder of weights, run folder, hf:organisation/repository, a URL, or a tag of the model's weights."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """File to write, .safetensors or .npz; for --to hf a folder, which gets config.json too."""
    to: str
    """eqvision; an origin, such as timm, hf, torchvision or google; or the name of a layout (docs/weights.md)."""
    model: str | None = None
    """Name in the zoo; runs and files of eqvision know theirs."""
    layout: str | None = None
    """Names of the tensors in SOURCE, where they do not tell it."""
    force: bool = False
    """Replace files that exist."""


def run(arguments: list[str]) -> None:
    options = parse(ConvertOptions, arguments, "eqvision convert")
    from eqvision.convert import convert

    done = convert(
        options.source, options.out, to=options.to, name=options.model, layout=options.layout, force=options.force
    )
    for file in done.files:
        print(file)
    print(f"{done.num_tensors} tensors as {done.layout.name}, {done.layout.source}")
    if done.differences:
        lines = "".join(f"\n  {line}" for line in done.differences)
        print(f"models there compute otherwise, so outputs will differ a little:{lines}", file=sys.stderr)
