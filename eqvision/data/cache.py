"""Files kept between runs, such as listings and indices: where they lie, and how they are written whole."""

import contextlib
import functools
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger(__name__)

# A file or folder changed again within its time stamp's resolution would look unchanged (FAT has 2 s, some network
# file systems 1 s), so what is known of one this young is not stored.
_SETTLED_NS = 3_000_000_000


def cache_folder() -> Path:
    """Where listings are kept: ``$EQVISION_CACHE``, else ``$XDG_CACHE_HOME/eqvision``, else ``~/.cache/eqvision``."""
    if "EQVISION_CACHE" in os.environ:
        return Path(os.environ["EQVISION_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "eqvision"


def cache_file(room: str, subject: str, suffix: str) -> Path:
    """The file in which ``room`` keeps what it knows of ``subject`` (a resolved path, with what else identifies it)."""
    return cache_folder() / room / (hashlib.sha256(os.fsencode(subject)).hexdigest()[:32] + suffix)


def settled(times_ns: Iterable[int]) -> bool:
    """Whether all of these modification times are old enough to be trusted."""
    return time.time_ns() - max(times_ns) > _SETTLED_NS


def store(file: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file of the cache in one step; where that is not possible, warn once and go on without it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, write)
    except OSError as error:
        _warn_unwritable(str(file.parent), str(error))


def write_whole(file: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write beside ``file`` and rename: two processes may write at once, and a killed one leaves no half."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with open(unfinished, "wb") as f:
            write(f)
        os.replace(unfinished, file)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(unfinished)
        raise


@functools.cache
def _warn_unwritable(folder: str, error: str) -> None:
    log.warning("folder listings are not kept, every start reads them anew: %s is not writable (%s). "
                "Set EQVISION_CACHE to a writable folder", folder, error)  # fmt: skip
