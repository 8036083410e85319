"""A pickle read without running it: tensors are built, harmless containers become inert, and all else is refused.

A pickle is a program that may call any function that Python can import. Here it gets the stand-ins of this file for
the few names that weight files need, and an error for every other name. None of them is the real thing: numpy's own
``dtype`` and ``ndarray``, for one, believe a pickle's description of memory.
"""

import pickle
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from io import BufferedIOBase
from typing import Any, NamedTuple, NoReturn

import ml_dtypes
import numpy as np

from eqvision.pretrained.tree import Leaf, Pending

SCRIPTED = "__torch__"  # where TorchScript keeps its classes; no such module can be imported


class RefusedError(pickle.UnpicklingError):
    """The pickle asks for a Python object that is not in the table."""


class Named(NamedTuple):
    """A function or type that a pickle may name, as something that it cannot change: a tuple."""

    name: str
    call: Callable[..., Any] | None = None
    dtype: np.dtype | None = None

    def __call__(self, *args: Any) -> Any:
        if self.call is None:
            raise RefusedError(f"a call of {self.name}")
        return self.call(*args)


class Inert(dict):
    """What becomes of an argparse.Namespace and its like: its arguments and attributes are dropped."""

    def __new__(cls, *args: Any) -> "Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any):
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        """Pickles of lists call it."""

    def extend(self, items: Any) -> None:
        """Pickles of lists call it."""

    add = append


class Attributes(dict):
    """A module of a TorchScript program: what it has by name, tensors and further modules."""

    def __new__(cls) -> "Attributes":
        return super().__new__(cls)

    def __init__(self):
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError(f"a module with a {type(state).__name__} for its attributes")
        self.update(state)


class Storage:
    """Numbers of one type in one row. ``fetch`` reads its bytes from the file, on first use."""

    __slots__ = ("_bytes", "count", "dtype", "fetch")

    def __init__(self, dtype: np.dtype, count: int, fetch: Callable[[], bytes] | None = None):
        self.dtype, self.count, self.fetch = dtype, count, fetch
        self._bytes: bytes | None = None

    def __setstate__(self, state: Any) -> NoReturn:
        raise pickle.UnpicklingError("a storage has no state")

    def read(self) -> bytes:
        """The bytes of the file. Raises ValueError where they are fewer than the pickle said."""
        if self._bytes is None:
            self._bytes = b"" if self.fetch is None else self.fetch()
        if len(self._bytes) < self.count * self.dtype.itemsize:
            raise ValueError(f"a storage has {len(self._bytes)} bytes, not {self.count * self.dtype.itemsize}")
        return self._bytes


class Unpickler(pickle.Unpickler):
    """Reads one pickle of ``file``. ``storage`` finds what the pickle calls a persistent id."""

    def __init__(self, file: BufferedIOBase, storage: Callable[[Any], Any], load_bytes: Callable[[bytes], Any]):
        # Pickles of Python 2 hold bytes as text; Latin-1 gives each its own value back, and ASCII names are equal.
        super().__init__(file, encoding="latin1")
        self._storage = storage
        self._table = {**TABLE, ("torch.storage", "_load_from_bytes"): Named("_load_from_bytes", load_bytes)}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in INERT:
            return type(name, (Inert,), {})  # a new one each time: a pickle can give a class attributes
        if module.split(".")[0] == SCRIPTED:
            return type(name, (Attributes,), {})
        if (module, name) not in self._table:
            raise RefusedError(f"{module}.{name}")
        return self._table[module, name]

    def persistent_load(self, pid: Any) -> Any:
        return self._storage(pid)


def _tensor(storage: Any, offset: int, shape: Any, stride: Any, dtype: np.dtype | None = None) -> Leaf:
    if not isinstance(storage, Storage):
        raise pickle.UnpicklingError(f"a tensor in a {type(storage).__name__}")
    shape, stride = tuple(map(int, shape)), tuple(map(int, stride))
    return Leaf(partial(_strided, storage, dtype or storage.dtype, int(offset), shape, stride), scalar=not shape)


def _strided(
    storage: Storage, dtype: np.dtype, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]
) -> np.ndarray:
    """A view of the storage; strides and offset count numbers, not bytes. Raises ValueError beyond its ends."""
    data, width = storage.read(), dtype.itemsize
    count = len(data) // width
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if min((offset, *shape, *stride)) < 0 or (0 not in shape and last >= count):
        raise ValueError(f"a tensor {shape} with strides {stride} at {offset}, in a storage of {count}")
    if 0 in shape:
        return np.zeros(shape, dtype)
    return np.ndarray(shape, dtype, data, offset * width, tuple(step * width for step in stride))


def _tensor_v2(
    storage: Any, offset: int, shape: Any, stride: Any, grad: Any = None, hooks: Any = None, metadata: Any = None
) -> Leaf:
    if metadata:
        raise pickle.UnpicklingError(f"a tensor that is conjugated or negated ({metadata})")
    return _tensor(storage, offset, shape, stride)


def _tensor_v3(
    storage: Any, offset: int, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> Leaf:
    if metadata or not isinstance(dtype, Named) or dtype.dtype is None:
        raise pickle.UnpicklingError(f"a tensor of type {dtype} with {metadata}")
    return _tensor(storage, offset, shape, stride, dtype.dtype)


def _parameter(tensor: Any, *rest: Any) -> Any:
    return tensor


def _subclass(function: Any, kind: Any, args: Any, state: Any) -> Any:
    if not isinstance(function, Named):
        raise pickle.UnpicklingError("a tensor without a function that makes it")
    return function(*args)


def _reconstructor(kind: Any, base: Any, state: Any) -> Any:
    if not (isinstance(kind, type) and issubclass(kind, Inert)):
        raise RefusedError(f"an object of {kind}")
    return kind()


def _encode(text: Any, codec: Any = "latin1") -> bytes:
    """How pickles of protocol 2 hold bytes. Other codecs could unpack anything."""
    if codec not in ("latin1", "latin-1"):
        raise RefusedError(f"_codecs.encode to {codec}")
    return text.encode("latin1")


class ArrayType:
    """A numpy dtype's stand-in. ``dtype`` is None for anything but numbers."""

    __slots__ = ("dtype",)

    def __init__(self, code: Any, *rest: Any):
        if isinstance(code, Named):
            self.dtype = code.dtype
            return
        dtype = np.dtype(str(code))
        self.dtype = dtype if dtype.kind in "biufc" and dtype.fields is None else None

    def __setstate__(self, state: Any) -> None:
        """(version, byte order, ...); of the rest, plain numbers have nothing."""
        if self.dtype is not None and self.dtype.kind in "biufc" and state[1] in (">", "<"):
            self.dtype = self.dtype.newbyteorder(state[1])


class ArrayBuilder(Pending):
    """A numpy array's stand-in, which has no numbers before the pickle has told its state."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, data = state
        self.array = _array(data, kind, shape, "F" if fortran else "C")


def _array(data: Any, kind: Any, shape: Any, order: str = "C") -> Any:
    """Raises ValueError where data and shape do not agree; arrays of anything but numbers are dropped."""
    if not isinstance(kind, ArrayType):
        raise pickle.UnpicklingError(f"an array of type {type(kind).__name__}")
    if kind.dtype is None:
        return None
    data = data.encode("latin1") if isinstance(data, str) else data
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    array = np.frombuffer(data, kind.dtype) if len(data) else np.zeros(0, kind.dtype)
    array = array.reshape(shape[::-1]).T if order == "F" else array.reshape(shape)
    return array.astype(array.dtype.newbyteorder("="), copy=False) if kind.dtype.kind in "iufc" else array


def _builder(kind: Any, *rest: Any) -> ArrayBuilder:
    if kind is not TABLE["numpy", "ndarray"]:
        raise RefusedError(f"an array of class {kind}")
    return ArrayBuilder()


def _scalar(kind: Any, data: Any = b"") -> Any:
    array = _array(data, kind, ())
    return None if array is None else array[()]


_TORCH_TYPES = {
    "float64": (np.float64, "Double"),
    "float32": (np.float32, "Float"),
    "float16": (np.float16, "Half"),
    "bfloat16": (ml_dtypes.bfloat16, "BFloat16"),
    "int64": (np.int64, "Long"),
    "int32": (np.int32, "Int"),
    "int16": (np.int16, "Short"),
    "int8": (np.int8, "Char"),
    "uint8": (np.uint8, "Byte"),
    "bool": (np.bool_, "Bool"),
    "complex64": (np.complex64, "ComplexFloat"),
    "complex128": (np.complex128, "ComplexDouble"),
    "uint16": (np.uint16, None),
    "uint32": (np.uint32, None),
    "uint64": (np.uint64, None),
    "float8_e4m3fn": (ml_dtypes.float8_e4m3fn, None),
    "float8_e5m2": (ml_dtypes.float8_e5m2, None),
}


def _torch_types() -> dict[tuple[str, str], Named]:
    table = {}
    for name, (dtype, storage) in _TORCH_TYPES.items():
        table["torch", name] = Named(f"torch.{name}", dtype=np.dtype(dtype))
        for module in ("torch", "torch.cuda") if storage else ():
            table[module, f"{storage}Storage"] = Named(f"{module}.{storage}Storage", dtype=np.dtype(dtype))
    table["torch.storage", "UntypedStorage"] = Named("torch.storage.UntypedStorage", dtype=np.dtype(np.uint8))
    return table


def _numpy_functions() -> dict[tuple[str, str], Any]:
    table: dict[tuple[str, str], Any] = {
        ("numpy", "dtype"): Named("numpy.dtype", ArrayType),
        ("numpy", "ndarray"): Named("numpy.ndarray"),
        ("ml_dtypes", "bfloat16"): Named("ml_dtypes.bfloat16", dtype=np.dtype(ml_dtypes.bfloat16)),
    }
    for core in ("numpy.core", "numpy._core"):
        table[f"{core}.multiarray", "_reconstruct"] = Named("numpy._reconstruct", _builder)
        table[f"{core}.multiarray", "scalar"] = Named("numpy.scalar", _scalar)
        table[f"{core}.numeric", "_frombuffer"] = Named("numpy._frombuffer", _array)
    return table


TABLE: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor"): Named("torch._utils._rebuild_tensor", _tensor),
    ("torch._utils", "_rebuild_tensor_v2"): Named("torch._utils._rebuild_tensor_v2", _tensor_v2),
    ("torch._utils", "_rebuild_tensor_v3"): Named("torch._utils._rebuild_tensor_v3", _tensor_v3),
    ("torch._utils", "_rebuild_parameter"): Named("torch._utils._rebuild_parameter", _parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): Named("torch._utils._rebuild_parameter_with_state", _parameter),
    ("torch._tensor", "_rebuild_from_type_v2"): Named("torch._tensor._rebuild_from_type_v2", _subclass),
    ("torch.nn.parameter", "Parameter"): Named("torch.nn.Parameter", _parameter),
    ("torch", "Size"): Named("torch.Size", tuple),
    ("_codecs", "encode"): Named("_codecs.encode", _encode),
    ("copy_reg", "_reconstructor"): Named("copyreg._reconstructor", _reconstructor),
    ("copyreg", "_reconstructor"): Named("copyreg._reconstructor", _reconstructor),
    **_torch_types(),
    **_numpy_functions(),
}
"""What a pickle's names become. Whatever is neither here nor in INERT is refused."""

INERT = {
    *((module, name) for module in ("__builtin__", "builtins") for name in (
        "object", "set", "frozenset", "bytearray", "complex", "slice", "list", "dict", "tuple", "int", "float", "str",
        "bool", "bytes", "range", "xrange", "unicode", "long")),
    *(("pathlib", name) for name in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath",
                                     "PureWindowsPath")),
    *(("pathlib._local", name) for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
    ("argparse", "Namespace"), ("types", "SimpleNamespace"), ("collections", "defaultdict"),
    ("collections", "Counter"), ("collections", "deque"), ("datetime", "datetime"), ("datetime", "timedelta"),
    ("torch", "device"), ("yacs.config", "CfgNode"), ("fvcore.common.config", "CfgNode"),
    ("detectron2.config.config", "CfgNode"), ("easydict", "EasyDict"), ("addict.addict", "Dict"),
    ("mmcv.utils.config", "ConfigDict"), ("mmengine.config.config", "ConfigDict"),
}  # fmt: skip
"""Classes that published files have beside their tensors, in what they say of the program's arguments."""
