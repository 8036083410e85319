"""Which files are the shards of a split: a folder, a pattern or a single file; the split in a folder or in the name."""

import glob
import os
import re
from pathlib import Path
from typing import NamedTuple

from eqvision.data.listing import SPLIT_NAMES, SPLITS, nearest_existing

MARK = "::"  # between shard and record in the name of an example


class Shard(NamedTuple):
    """A file as it was when it was found."""

    file: str
    size: int
    changed_ns: int


def stamp(file: Path) -> Shard:
    """The file with its size and modification time."""
    return Shard(str(file), os.stat(file).st_size, os.stat(file).st_mtime_ns)


def find_shards(path: str | os.PathLike, split: str | None, suffix: str) -> list[Path]:
    """The shards, sorted by name.

    ``path`` is a folder with ``*suffix`` files, a file, or a pattern with ``*`` or ``{000..146}``. A split is a
    sub-folder of that name, or else a word in the names (``train-000.tar``, ``set-validation-3.tar``). Raises
    FileNotFoundError where nothing is found, ValueError where the split is unknown or has to be chosen.
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}, or None")
    base = Path(path).expanduser().absolute()
    if split is not None and (base / split).is_dir():
        return _all_shards(base / split, suffix)
    shards = _all_shards(base, suffix)
    if split is not None:
        return _of_split(shards, split, base)
    present = [each for each in SPLITS if any(_names_split(shard, each) for shard in shards)]
    if len(present) > 1:
        raise ValueError(f"{base} has shards of the splits {', '.join(present)}; choose one: split={present[0]!r}")
    return shards


def shard_splits(path: str | os.PathLike, suffix: str) -> list[str]:
    """The splits for which ``find_shards`` finds something."""
    base = Path(path).expanduser().absolute()
    folders = [split for split in SPLITS if (base / split).is_dir()]
    if folders:
        return folders
    shards = _all_shards(base, suffix)
    return [split for split in SPLITS if any(_names_split(shard, split) for shard in shards)]


def _all_shards(base: Path, suffix: str) -> list[Path]:
    if base.is_dir():
        shards = sorted(file for file in base.glob(f"*{suffix}*") if _is_shard(file, suffix))
        if not shards:
            inside = sorted(os.listdir(base))
            shown = ", ".join(inside[:5]) + (f", ... ({len(inside)} entries)" if len(inside) > 5 else "") or "nothing"
            raise FileNotFoundError(f"no shards *{suffix} in {base}; it contains: {shown}")
        return shards
    return [shard for each in _expand_braces(str(base)) for shard in _matches(Path(each))]


def _is_shard(file: Path, suffix: str) -> bool:
    # TFDS and others write NAME.array_record-00000-of-00008.
    return bool(re.search(re.escape(suffix) + r"(-\d+-of-\d+)?$", file.name)) and not file.name.startswith(".")


def _matches(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = sorted(map(Path, glob.glob(str(path), recursive=True)))
    if not found:
        raise FileNotFoundError(f"no shard matches {path}; {nearest_existing(path)}")
    return found


def _expand_braces(pattern: str) -> list[str]:
    """``a-{08..11}.tar`` -> a-08.tar, a-09.tar, a-10.tar, a-11.tar."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not found:
        return [pattern]
    first, last = found.groups()
    names = [pattern[: found.start()] + str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    return [each for name in names for each in _expand_braces(name + pattern[found.end() :])]


def _of_split(shards: list[Path], split: str, base: Path) -> list[Path]:
    mine = [shard for shard in shards if _names_split(shard, split)]
    if not mine:
        names = ", ".join(shard.name for shard in shards[:3]) + (" ..." if len(shards) > 3 else "")
        raise FileNotFoundError(
            f"no shard of split {split!r} in {base}: it has {names}. Expected a sub-folder {split!r}, or "
            f"{' or '.join(map(repr, SPLIT_NAMES[split]))} as a word in the names"
        )
    return mine


def _names_split(shard: Path, split: str) -> bool:
    words = re.split("[^a-z]+", shard.name.lower())
    return any(name in words for name in SPLIT_NAMES[split])
