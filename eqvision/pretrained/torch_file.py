"""Files that ``torch.save`` wrote, and plain pickles, without torch and without running them."""

import pickle
import struct
import zipfile
from collections.abc import Callable
from functools import partial
from io import BufferedIOBase, BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from eqvision.pretrained.errors import WeightsError
from eqvision.pretrained.tree import Leaf, torch_tensors
from eqvision.pretrained.unpickle import Named, RefusedError, Storage, Unpickler

# The first pickle of a file written before PyTorch 1.6 is this number, after the pickle's protocol.
LEGACY_MAGIC = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
LEGACY_HEAD = 32  # bytes in which it lies, whatever the protocol
LEGACY_VERSION = 1001


def read_torch_zip(path: Path) -> dict[str, np.ndarray]:
    """The model in a zip archive of ``torch.save``, or the parameters and buffers of a TorchScript program in one.

    A program keeps its constants in a second pickle, and its code as text; neither is looked at.
    """
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        pickled = next(name for name in names if name.count("/") <= 1 and name.rpartition("/")[2] == "data.pkl")
        root = pickled.removesuffix("data.pkl")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise WeightsError("has big-endian numbers; save it on a little-endian machine")
        storages: dict[str, Storage] = {}
        find = partial(_stored, storages, lambda key: partial(archive.read, f"{root}data/{key}"))
        return _arrays(_load(BytesIO(archive.read(pickled)), find))


def read_pickle(path: Path) -> dict[str, np.ndarray]:
    """The model in a legacy file of ``torch.save``, which is a row of pickles and numbers, or in a plain pickle."""
    with open(path, "rb") as file:
        legacy = is_legacy(file.read(LEGACY_HEAD))
        file.seek(0)
        return _arrays(read_legacy(file) if legacy else _load(file, _no_storage))


def is_legacy(head: bytes) -> bool:
    """Whether a file that begins so is of ``torch.save`` before PyTorch 1.6."""
    return LEGACY_MAGIC in head[:LEGACY_HEAD]


def read_legacy(file: BufferedIOBase) -> Any:
    """What a legacy file holds: magic number, version, machine, the object, the storages' keys, and their numbers."""
    _load(file, _no_storage)
    version = _load(file, _no_storage)
    if version != LEGACY_VERSION:
        raise WeightsError(f"version {version} of torch.save is unknown; expected {LEGACY_VERSION}")
    _load(file, _no_storage)
    storages: dict[str, Storage] = {}
    tree = _load(file, partial(_stored, storages, lambda key: None))
    for key in _load(file, _no_storage):
        _find_numbers(file, storages[key])
    return tree


def _find_numbers(file: BufferedIOBase, storage: Storage) -> None:
    """Note where the storage's numbers are, and go on to the end of them."""
    (count,) = struct.unpack("<q", file.read(8))
    if count != storage.count:
        raise ValueError(f"a storage has {count} numbers, not {storage.count}")
    storage.fetch = partial(_read_at, file, file.tell(), count * storage.dtype.itemsize)
    file.seek(count * storage.dtype.itemsize, 1)


def _read_at(file: BufferedIOBase, start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)


def _load(file: BufferedIOBase, storage: Callable[[Any], Any]) -> Any:
    """One pickle. Raises WeightsError naming a Python object that it asks for and does not get."""
    try:
        return Unpickler(file, storage, _load_bytes).load()
    except RefusedError as error:
        raise WeightsError(
            f"its pickle asks for {error}, which is refused: a pickle may run any code, so only tensors and plain "
            "containers are read. If you trust the file, open it with the program that wrote it and save the "
            "model's state_dict"
        ) from error


def _load_bytes(data: bytes) -> Any:
    """A storage inside a plain pickle is a legacy file of its own."""
    return read_legacy(BytesIO(data))


def _no_storage(pid: Any) -> Any:
    raise pickle.UnpicklingError(f"a tensor's numbers ({str(pid)[:80]}) where there are none")


def _stored(storages: dict[str, Storage], fetch: Callable[[str], Callable[[], bytes] | None], pid: Any) -> Storage:
    """The storage that a persistent id names: ("storage", its type, key, device, count), and a view in legacy files."""
    what, kind, key, _, count, *view = pid
    if what != "storage" or not isinstance(kind, Named) or kind.dtype is None:
        raise RefusedError(f"the stored {what} {kind}")
    if key not in storages:
        storages[key] = Storage(kind.dtype, int(count), fetch(key))
    if not view or view[0] is None:
        return storages[key]
    _, offset, size = view[0]
    return Storage(kind.dtype, int(size), partial(_part, storages[key], int(offset), int(size)))


def _part(storage: Storage, offset: int, size: int) -> bytes:
    width = storage.dtype.itemsize
    return storage.read()[offset * width : (offset + size) * width]


def _arrays(tree: Any) -> dict[str, np.ndarray]:
    found = torch_tensors(tree)
    return {name: leaf.read() if isinstance(leaf, Leaf) else leaf for name, leaf in found.items()}
