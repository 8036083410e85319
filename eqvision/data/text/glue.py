"""GLUE's files (Wang et al. 2019): tables of texts or pairs of texts with labels, one folder for each task.

They are those of gluebenchmark.com, one zip archive a task; MRPC's are ``train.tsv``, ``dev.tsv`` and ``test.tsv`` as
GLUE's download script makes them. Nothing is downloaded here. Quotation marks are letters like any other.
"""

import csv
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from eqvision.metrics.glue import GlueTask, glue_task

log = logging.getLogger("eqvision.data")

GlueSplit = Literal["train", "dev", "test"]


class GlueColumns(NamedTuple):
    """Where a task's table has what: names of the header, or numbers in a table without one."""

    folder: str
    first: str
    second: str | None
    label: str
    bare: tuple[str, ...] = ()
    """Columns of a training or development table without a header."""
    suffix: str = ""
    """Between the names of the development or test table and ``.tsv``."""


MNLI = GlueColumns("MNLI", "sentence1", "sentence2", "gold_label")
GLUE_FILES: dict[str, GlueColumns] = {
    "cola": GlueColumns("CoLA", "sentence", None, "label", bare=("source", "label", "star", "sentence")),
    "sst2": GlueColumns("SST-2", "sentence", None, "label"),
    "mrpc": GlueColumns("MRPC", "#1 String", "#2 String", "Quality"),
    "qqp": GlueColumns("QQP", "question1", "question2", "is_duplicate"),
    "stsb": GlueColumns("STS-B", "sentence1", "sentence2", "score"),
    "mnli_matched": MNLI._replace(suffix="_matched"),
    "mnli_mismatched": MNLI._replace(suffix="_mismatched"),
    "qnli": GlueColumns("QNLI", "question", "sentence", "label"),
    "rte": GlueColumns("RTE", "sentence1", "sentence2", "label"),
    "wnli": GlueColumns("WNLI", "sentence1", "sentence2", "label"),
    "ax": GlueColumns("AX", "sentence1", "sentence2", ""),
}


class GlueTexts(NamedTuple):
    """A table: texts, the second ones of pairs (None: single texts), labels (None: the table has none) and its file.

    Labels are classes in the order of ``GLUE_TASKS``, or values for a regression.
    """

    first: list[str]
    second: list[str] | None
    labels: Int[np.ndarray, " n"] | Float[np.ndarray, " n"] | None
    file: Path

    def __len__(self) -> int:
        return len(self.first)


def read_glue(folder: str | os.PathLike, task: str, split: GlueSplit) -> GlueTexts:
    """A table of a task. ``folder`` is GLUE's, with one folder a task in it (``CoLA``, ``SST-2`` ...), or the task's.

    Rows without one of the columns, which QQP has a few of, are left out, with a warning that says how many. Raises
    UnknownNameError for an unknown task, FileNotFoundError with where the file should lie, and ValueError for a table
    without the columns, a label that is none of the task's, and tables that do not exist: AX has only ``test``.
    """
    columns = _columns(task)
    file = _file(Path(folder).expanduser(), task, columns, split)
    bare = columns.bare if split != "test" else ()
    wanted = [
        columns.first,
        *([columns.second] if columns.second else []),
        *([columns.label] if split != "test" else []),
    ]
    rows, short = [], []
    for number, row in _rows(file, bare, wanted):
        if row is None:
            short.append(number)
        else:
            rows.append((number, row))
    if short:
        log.warning("%s: %d rows without all columns are left out, the first in line %d", file, len(short), short[0])
    labels = None if split == "test" else _labels([(n, row[-1]) for n, row in rows], glue_task(task), file)
    second = [row[1] for _, row in rows] if columns.second else None
    return GlueTexts([row[0] for _, row in rows], second, labels, file)


def _columns(task: str) -> GlueColumns:
    glue_task(task)  # raises for an unknown one
    return GLUE_FILES[task]


def _file(folder: Path, task: str, columns: GlueColumns, split: GlueSplit) -> Path:
    if task == "ax":
        if split != "test":
            raise ValueError(f"GLUE's ax has no split {split!r}: it is a test for models of MNLI")
        name = "diagnostic.tsv"
    else:
        name = f"{split}{'' if split == 'train' else columns.suffix}.tsv"
    places = (folder / columns.folder / name, folder / name)
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"no {split} table of GLUE's {task}: expected {places[0].absolute()} or {places[1].name} in {folder}; "
            "get the task's archive from gluebenchmark.com/tasks and unpack it there"
        )
    return found


def _rows(file: Path, bare: tuple[str, ...], wanted: list[str]) -> Iterator[tuple[int, list[str] | None]]:
    """Number of its line and the columns wanted of each row; None for a row that lacks one."""
    with file.open(encoding="utf-8-sig", newline="\n") as opened:
        table = csv.reader(opened, delimiter="\t", quoting=csv.QUOTE_NONE)
        header = list(bare) or next(table, [])
        absent = [name for name in wanted if name not in header]
        if absent:
            raise ValueError(f"{file} has no column {', '.join(absent)}; its columns are {', '.join(header) or 'none'}")
        places = [header.index(name) for name in wanted]
        for row in table:
            yield table.line_num, [row[place] for place in places] if len(row) > max(places) else None


def _labels(
    labels: list[tuple[int, str]], task: GlueTask, file: Path
) -> Int[np.ndarray, " n"] | Float[np.ndarray, " n"]:
    """Raises ValueError, naming the line, for what is no class of the task, or no number."""
    kind = np.int64 if task.classes else np.float64
    return np.array([_label(text, task, f"{file}, line {number}") for number, text in labels], kind)


def _label(text: str, task: GlueTask, where: str) -> int | float:
    if not task.classes:
        value = _number(text)
        if not math.isfinite(value):
            raise ValueError(f"{where}: label {text!r} is no number")
        return value
    if text in task.classes:
        return task.classes.index(text)
    if text.isdigit() and int(text) < len(task.classes):
        return int(text)
    raise ValueError(f"{where}: label {text!r} is no class of the task, which are {', '.join(task.classes)}")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
