"""Plain text files: a stretch of bytes over all files of a folder, cut at lines, read line by line."""

import bisect
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

DocumentEnd = Literal["blank_line", "file"]
MANY = 64  # stretches that a sample of a large text is taken from


class TextPart(NamedTuple):
    """Bytes ``first`` to ``last`` of files that are thought of as one behind the other. No line is cut."""

    files: tuple[Path, ...]
    sizes: tuple[int, ...]
    first: int
    last: int

    @property
    def num_bytes(self) -> int:
        return self.last - self.first

    def __str__(self) -> str:
        name = str(self.files[0]) if len(self.files) == 1 else f"{len(self.files)} files from {self.files[0]} on"
        return f"{name}, bytes {self.first}..{self.last - 1}"


def find_texts(path: str | os.PathLike) -> TextPart:
    """A text file, or all ``*.txt`` of a folder and the folders in it, in order of their paths.

    Raises FileNotFoundError where there are none, ValueError where they are empty.
    """
    path = Path(path).expanduser().absolute()
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    files = [file for file in files if file.is_file()]
    if not files:
        raise FileNotFoundError(f"no text at {path}: expected a file, or a folder with *.txt")
    sizes = [file.stat().st_size for file in files]
    if not sum(sizes):
        raise ValueError(f"{path} holds no text: {len(files)} empty files")
    return TextPart(tuple(files), tuple(sizes), 0, sum(sizes))


def split_text(whole: TextPart, share: float) -> tuple[TextPart, TextPart]:
    """The text without its last ``share`` of bytes, and that: one stretch each, cut at the next line.

    Raises ValueError for a share that is none, and where a part would be empty.
    """
    if not 0 < share < 1:
        raise ValueError(f"share={share}; expected the share of the text that is held back, between 0 and 1")
    cut = _line_start(whole, whole.last - round(share * whole.num_bytes))
    if not whole.first < cut < whole.last:
        raise ValueError(f"{whole} is too short to hold {share:.0%} of it back: there is no line to cut at")
    return whole._replace(last=cut), whole._replace(first=cut)


def sample_text(part: TextPart, most: int) -> list[TextPart]:
    """About ``most`` bytes of a text, in stretches that lie evenly in it; all of it where it is not longer."""
    if part.num_bytes <= most:
        return [part]
    starts = [part.first + number * part.num_bytes // MANY for number in range(MANY)]
    bounds = [(_line_start(part, start), _line_start(part, start + most // MANY)) for start in starts]
    return [part._replace(first=first, last=last) for first, last in bounds if first < last]


def text_lines(part: TextPart) -> Iterator[str]:
    """Lines without the spaces around them; an empty one stands for each blank line and each end of a file.

    Raises ValueError that names file and byte for what is no UTF-8.
    """
    ends = list(itertools.accumulate(part.sizes))
    for file, end, size in zip(part.files, ends, part.sizes, strict=True):
        first, last = max(part.first - (end - size), 0), min(part.last - (end - size), size)
        if first < last:
            yield from _lines(file, first, last)
            yield ""


def documents(part: TextPart, end: DocumentEnd = "blank_line") -> Iterator[list[str]]:
    """The lines of each document, which a blank line ends, or only a file."""
    if end == "file":
        for number in range(len(part.files)):
            lines = [line for line in text_lines(_only(part, number)) if line]
            if lines:
                yield lines
        return
    for filled, lines in itertools.groupby(text_lines(part), key=bool):
        if filled:
            yield list(lines)


def _only(part: TextPart, number: int) -> TextPart:
    """What the part has of one file."""
    before = sum(part.sizes[:number])
    size = part.sizes[number]
    first, last = max(part.first - before, 0), min(part.last - before, size)
    return TextPart(part.files[number : number + 1], (size,), min(first, size), max(last, 0))


def _lines(file: Path, first: int, last: int) -> Iterator[str]:
    with file.open("rb") as f:
        f.seek(first)
        while first < last and (line := f.readline()):
            try:
                yield line.decode("utf-8").removeprefix("\ufeff").strip()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{file} is no UTF-8 at byte {first + error.start} ({line[error.start]:#04x}); convert it"
                ) from error
            first += len(line)


def _line_start(part: TextPart, place: int) -> int:
    """The first byte from ``place`` on at which a line begins."""
    if place <= part.first:
        return part.first
    ends = list(itertools.accumulate(part.sizes))
    number = bisect.bisect_right(ends, place - 1)  # the file of the byte before
    start = ends[number] - part.sizes[number]
    with part.files[number].open("rb") as f:
        f.seek(place - 1 - start)
        f.readline()
        return min(start + f.tell(), part.last)
