"""Weight files of all formats -> tensors by name."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from eqvision.pretrained.errors import WeightsError, listed
from eqvision.pretrained.msgpack_file import read_msgpack
from eqvision.pretrained.npz_file import read_npz
from eqvision.pretrained.orbax_folder import orbax_folder, read_orbax
from eqvision.pretrained.torch_file import is_legacy, read_pickle, read_torch_zip
from eqvision.pretrained.tree import without_prefix

FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "flax_model.msgpack",
)
"""The weight files of a folder in Hugging Face's layout; the first that is there is read."""

Reader = Callable[[Path], dict[str, np.ndarray]]

HEAD = 64  # bytes that show a file's format
LONGEST_HEADER = 100_000_000  # bytes, as the safetensors format allows


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a file, of the files that an ``.index.json`` lists, or of a folder: the weight file in it, or an
    orbax checkpoint.

    ``.safetensors``, ``.npz``, ``.pth``/``.pt``/``.th``/``.bin``/``.pkl`` (PyTorch, and plain pickles) and
    ``.msgpack`` (Flax); the content decides, and the suffix only where the content does not tell. Names are the
    file's: dotted from PyTorch, joined with ``/`` from Flax. A model that lies in a dictionary with other things is
    taken out (``tree.torch_tensors``, ``tree.flax_tensors``), and ``module.`` before all names is removed. Types
    are the file's too, bfloat16 by ml_dtypes. The arrays may be read-only.

    Raises WeightsError naming file and cause for a file that is broken or of no known format, or that asks to run
    code; FileNotFoundError where there is none.
    """
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path.absolute()}")
    if path.is_dir():
        return _read_folder(path)
    if path.name.endswith(".index.json"):
        return _read_sharded(path)
    return _read(path, *_format(path))


def _read(path: Path, name: str, read: Reader) -> dict[str, np.ndarray]:
    """What ``read`` gives, with errors that name the file."""
    try:
        return read(path)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    except Exception as error:  # what a damaged file makes these readers raise can be nearly anything
        raise _damaged(path, name, error) from error


def _damaged(path: Path, name: str, error: Exception) -> WeightsError:
    cause = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return WeightsError(
        f"{path} is truncated or damaged ({_size(path)}read as {name}; {cause}). "
        "Get it again, or compare its size and digest with the published ones"
    )


def _size(path: Path) -> str:
    return f"{path.stat().st_size} bytes, " if path.is_file() else ""


def read_config(path: Path) -> dict[str, Any] | None:
    """``config.json`` beside the file or in the folder; None where there is none. Raises WeightsError if broken."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise WeightsError(f"{file} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{file} is no dictionary, but {str(config)[:80]}")
    return config


def _read_folder(folder: Path) -> dict[str, np.ndarray]:
    for name in FOLDER_FILES:
        if (folder / name).is_file():
            return read_tensors(folder / name)
    orbax = orbax_folder(folder)
    if orbax is not None:
        return _read(orbax, "a checkpoint of orbax", read_orbax)
    here = sorted(f"{path.name}{'/' if path.is_dir() else ''}" for path in folder.iterdir())
    raise WeightsError(
        f"the folder {folder} has none of {', '.join(FOLDER_FILES)}, and is no checkpoint of orbax; give the weight "
        f"file itself. It has {len(here)} entries:{listed(here, 10)}"
    )


def _read_sharded(index: Path) -> dict[str, np.ndarray]:
    """All shards that an index names. Raises WeightsError for a missing shard, and for a tensor not in its shard."""
    places = _weight_map(index)
    shards = sorted(set(places.values()))
    missing = [name for name in shards if not (index.parent / name).is_file()]
    if missing:
        raise WeightsError(f"{index} names {len(shards)} files, of which {len(missing)} are missing:{listed(missing)}")
    found = {shard: read_tensors(index.parent / shard) for shard in shards}
    absent = [f"{name} in {shard}" for name, shard in places.items() if name not in found[shard]]
    if absent:
        raise WeightsError(f"{index} names {len(absent)} tensors that are not in their files:{listed(absent)}")
    return without_prefix({name: found[shard][name] for name, shard in places.items()})


def _weight_map(index: Path) -> dict[str, str]:
    """Which file has which tensor."""
    try:
        places = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{index} is no index of weight files: {type(error).__name__}: {error}") from error
    outside = [str(name) for name in places.values() if not isinstance(name, str) or Path(name).name != name]
    if outside or not places:
        raise WeightsError(f"{index} is no index of weight files: its weight_map has{listed(outside) or ' no entries'}")
    return places


def shard_names(index: Path) -> list[str]:
    """The files beside ``index`` that it names. Raises WeightsError where it is no index."""
    return sorted(set(_weight_map(index).values()))


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    import ml_dtypes  # noqa: F401  safetensors finds numpy's bfloat16 through it
    from safetensors.numpy import load_file

    tensors = load_file(path)
    if not tensors:
        raise WeightsError("holds no tensors")
    return without_prefix(tensors)


SAFETENSORS = ("safetensors", _read_safetensors)
NPZ = ("npz", read_npz)
TORCH = ("a zip archive of torch.save", read_torch_zip)
PICKLE = ("a pickle", read_pickle)
MSGPACK = ("flax msgpack", read_msgpack)
FORMATS = "safetensors, npz, PyTorch (pth, pt, th, bin), pickle (pkl), flax msgpack"

# Pickles of the oldest protocols begin with any letter, and small msgpack files with nearly any byte.
BY_SUFFIX: dict[str, tuple[str, Reader]] = {".pkl": PICKLE, ".pickle": PICKLE, ".msgpack": MSGPACK}


def _format(path: Path) -> tuple[str, Reader]:
    """What a file is and how to read it, by its first bytes. Raises WeightsError where neither they nor its suffix
    tell."""
    with open(path, "rb") as file:
        head = file.read(HEAD)
    if not head:
        raise WeightsError(f"{path} is empty")
    if head.startswith(b"PK\x03\x04"):
        return _zip_format(path)
    if is_legacy(head) or (head[0] == 0x80 and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        return PICKLE
    header = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header <= LONGEST_HEADER:
        return SAFETENSORS
    stranger = _stranger(head)
    if stranger is None and path.suffix in BY_SUFFIX:
        return BY_SUFFIX[path.suffix]
    if 0x81 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF):  # a msgpack map, as Scenic's checkpoint_100 without suffix
        return MSGPACK
    unknown = f"no weight file, or a damaged one: it begins with {head[:12]!r}, as no known format does"
    raise WeightsError(f"{path} is {stranger or unknown}. Known formats are {FORMATS}")


def _zip_format(path: Path) -> tuple[str, Reader]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception as error:  # BadZipFile, and whatever else its damaged directory makes zipfile raise
        raise _damaged(path, "a zip archive", error) from error
    if any(name.count("/") <= 1 and name.rpartition("/")[2] == "data.pkl" for name in names):
        return TORCH
    if any(name.endswith(".npy") for name in names):
        return NPZ
    raise WeightsError(f"{path} is a zip archive without weights; it has:{listed(names)}")


def _stranger(head: bytes) -> str | None:
    """What often lies where weights should."""
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself (git lfs pull gets it)"
    if head.lstrip()[:9].lower() in (b"<!doctype", b"<html", b"<html lan") or head.lstrip().startswith(b"<html"):
        return "a web page, not weights (the download went wrong)"
    if head.startswith(b"\x1f\x8b"):
        return "compressed by gzip; unpack it first"
    return None
