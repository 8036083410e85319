"""Where weights lie: a file, a folder, or a place to download from."""

from pathlib import Path
from typing import NamedTuple


class Location(NamedTuple):
    """``path`` is a file or a folder that exists."""

    path: Path


def locate(name: str, source: str | Path | None) -> Location:
    """The file or folder of ``source``. Raises FileNotFoundError where there is none."""
    if source is None:
        raise FileNotFoundError(f"no published location is known for {name}; give a file or a folder")
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path.absolute()}")
    return Location(path)
