"""Files from the network: fetched once, checked by digest, and kept in the cache folder."""

import hashlib
import logging
import os
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from eqvision.data.cache import cache_file, cache_folder, write_whole
from eqvision.pretrained.errors import WeightsError

log = logging.getLogger("eqvision.pretrained")

PIECE = 1 << 20  # bytes read at once
PATIENCE = 30  # seconds without a single byte
BROWSERS_ONLY = ("drive.google.com",)  # a program gets a page that asks questions


def place_of(url: str) -> Path:
    """Where the file of an https URL is kept: the cache folder's ``weights/HOST/PATH``.

    A fragment is the name that the file has there, where the address does not show it. Raises ValueError for another
    kind of URL, and for a path with ``..``.
    """
    parts = urlsplit(url)
    path = PurePosixPath(unquote(parts.path).lstrip("/"))
    path = path.with_name(parts.fragment) if parts.fragment else path
    if parts.scheme != "https" or not parts.hostname or not path.name or ".." in path.parts:
        raise ValueError(f"{url!r} is no URL of a file; expected https://HOST/PATH/FILE")
    return cache_folder() / "weights" / parts.hostname / path


def fetch(url: str, sha256: str | None = None) -> Path:
    """The file of ``url``, from the cache folder or, where it is not there yet, from the network.

    Raises FileNotFoundError naming URL and place where neither has it, WeightsError where the digest is another one.
    """
    file = place_of(url)
    if not file.exists():
        _download(url, file)
    check_digest(file, sha256, rename=True)
    return file


def absent(url: str, file: Path, cause: object) -> str:
    """What to do where a file is neither here nor to be had."""
    return f"no weights at {file}, and no download ({cause}). Download\n  {url}\nand put it at\n  {file}"


def _download(url: str, file: Path) -> None:
    """Under another name until it is whole. Raises FileNotFoundError with what to do instead."""
    from http.client import HTTPException
    from urllib.request import Request, urlopen

    if urlsplit(url).hostname in BROWSERS_ONLY:
        raise FileNotFoundError(absent(url, file, "this host gives files to browsers alone"))
    log.info("downloading %s to %s", url, file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with urlopen(Request(url, headers={"User-Agent": "eqvision"}), timeout=PATIENCE) as answer:
            length = answer.headers.get("Content-Length")
            write_whole(file, partial(_copy, answer, int(length) if length else None, file.name))
    except (OSError, HTTPException) as error:
        raise FileNotFoundError(absent(url, file, error)) from error


def _copy(answer: Any, total: int | None, name: str, out: BinaryIO) -> None:
    """With a progress bar on a terminal. Raises OSError where the answer is shorter than it said."""
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc=name, disable=None) as bar:
        while piece := answer.read(PIECE):
            out.write(piece)
            bar.update(len(piece))
    if total is not None and out.tell() != total:
        raise OSError(f"the connection ended after {out.tell()} of {total} bytes")


def check_digest(file: Path, sha256: str | None, *, rename: bool) -> None:
    """Raises WeightsError where the file's SHA-256 does not begin with ``sha256`` (hexadecimal; None: no check).

    Published are whole digests and, in torch.hub's file names, their first digits. The wrong file is kept under
    another name if ``rename``, so that the next call downloads it anew.
    """
    if sha256 is None:
        return
    found = _digest(file)
    if not found.startswith(sha256.lower()):
        what_now = _set_aside(file) if rename else "Delete it to download it again"
        raise WeightsError(
            f"{file} is not the published file: its SHA-256 is {found}, published is {sha256.lower()}. {what_now}"
        )


def _set_aside(file: Path) -> str:
    aside = file.with_name(f"{file.name}.wrong-digest")
    os.replace(file, aside)
    return f"It is kept as {aside}; the next call downloads it again"


def _digest(file: Path) -> str:
    """The SHA-256 of a file, which is read again only when its size or time has changed."""
    state = file.stat()
    note = cache_file("digests", f"{file.resolve()} {state.st_size} {state.st_mtime_ns}", ".sha256")
    if note.is_file():
        return note.read_text()
    with open(file, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        write_whole(note, lambda out: out.write(digest.encode()))
    except OSError as error:
        log.warning("the digest is computed anew at every load: %s is not writable (%s)", note.parent, error)
    return digest
