"""Where the images of tar shards begin, and their labels: found once, kept in the cache, then no archive is scanned."""

import json
import logging
import os
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
from jaxtyping import Int

from eqvision.data.cache import cache_file, settled, store
from eqvision.data.decode import IMAGE_EXTENSIONS
from eqvision.data.packed import PackedStrings, pack_strings
from eqvision.data.shards import Shard

log = logging.getLogger(__name__)

_VERSION = 1
_BLOCK = tarfile.BLOCKSIZE


class TarIndex(NamedTuple):
    """Images in order of shard and offset. ``label_values[label_codes[i]]`` is the label of image i as text."""

    names: PackedStrings
    shards: Int[np.ndarray, " n"]
    offsets: Int[np.ndarray, " n"]
    sizes: Int[np.ndarray, " n"]
    label_codes: Int[np.ndarray, " n"]
    label_values: tuple[str, ...]
    label_kind: str
    """Where the labels come from: "cls", "json" or "folder"."""


class _Member(NamedTuple):
    name: str
    offset: int
    size: int
    label: str
    kind: str


def index_of_shards(shards: Sequence[Shard]) -> TarIndex:
    """The index: from the cache where no shard has changed (size and modification time), else by reading headers.

    Raises ValueError naming the shard and its last good member where an archive is cut short, damaged or compressed,
    and for images without a label.
    """
    file = cache_file("tar", "\n".join(os.path.realpath(shard.file) for shard in shards), ".npz")
    stored = _read(file, shards)
    if stored is not None:
        return stored
    index = _build([Path(shard.file) for shard in shards])
    if settled(shard.changed_ns for shard in shards):
        _write(file, shards, index)
    return index


# Reading the archives


def _build(shards: list[Path]) -> TarIndex:
    from tqdm import tqdm

    with ThreadPoolExecutor(8) as pool:  # the headers lie far apart: mostly waiting for the disk
        scanned = pool.map(_members_of_shard, shards)
        bar = tqdm(scanned, "indexing tar shards", total=len(shards), unit="shard", delay=2, dynamic_ncols=True)
        members = list(bar)
    numbers = np.repeat(np.arange(len(shards), dtype=np.int32), [len(each) for each in members])
    flat = [member for each in members for member in each]
    kind = _only_kind(flat, numbers, shards)
    values, codes = np.unique(np.array([member.label for member in flat], object), return_inverse=True)
    return TarIndex(
        pack_strings(member.name for member in flat),
        numbers,
        np.array([member.offset for member in flat], np.int64),
        np.array([member.size for member in flat], np.int64),
        codes.astype(np.int32),
        tuple(values),
        kind,
    )


def _only_kind(members: list[_Member], numbers: np.ndarray, shards: list[Path]) -> str:
    first: dict[str, str] = {}
    for member, number in zip(members, numbers, strict=True):
        first.setdefault(member.kind, f"{shards[number]}::{member.name}")
    if not first:
        raise ValueError(f"no images in {shards[0]}{f' and {len(shards) - 1} more shards' if len(shards) > 1 else ''}")
    if len(first) > 1:
        examples = "; ".join(f"{name} has its label from {_KINDS[kind]}" for kind, name in first.items())
        raise ValueError(f"labels come from different places: {examples}. Label all images in the same way")
    return next(iter(first))


_KINDS = {"cls": "a .cls file", "json": "a .json file", "folder": "its folder"}


def _members_of_shard(shard: Path) -> list[_Member]:
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, tuple[str, str]] = {}
    with open(shard, "rb") as raw:
        for info, archive in _files(shard, raw):
            key, extension = os.path.splitext(info.name)
            if extension.lower() in IMAGE_EXTENSIONS:
                if key in images:
                    raise ValueError(f"{shard} has two images {images[key].name} and {info.name}; keep one of them")
                images[key] = info
            elif extension.lower() == ".cls" or (extension.lower() == ".json" and key not in labels):
                content = archive.extractfile(info)
                assert content is not None  # it is a regular file
                labels[key] = (extension.lower()[1:], content.read().decode(errors="replace"))
    wanted = {key: info for key, info in images.items() if not _is_part(key, images)}
    return [_labelled(shard, key, info, labels.get(key)) for key, info in wanted.items()]


def _is_part(key: str, images: dict[str, tarfile.TarInfo]) -> bool:
    """Whether ``7.mask`` (of ``7.mask.png``) only accompanies an image ``7``, as in sets with several pictures each."""
    folder, name = os.path.split(key)
    words = name.split(".")
    return any(os.path.join(folder, ".".join(words[:count])) in images for count in range(1, len(words)))


def _labelled(shard: Path, key: str, info: tarfile.TarInfo, label: tuple[str, str] | None) -> _Member:
    if label is None:
        folder = os.path.basename(os.path.dirname(info.name))
        if folder in ("", "."):
            raise ValueError(
                f'{shard}::{info.name} has no label; expected {key}.cls, {key}.json with a "label", or a class '
                "folder around it"
            )
        return _Member(info.name, info.offset_data, info.size, folder, "folder")
    kind, text = label
    value = text.strip() if kind == "cls" else _json_label(shard, key, text)
    if not value:
        raise ValueError(f"{shard}::{key}.{kind} is empty; expected a class number or name")
    return _Member(info.name, info.offset_data, info.size, value, kind)


def _json_label(shard: Path, key: str, text: str) -> str:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{shard}::{key}.json is no JSON: {error}") from error
    if not isinstance(content, dict) or "label" not in content:
        what = f"the keys {', '.join(sorted(content))}" if isinstance(content, dict) else type(content).__name__
        raise ValueError(f'{shard}::{key}.json has {what}; expected "label"')
    if not isinstance(content["label"], int | str) or isinstance(content["label"], bool):
        raise ValueError(f'{shard}::{key}.json has "label": {content["label"]!r}; expected a class number or name')
    return str(content["label"])


def _files(shard: Path, raw: BinaryIO) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """Regular files of an archive, each of them whole; afterwards the archive has been checked to its end."""
    size, last = os.stat(shard).st_size, None
    try:
        with tarfile.open(fileobj=raw, mode="r:") as archive:
            for info in archive:
                if info.isreg() and info.offset_data + info.size > size:
                    raise tarfile.ReadError(f"{info.name} needs {info.offset_data + info.size} bytes")
                if info.isreg() and not info.issparse() and not os.path.basename(info.name).startswith("."):
                    yield info, archive
                last = info.name
                cast(Any, archive).members.clear()  # tarfile would keep every header
            _check_end(raw, archive.offset, size)
    except tarfile.TarError as error:
        raise ValueError(_damaged(shard, size, last, error)) from error


def _check_end(raw: BinaryIO, offset: int, size: int) -> None:
    """tarfile takes any unreadable header, and the end of the file, for the end of the archive."""
    raw.seek(offset)
    block = raw.read(_BLOCK)
    if len(block) < _BLOCK:
        raise tarfile.ReadError(f"there is no end mark at byte {offset}")
    if block.strip(b"\0"):
        raise tarfile.ReadError(f"the header at byte {offset} is damaged")
    while block := raw.read(1 << 20):
        if block.strip(b"\0"):
            raise tarfile.ReadError(
                f"behind the end mark at byte {offset} are {size - offset} more bytes, which readers of tar ignore "
                "(archives joined by cat? join them with tar --concatenate)"
            )


def _damaged(shard: Path, size: int, last: str | None, error: Exception) -> str:
    with open(shard, "rb") as raw:
        magic = raw.read(6)
    kinds = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"(\xb5/\xfd": "zstandard", b"PK": "zip"}
    for start, kind in kinds.items():
        if magic.startswith(start):
            return f"{shard} is compressed ({kind}): images in it cannot be found at random. Store a plain .tar"
    good = f"the last good member is {last}" if last else "it has no good member"
    return f"tar shard {shard} ({size} bytes) is truncated or damaged: {good}; then: {error}. Copy or write it again"


# The cache: one .npz for each set of shards, valid while no shard's size or modification time has changed


def _read(file: Path, shards: Sequence[Shard]) -> TarIndex | None:
    try:
        with np.load(file, allow_pickle=False) as stored:
            about = json.loads(stored["about"].tobytes())
            if about["version"] != _VERSION or about["shards"] != [list(shard) for shard in shards]:
                return None
            names = PackedStrings(stored["characters"], stored["ends"])
            return TarIndex(
                names,
                stored["shards"],
                stored["offsets"],
                stored["sizes"],
                stored["label_codes"],
                tuple(about["label_values"]),
                about["label_kind"],
            )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        log.warning("ignored the unreadable index %s (%s); reading the shards again", file, error)
        return None


def _write(file: Path, shards: Sequence[Shard], index: TarIndex) -> None:
    about = {
        "version": _VERSION,
        "shards": shards,
        "label_values": index.label_values,
        "label_kind": index.label_kind,
    }
    arrays = {
        "about": np.frombuffer(json.dumps(about).encode(), np.uint8),
        "characters": index.names.characters,
        "ends": index.names.ends,
        "shards": index.shards,
        "offsets": index.offsets,
        "sizes": index.sizes,
        "label_codes": index.label_codes,
    }
    store(file, lambda f: np.savez(f, **arrays))
