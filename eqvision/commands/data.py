"""``eqvision data check PATH``: find corrupt images."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from eqvision.commands.arguments import fail, parse, unknown


@dataclass(frozen=True)
class CheckOptions:
    """Decode every image of a data set. Writes bad_files.txt (for --data.exclude of a training run), notes.txt and
    index.npz (the good images with their labels and sizes). Exit code 1 where an image is bad."""

    path: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PATH")]
    """Image folder, tar shards (folder, file or pattern), ArrayRecord files, or a saved TFDS or Hugging Face set."""
    kind: Literal["folder", "tar", "array_record", "tfds", "huggingface"] | None = None
    """Kind of data set, as in --data.kind; default is to tell from the files."""
    split: str | None = None
    """Split to check; default is all of them."""
    jobs: Annotated[int, tyro.conf.arg(aliases=["-j"])] = os.cpu_count() or 1
    """Threads."""
    out: Path = Path("data_check")
    """Folder for the files that are written."""
    min_size: int = 2
    """Images with a shorter side than this, in pixels, are bad too: most are placeholders of web pages."""


def run(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: eqvision data check PATH [options]; eqvision data check --help explains them")
        return
    if arguments[0] != "check":
        fail(unknown("data command", arguments[0], ["check"]))
    options = parse(CheckOptions, arguments[1:], "eqvision data check")
    from eqvision.data.check import check_data, table, write_report
    from eqvision.data.kinds import guess_kind

    report = check_data(
        options.path,
        kind=options.kind or guess_kind(options.path),
        split=options.split,
        num_threads=options.jobs,
        min_size=options.min_size,
    )
    files = write_report(report, options.out)
    print(table(report))
    print("written: " + ", ".join(map(str, files)))
    if report.num_bad:
        print(f"train without the bad images: --data.exclude {files[0]}")
        raise SystemExit(1)
