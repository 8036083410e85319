"""Files of PyTorch and plain pickles, read without torch, and pickles that would run code."""

import argparse
import collections
import io
import logging
import os
import pickle
import subprocess
from pathlib import Path

import numpy as np
import pytest
from weight_files import (
    BF16,
    ROW,
    W,
    numbers,
    pickled,
    same,
    text,
    torch_tensor,
    write_legacy,
    write_zip,
)

from eqvision.pretrained.errors import WeightsError
from eqvision.pretrained.files import read_tensors

# PyTorch, by hand: opcodes of a pickle of protocol 2


WRITERS = pytest.mark.parametrize("write", [write_zip, write_legacy])


@WRITERS
@pytest.mark.parametrize("suffix", ["pth", "pt", "th", "bin", "pkl", "weights"])
def test_torch_tensors_share_a_storage(tmp_path, write, suffix):
    """Offset, transposed strides, an expanded axis, no elements, and no axes."""
    entries = {
        "whole": torch_tensor("0", 12, (3, 4), (4, 1)),
        "transposed": torch_tensor("0", 12, (4, 3), (1, 4)),
        "part": torch_tensor("0", 12, (2, 2), (4, 1), offset=5),
        "expanded": torch_tensor("0", 12, (3, 2), (0, 1), offset=10),
        "none": torch_tensor("0", 12, (0, 2), (2, 1)),
        "scalar": torch_tensor("0", 12, (), (), offset=7),
    }
    legacy = {name: value.replace(b"tQ", b"NtQ") for name, value in entries.items()}
    file = tmp_path / f"a.{suffix}"
    write(file, pickled(legacy if write is write_legacy else entries), {"0": ROW.tobytes()})
    grid = ROW.reshape(3, 4)
    expected = {
        "whole": grid,
        "transposed": grid.T,
        "part": grid[1:, 1:3],
        "expanded": np.tile(ROW[10:], (3, 1)),
        "none": np.zeros((0, 2), np.float32),
        "scalar": ROW[7],
    }
    same(read_tensors(file), {name: np.asarray(array) for name, array in expected.items()})


def test_a_view_of_a_storage_in_a_legacy_file(tmp_path):
    view = b"(" + text("1") + numbers([4, 6])[1:-1] + b"t"
    write_legacy(tmp_path / "a.th", pickled({"w": torch_tensor("0", 12, (3,), (1,), offset=1, view=view)}),
                 {"0": ROW.tobytes()})  # fmt: skip
    same(read_tensors(tmp_path / "a.th"), {"w": ROW[5:8]})


@WRITERS
@pytest.mark.parametrize(("shape", "stride", "offset"), [((13,), (1,), 0), ((3, 4), (4, 1), 1), ((2,), (-1,), 5),
                                                         ((2,), (1,), -4), ((2,), (10**9,), 0)])  # fmt: skip
def test_a_tensor_beyond_its_storage(tmp_path, write, shape, stride, offset):
    """Memory outside of the file is never read."""
    tensor = torch_tensor("0", 12, shape, stride, offset, view=b"N" if write is write_legacy else None)
    write(tmp_path / "a.pth", pickled({"w": tensor}), {"0": ROW.tobytes()})
    with pytest.raises(WeightsError, match=r"a.pth is truncated or damaged .*in a storage of 12"):
        read_tensors(tmp_path / "a.pth")


def test_a_storage_shorter_than_said(tmp_path):
    write_zip(tmp_path / "a.pth", pickled({"w": torch_tensor("0", 12, (3,), (1,))}), {"0": ROW[:5].tobytes()})
    with pytest.raises(WeightsError, match="a storage has 20 bytes, not 48"):
        read_tensors(tmp_path / "a.pth")


def test_a_torchscript_program_is_read_by_its_modules(tmp_path):
    """Its classes are those of its own code, which is not run; tensors go by the names of a state_dict."""
    entries = text("w") + torch_tensor("0", 12, (3,), (1,)) + text("training") + b"\x89"
    inner = b"c__torch__.layers.___torch_mangle_1\nLinear\n)\x81}(" + entries + b"ub"
    content = b"\x80\x02c__torch__.models\nNet\n)\x81}(" + entries + text("fc") + inner + b"ub."
    write_zip(tmp_path / "a.pt", content, {"0": ROW.tobytes()}, {"constants.pkl": b"", "code/models.py": b"raise"})
    same(read_tensors(tmp_path / "a.pt"), {"w": ROW[:3], "fc.w": ROW[:3]})
    write_zip(tmp_path / "b.pt", b"\x80\x02c__torch__.models\nNet\n)\x81](" + entries + b"eb.", {"0": ROW.tobytes()})
    with pytest.raises(WeightsError, match=r"b.pt is truncated or damaged .*a module with a list for its attributes"):
        read_tensors(tmp_path / "b.pt")


def test_big_endian_files_say_what_to_do(tmp_path):
    content, storage = pickled({"w": torch_tensor("0", 12, (3,), (1,))}), {"0": ROW.tobytes()}
    write_zip(tmp_path / "b.pt", content, storage, {"byteorder": b"big"})
    with pytest.raises(WeightsError, match=r"b.pt: has big-endian numbers"):
        read_tensors(tmp_path / "b.pt")


# Pickles that would run code


class Evil:
    """Calls ``function`` where it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def attacks(marker):
    return {
        "os.system": Evil(os.system, f"touch {marker}"),
        "builtins.eval": Evil(eval, f"open({str(marker)!r}, 'w')"),
        "builtins.exec": Evil(exec, f"open({str(marker)!r}, 'w')"),
        "subprocess.Popen": Evil(subprocess.Popen, ["touch", str(marker)]),
        "builtins.getattr": Evil(getattr, "text", "upper"),
        "io.open": Evil(io.open, str(marker), "w"),
        "numpy.load": Evil(np.load, str(marker)),
    }


# By other names in pickles of protocols before 3, which are for Python 2.
ALIASES = {
    "builtins": ("builtins", "__builtin__"),
    "os": ("posix", "nt"),
    "io": ("io", "_io"),
    "subprocess": ("subprocess", "commands"),
}


@pytest.mark.parametrize("write", ["zip", "legacy", "plain"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", list(attacks("")))
def test_a_malicious_pickle_never_runs(tmp_path, write, protocol, name):
    marker, file = tmp_path / "marker", tmp_path / "a.pkl"
    content = pickle.dumps({"state_dict": {"w": np.ones(2)}, "args": attacks(marker)[name]}, protocol)
    if write == "plain":
        file.write_bytes(content)
    else:
        {"zip": write_zip, "legacy": write_legacy}[write](file, content, {})
    with pytest.raises(WeightsError, match="which is refused: a pickle may run any code") as error:
        read_tensors(file)
    module, _, function = name.rpartition(".")
    aliases = ALIASES.get(module, (module,))
    assert any(f"asks for {alias}.{function}" in str(error.value) for alias in aliases), error.value
    assert not marker.exists()


def test_the_attack_of_these_tests_is_real(tmp_path):
    """Python's own unpickler does run it; otherwise the test above could not fail."""
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(attacks(marker)["builtins.exec"]))
    assert marker.exists()


@pytest.mark.parametrize("where", ["header", "keys", "storage"])
def test_other_pickles_of_a_legacy_file_are_guarded_too(tmp_path, where):
    marker = tmp_path / "marker"
    evil = pickle.dumps(Evil(os.system, f"touch {marker}"), 2)
    plain = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {}, {"w": 1}, [])]
    if where == "storage":
        nested = pickle.dumps(b"".join([*plain[:3], evil]), 3)[2:-1]  # only the opcodes of the bytes
        content = b"\x80\x03ctorch.storage\n_load_from_bytes\n" + nested + b"\x85R."
    else:
        plain[{"header": 2, "keys": 4}[where]] = evil
        content = b"".join(plain)
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(WeightsError, match=r"asks for posix.system, which is refused"):
        read_tensors(tmp_path / "a.pth")
    assert not marker.exists()


@pytest.mark.parametrize(
    "opcodes",
    [
        b"ctorch._utils\n_rebuild_tensor_v2\n}" + text("call") + b"Ns\x86b.",  # BUILD sets attributes
        b"ctorch._utils\n_rebuild_tensor_v2\nN}" + text("call") + b"Ns\x86b.",  # and again, by the other form
        b"ccollections\nOrderedDict\nN}" + text("items") + b"Ns\x86b.",
        b"cnumpy\nndarray\n)R.",  # a name that may be mentioned and not called
        b"ctorch\nFloatStorage\n)R.",
        b"c_codecs\nencode\n" + text("abc") + text("bz2") + b"\x86R.",
        b"cnumpy.core.multiarray\n_reconstruct\nctorch\nfloat32\n)" + b"\x86R.",
        text("pid") + b"Q.",
        b"K\x01Q.",
    ],
)
def test_allowed_names_cannot_be_misused(tmp_path, opcodes):
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02" + opcodes)
    with pytest.raises(WeightsError, match=r"a.pkl.*(damaged|refused)"):
        read_tensors(tmp_path / "a.pkl")
    write_zip(tmp_path / "b.pth", pickled({"w": torch_tensor("0", 12, (3,), (1,))}), {"0": ROW.tobytes()})
    same(read_tensors(tmp_path / "b.pth"), {"w": ROW[:3]})


def test_a_dtype_cannot_make_objects_of_bytes(tmp_path):
    """numpy's own dtype would take the bytes of such an array for addresses of objects."""
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
    dtype = b"cnumpy\ndtype\n(U\x02O8K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02}U\x01a" + array + b"(K\x01K\x01\x85" + dtype + b"\x89U\x08AAAAAAAAtbs.")
    with pytest.raises(WeightsError, match="holds no tensors"):
        read_tensors(tmp_path / "a.pkl")


def test_a_dictionary_that_holds_itself(tmp_path):
    circle = {"w": np.ones(2)}
    circle["again"] = circle
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(circle))
    with pytest.raises(WeightsError, match=r"a.pkl: dictionaries nested more than 64 deep"):
        read_tensors(tmp_path / "a.pkl")


# Plain pickles, and models in dictionaries with other things


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickles_of_numpy(tmp_path, rng, protocol):
    tensors = {
        "a": rng.standard_normal((2, 3), dtype=np.float32),
        "b": np.asfortranarray(rng.standard_normal((2, 3))),
        "c": rng.integers(0, 9, 4),
        "d": np.arange(3, dtype=">f4"),
        "e": np.zeros((0, 2), np.float16),
        "f": rng.standard_normal(3).astype(BF16),
    }
    rest = {"score": np.float64(0.5), "names": np.array(["x"]), "any": np.array([None], object)}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({**tensors, **rest}, protocol))
    same(read_tensors(tmp_path / "a.pkl"), {**tensors, "d": tensors["d"].astype("<f4")})


def save_pickle(tmp_path, tree):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(tree, 2))
    return tmp_path / "a.pkl"


MODEL = {"module.conv.weight": W, "module.steps": np.array(3)}


@pytest.mark.parametrize(
    "tree",
    [
        MODEL,
        {"state_dict": MODEL, "best_prec1": np.array(91.7), "epoch": 3},
        {"model": MODEL, "optimizer": {"state": {0: {"exp_avg": W}}}, "lr_scheduler": {"x": W}, "epoch": 1,
         "args": argparse.Namespace(lr=W, out=Path("/tmp"), betas=(0.9, 0.99)), "scaler": {}},
        {"state_dict": MODEL, "model_ema": {"other": W}, "teacher": {"another": W}},
        {"model": collections.OrderedDict(MODEL), "model_ema": {"other": W}},
        {"params": MODEL}, {"teacher": MODEL, "student": {"other": W}}, {"a name of their own": MODEL},
        {"checkpoint": {"state_dict": MODEL}, "tags": collections.defaultdict(list, {"a": [1]}), "seen": {1, 2}},
    ],
)  # fmt: skip
def test_the_model_is_found(tmp_path, tree):
    if "checkpoint" in tree:  # a dictionary of a dictionary: only names that are known lead inwards
        tree = {**tree["checkpoint"], **{name: value for name, value in tree.items() if name != "checkpoint"}}
    same(read_tensors(save_pickle(tmp_path, tree)), {"conv.weight": W, "steps": np.array(3)})


def test_which_of_several_models_is_read_is_logged(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "eqvision.pretrained"):
        read_tensors(save_pickle(tmp_path, {"model_ema": {"a": W}, "model": {"b": W}}))
    assert "the file holds model, model_ema; model is read" in caplog.text


@pytest.mark.parametrize(
    ("tree", "names"),
    [
        ({"model": {"a": W}, "head": {"b": W}}, ["model.a", "head.b"]),  # nothing is dropped that could be the model's
        ({"model": {"a": W}, "b": W}, ["model.a", "b"]),
        ({"backbone": {"a": [W, W]}, "head": {"b": W}}, ["backbone.a.0", "backbone.a.1", "head.b"]),
        ({"module.a": W, "b": W}, ["module.a", "b"]),
        ({"module._orig_mod.a": W, "module._orig_mod.b": W}, ["a", "b"]),
    ],
)
def test_names_of_nested_dictionaries(tmp_path, tree, names):
    assert list(read_tensors(save_pickle(tmp_path, tree))) == names


def test_a_pickle_without_tensors_says_what_it_has(tmp_path):
    with pytest.raises(
        WeightsError, match=r"a.pkl: holds no tensors, but a dictionary with the entries:\n  epoch\n  lr"
    ):
        read_tensors(save_pickle(tmp_path, {"epoch": 1, "lr": 0.1}))
    with pytest.raises(WeightsError, match="holds no tensors, but an object of type list"):
        read_tensors(save_pickle(tmp_path, [1, 2]))


# What the original libraries write


def torch_state():
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2))
    state = model.state_dict()
    base = torch.randn(6, 5)
    return {
        **state,
        "transposed": base.T,
        "part": base[1:4, 2:],
        "shared": base,
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "expanded": torch.randn(3, 1).expand(3, 4),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "bool": torch.tensor([True, False]),
        **{str(dtype): torch.arange(5).to(dtype) for dtype in (torch.float64, torch.float16, torch.int8, torch.uint8)},
        "complex": torch.randn(3, dtype=torch.complex64),
        "empty": torch.zeros(0, 3),
    }


@pytest.mark.parity
@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_torch_saves(tmp_path, new, protocol):
    import torch

    state = torch_state()
    tree = {"state_dict": state, "args": argparse.Namespace(device=torch.device("cpu"), size=torch.Size([3])),
            "optimizer": torch.optim.Adam([state["parameter"]]).state_dict(), "dtype": torch.bfloat16,
            "best": np.float32(3)}  # fmt: skip
    torch.save(tree, tmp_path / "a.pth", pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    found = read_tensors(tmp_path / "a.pth")
    same(found, {name: tensor.detach().numpy() for name, tensor in state.items()})


@pytest.mark.parity
@pytest.mark.parametrize("new", [True, False])
def test_small_floats_of_torch(tmp_path, new):
    import torch

    values = torch.linspace(-3, 3, 7)
    types = [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32]
    state = {str(dtype): values.abs().to(dtype) for dtype in types}
    torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=new)
    found = read_tensors(tmp_path / "a.pth")
    assert [str(array.dtype) for array in found.values()] == [str(dtype).removeprefix("torch.") for dtype in types]
    for name, tensor in state.items():
        np.testing.assert_array_equal(found[name].astype(np.float32), tensor.float().numpy())


@pytest.mark.parity
def test_torch_tensors_in_a_plain_pickle(tmp_path):
    import torch

    state = {"a": torch.randn(3, 2), "b": torch.nn.Parameter(torch.randn(4)).data.half()}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": state}))
    same(read_tensors(tmp_path / "a.pkl"), {name: tensor.numpy() for name, tensor in state.items()})


@pytest.mark.parity
def test_a_whole_torch_model_is_refused(tmp_path):
    import torch

    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"asks for torch.nn.modules.linear.Linear, which is refused"):
        read_tensors(tmp_path / "a.pth")


@pytest.mark.parity
def test_what_flax_writes(tmp_path, rng, monkeypatch):
    from flax import serialization

    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 1000)
    tree = {"params": {"a": {"kernel": rng.standard_normal((40, 20)), "bias": rng.standard_normal(3).astype(BF16)}}}
    (tmp_path / "a.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    found = read_tensors(tmp_path / "a.msgpack")
    same(dict(sorted(found.items())), {f"a/{name}": tree["params"]["a"][name] for name in ("bias", "kernel")})
