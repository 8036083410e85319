"""The list of bad images that ``eqvision data check`` writes and ``data.exclude`` reads.

Text, one line for each image: its name, a tab, the reason. Lines that begin with ``#`` say of which data set and split
the lines below them are. Tabs, line ends and backslashes in names are written as in Python.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from eqvision.data.cache import write_whole

_FIRST = "# eqvision data check 1"
_ESCAPES = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}
_UNESCAPES = {escaped: plain for plain, escaped in _ESCAPES.items()}


class BadFile(NamedTuple):
    """One image: its name as ``Source.describe`` gives it (beginning with the path of the data set), and why."""

    name: str
    reason: str


class BadFiles(NamedTuple):
    """The path that was checked, and what was bad in each split ("" where there are none)."""

    root: str
    splits: dict[str, list[BadFile]]


def write_bad_files(file: Path, root: Path, splits: Mapping[str, Sequence[BadFile]]) -> None:
    """Write the list; a split without bad images is in it too."""
    lines = [_FIRST, f"# root\t{_escape(str(root))}"]
    for split, bad in splits.items():
        lines.append(f"# split\t{split}")
        lines += [f"{_escape(each.name)}\t{' '.join(each.reason.split())}" for each in bad]
    text = "\n".join(lines) + "\n"
    write_whole(file, lambda f: f.write(text.encode("utf-8", "surrogateescape")))


def read_bad_files(file: str | os.PathLike) -> BadFiles:
    """Read the list. Raises FileNotFoundError, and ValueError for other files."""
    path = Path(file).expanduser().absolute()
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; eqvision data check PATH writes such a file (bad_files.txt)")
    lines = path.read_bytes().decode("utf-8", "surrogateescape").split("\n")
    if lines[0] != _FIRST or not lines[1].startswith("# root\t"):
        raise ValueError(f"{path} begins with {lines[0][:40]!r}; expected bad_files.txt of eqvision data check PATH")
    splits: dict[str, list[BadFile]] = {}
    current = ""
    for line in lines[2:]:
        if line.startswith("# split\t"):
            current = line.split("\t")[1]
            splits.setdefault(current, [])
        elif line and not line.startswith("#"):
            name, _, reason = line.partition("\t")
            splits.setdefault(current, []).append(BadFile(_unescape(name), reason))
    return BadFiles(_unescape(lines[1].split("\t")[1]), splits)


def _escape(name: str) -> str:
    return "".join(_ESCAPES.get(character, character) for character in name)


def _unescape(text: str) -> str:
    return re.sub(r"\\.", lambda found: _UNESCAPES.get(found.group(), found.group()), text)
