"""How exported files come to be: never over another by accident, and whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def refuse_existing(*files: Path, force: bool) -> None:
    """Raise FileExistsError for a folder, and unless ``force`` for a file that is there."""
    for file in files:
        if file.is_dir():
            raise FileExistsError(f"{file} is a folder; name a file")
        if file.exists() and not force:
            raise FileExistsError(f"{file} exists; nothing was written. Choose another --out, or --force to replace it")


def write_whole(file: Path, write: Callable[[Path], Any]) -> None:
    """To a temporary file beside it, which then takes its name: readers see the old file or the whole new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors gives its files to their owner alone
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
