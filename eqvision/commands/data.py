"""``eqvision data check PATH``: find corrupt images. ``eqvision data convert SOURCE OUT.json``: boxes as COCO JSON."""

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


@dataclass(frozen=True)
class ConvertOptions:
    """Write a detection data set in Pascal VOC or YOLO format as COCO JSON, which training and evaluation read.

    Classes are numbered in the order of their names (VOC) or as in the data set (YOLO); convert every split with the
    same classes. VOC's difficult objects become crowd ones: ignored in training and evaluation."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """VOC: folder with Annotations/*.xml, or with the XML files. YOLO: data.yaml, or folder of images and labels."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT.json")]
    """File to write; the image paths in it are relative to its folder."""
    kind: Literal["voc", "yolo"] | None = None
    """Format; default is to tell from the files."""
    split: str | None = None
    """VOC: a list in ImageSets/Main. YOLO: train, val or test of data.yaml, or a folder. Default is everything."""
    images: Path | None = None
    """Folder of the images, where it is another than usual."""
    class_names: tuple[str, ...] | None = None
    """Names of the classes in order, in place of those of the data set."""
    coordinates: Literal["one-based", "edges"] = "one-based"
    """What VOC boxes mean: numbers of the first and last pixel counted from 1 (VOC's own), or edges from 0."""
    force: bool = False
    """Replace OUT.json where it exists."""


def run(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: eqvision data check PATH [options]; eqvision data convert SOURCE OUT.json [options]")
        print("Each explains its options with --help.")
        return
    if arguments[0] not in _COMMANDS:
        fail(unknown("data command", arguments[0], list(_COMMANDS)))
    _COMMANDS[arguments[0]](arguments[1:])


def _check(arguments: list[str]) -> None:
    options = parse(CheckOptions, arguments, "eqvision data check")
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


def _convert(arguments: list[str]) -> None:
    options = parse(ConvertOptions, arguments, "eqvision data convert")
    from eqvision.data.detection.convert import convert_to_coco

    done = convert_to_coco(
        options.source,
        options.out,
        kind=options.kind,
        split=options.split,
        images=options.images,
        class_names=options.class_names,
        coordinates=options.coordinates,
        force=options.force,
    )
    ignored = f" ({done.num_crowd} difficult, ignored)" if done.num_crowd else ""
    print(f"{done.kind}: {done.num_images} images, {done.num_objects} objects{ignored}")
    print(f"{len(done.class_names)} classes: {', '.join(done.class_names)}")
    print(f"written: {done.file}")


_COMMANDS = {"check": _check, "convert": _convert}
