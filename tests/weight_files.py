"""Weight files as other libraries write them, by hand, and the comparison of what is read from them."""

import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np

BF16 = np.dtype(ml_dtypes.bfloat16)

# What the tests store
ROW = np.arange(12, dtype=np.float32)
W = np.ones(2, np.float32)


def same(found, expected):
    """Names, their order, types and numbers."""
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert isinstance(found[name], np.ndarray), name
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def text(value):
    """Opcodes of a pickle of protocol 2 for a string."""
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def numbers(values):
    """Opcodes for a tuple of whole numbers."""
    return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"


def torch_tensor(key, count, shape, stride, offset=0, view=None, kind="FloatStorage"):
    """What ``torch.save`` writes for a tensor in the storage ``key``, which has ``count`` numbers."""
    legacy = b"" if view is None else view
    storage = (
        b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cuda:0") + numbers([count])[1:-1]
    )
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + legacy + b"tQ" + numbers([offset])[1:-1]
        + numbers(shape) + numbers(stride) + b"\x89ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip


def pickled(entries):
    """A pickled dictionary of values that are opcodes."""
    return b"\x80\x02}(" + b"".join(text(name) + value for name, value in entries.items()) + b"u."


def write_zip(path, content, storages, more=None):
    """A file of ``torch.save`` since PyTorch 1.6: a pickle, and the bytes of each storage."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3")
        for name, data in {**{f"data/{key}": data for key, data in storages.items()}, **(more or {})}.items():
            archive.writestr(f"archive/{name}", data)


def write_legacy(path, content, storages):
    """A file of ``torch.save`` before PyTorch 1.6, of float32."""
    head = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    data = [struct.pack("<q", len(data) // 4) + data for data in storages.values()]
    path.write_bytes(b"".join([*head, content, pickle.dumps(list(storages), 2), *data]))


def pack(value):
    """As flax.serialization packs arrays."""
    import msgpack

    if isinstance(value, np.ndarray):
        inner = msgpack.packb((value.shape, value.dtype.name, value.tobytes()), use_bin_type=True)
        return msgpack.ExtType(1, inner)
    if isinstance(value, complex):
        return msgpack.ExtType(2, msgpack.packb((value.real, value.imag)))
    raise TypeError(value)


def save_msgpack(path, tree):
    import msgpack

    path.write_bytes(msgpack.packb(tree, default=pack, strict_types=True))
    return path
