"""Files of ``flax.serialization``: nested dictionaries of arrays in msgpack, as in ``flax_model.msgpack``."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from eqvision.pretrained.errors import WeightsError
from eqvision.pretrained.tree import flatten, flax_tensors

# Flax's extension types, from flax/serialization.py
ARRAY, COMPLEX, SCALAR = 1, 2, 3
HEADER = 512  # bytes that certainly hold shape and type
LENGTH_BYTES = {0xC4: 1, 0xC5: 2, 0xC6: 4}  # after which byte a row of bytes has a length of how many bytes
CHUNKED = "__msgpack_chunked_array__"


def read_msgpack(path: Path) -> dict[str, np.ndarray]:
    """The parameters by names joined with ``/``; of a training state, without the optimizer (``flax_tensors``)."""
    import msgpack

    tree = msgpack.unpackb(path.read_bytes(), ext_hook=_extension, raw=False, strict_map_key=False)
    return flax_tensors(flatten(_joined(tree), "/"))


def _extension(code: int, data: bytes) -> Any:
    """An array, as a view of ``data``. Complex numbers are no weights."""
    if code == COMPLEX:
        return None
    if code not in (ARRAY, SCALAR):
        raise WeightsError(f"extension type {code} of msgpack is none of flax's (1, 2, 3)")
    shape, name, start = _header(data)
    return np.frombuffer(data, _dtype(name), offset=start).reshape(shape)


def _header(data: bytes) -> tuple[tuple[int, ...], str, int]:
    """Shape, type, and where the numbers begin: (shape, type, numbers in C order), in msgpack once more.

    The numbers are not unpacked, which would copy them. Raises ValueError where they are more or fewer than said.
    """
    import msgpack

    unpacker = msgpack.Unpacker(raw=True)
    unpacker.feed(data[:HEADER])
    unpacker.read_array_header()
    shape, name, place = tuple(unpacker.unpack()), unpacker.unpack().decode(), unpacker.tell()
    start = place + 1 + LENGTH_BYTES[data[place]]
    size = int.from_bytes(data[place + 1 : start], "big")
    if size != len(data) - start:
        raise ValueError(f"an array {shape} of {size} bytes has {len(data) - start}")
    return shape, name, start


def _dtype(name: str) -> np.dtype:
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    if dtype.kind not in "biufc" and not hasattr(ml_dtypes, name):
        raise WeightsError(f"an array of type {name}")
    return dtype


def _joined(tree: Any) -> Any:
    """Flax writes arrays over a gibibyte as pieces of the flattened array."""
    if not isinstance(tree, dict):
        return tree
    if CHUNKED not in tree:
        return {name: _joined(value) for name, value in tree.items()}
    pieces = [tree["chunks"][str(number)] for number in range(len(tree["chunks"]))]
    shape = tuple(tree["shape"][str(axis)] for axis in range(len(tree["shape"])))
    return np.concatenate(pieces).reshape(shape)
