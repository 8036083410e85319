"""numpy's ``.npz``, as google-research, BiT, Mixer and big_vision publish weights."""

import zipfile
from functools import partial
from io import BytesIO
from pathlib import Path

import ml_dtypes
import numpy as np

from eqvision.pretrained.errors import WeightsError
from eqvision.pretrained.tree import Leaf, flax_tensors, without_prefix


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The parameters by the file's names, without ``params/`` (``flax_tensors``). Other entries are not read.

    Two bytes per number without a type are bfloat16, as big_vision writes it. Raises WeightsError for arrays of
    Python objects.
    """
    with zipfile.ZipFile(path) as archive:
        members = [name for name in archive.namelist() if name.endswith(".npy")]
        leaves = {name.removesuffix(".npy"): Leaf(partial(_array, archive, name)) for name in members}
        return {name: leaf.read() for name, leaf in without_prefix(flax_tensors(leaves)).items()}


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """A view of the member's bytes; numpy's own reader would copy them in small pieces."""
    data = archive.read(name)
    opened = BytesIO(data)
    version = np.lib.format.read_magic(opened)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(opened)
    if dtype.hasobject:
        raise WeightsError(f"{name} holds Python objects, which are refused: reading them may run code")
    if dtype.kind == "V" and (dtype.itemsize != 2 or dtype.fields is not None):
        raise WeightsError(f"{name} is of type {dtype}, which is no number")
    dtype = np.dtype(ml_dtypes.bfloat16) if dtype.kind == "V" else dtype
    array = np.frombuffer(data, dtype, count=int(np.prod(shape, dtype=np.int64)), offset=opened.tell())
    return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)
