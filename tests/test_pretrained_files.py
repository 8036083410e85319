"""Weight files of all formats, and what may be wrong with them."""

import json
import pickle
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file
from weight_files import BF16, W, pickled, same, save_msgpack, torch_tensor, write_legacy, write_zip

from eqvision.pretrained.errors import WeightsError
from eqvision.pretrained.files import read_config, read_tensors
from eqvision.pretrained.torch_file import LEGACY_MAGIC


@pytest.fixture
def tensors(rng):
    """Names as from PyTorch, of the usual types."""
    return {
        "conv.weight": rng.standard_normal((4, 3, 2, 2), dtype=np.float32),
        "norm.half": rng.standard_normal(5).astype(np.float16),
        "norm.brain": rng.standard_normal((2, 3)).astype(BF16),
        "norm.count": np.array(7, np.int64),
        "empty": np.zeros((0, 3), np.float32),
    }


# safetensors, and files in several parts


def test_safetensors_keep_their_types(tmp_path, tensors):
    save_file(tensors, tmp_path / "a.safetensors")
    found = read_tensors(tmp_path / "a.safetensors")
    same({name: found[name] for name in tensors}, tensors)


def sharded(folder, tensors):
    shards = {"model-00001-of-00002.safetensors": list(tensors)[:2], "model-00002-of-00002.safetensors": []}
    shards["model-00002-of-00002.safetensors"] = list(tensors)[2:]
    for shard, names in shards.items():
        save_file({name: tensors[name] for name in names}, folder / shard)
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_shards_are_read_together(tmp_path, tensors):
    index = sharded(tmp_path, tensors)
    same(read_tensors(index), tensors)
    same(read_tensors(tmp_path), tensors)


def test_a_missing_shard_is_named(tmp_path, tensors):
    index = sharded(tmp_path, tensors)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"names 2 files, of which 1 are missing:\n  model-00002-of-00002") as error:
        read_tensors(index)
    assert str(index) in str(error.value)


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path, tensors):
    index = sharded(tmp_path, tensors)
    listing = json.loads(index.read_text())
    listing["weight_map"]["head.bias"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(listing))
    with pytest.raises(WeightsError, match=r"1 tensors that are not in their files:\n  head.bias in model-00001"):
        read_tensors(index)


@pytest.mark.parametrize("text", ["", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../b.safetensors"}}'])
def test_an_index_that_is_none(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(WeightsError, match="is no index of weight files"):
        read_tensors(tmp_path)


# numpy


def test_npz_with_bfloat16_as_big_vision_writes_it(tmp_path, rng):
    brain = rng.standard_normal((3, 2)).astype(BF16)
    kernel = np.asfortranarray(rng.standard_normal((3, 4), dtype=np.float32))
    np.savez(tmp_path / "a.npz", **{"head/bias": brain.view("V2"), "head/kernel": kernel, "step": np.array(3)})
    same(read_tensors(tmp_path / "a.npz"), {"head/bias": brain, "head/kernel": kernel, "step": np.array(3)})


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("prefix", ["params/", "opt/target/", "params/params/"])
def test_npz_of_a_training_state(tmp_path, save, prefix):
    save(tmp_path / "a.npz", **{f"{prefix}w/kernel": np.ones(2), "opt/state/m": np.ones(3), "extra": np.zeros(1)})
    same(read_tensors(tmp_path / "a.npz"), {"w/kernel": np.ones(2)})


def test_npz_with_objects_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.array([print, {}], object), allow_pickle=True)
    with pytest.raises(WeightsError, match=r"a.npz: a.npy holds Python objects, which are refused"):
        read_tensors(tmp_path / "a.npz")


def test_npz_with_structures_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.zeros(2, [("x", np.uint8), ("y", np.uint8)]))
    with pytest.raises(WeightsError, match="which is no number"):
        read_tensors(tmp_path / "a.npz")


# Flax


@pytest.mark.parametrize("file", ["flax_model.msgpack", "checkpoint_100"])
def test_msgpack(tmp_path, rng, file):
    kernel, brain = rng.standard_normal((3, 200), dtype=np.float32), rng.standard_normal(2).astype(BF16)
    large = rng.standard_normal((200, 400))
    chunks = {"0": large.reshape(-1)[:50_000], "1": large.reshape(-1)[50_000:]}
    chunked = {"__msgpack_chunked_array__": True, "shape": {"0": 200, "1": 400}, "chunks": chunks}
    tree = {"a": {"kernel": kernel, "bias": brain, "1": {"large": chunked}}, "step": np.array(3), "n": 1, "c": 1j}
    expected = {"a/kernel": kernel, "a/bias": brain, "a/1/large": large, "step": np.array(3)}
    same(read_tensors(save_msgpack(tmp_path / file, tree)), expected)


@pytest.mark.parametrize(
    "tree",
    [
        {"params": {"a": W}, "batch_stats": {"b": {"mean": W}}},
        {"params": {"a": W}, "model_state": {"batch_stats": {"b": {"mean": W}}}, "opt_state": {"0": W}, "rng": W},
        {"optimizer": {"target": {"params": {"a": W}}, "state": {"m": W}}, "model_state": {"b": {"mean": W}}},
    ],
)
def test_training_states_of_flax(tmp_path, tree):
    same(read_tensors(save_msgpack(tmp_path / "a.msgpack", tree)), {"a": W, "batch_stats/b/mean": W})


def test_msgpack_that_is_not_flax(tmp_path):
    import msgpack

    (tmp_path / "a.msgpack").write_bytes(msgpack.packb({"a": msgpack.ExtType(9, b"x")}))
    with pytest.raises(WeightsError, match="extension type 9 of msgpack is none of flax's"):
        read_tensors(tmp_path / "a.msgpack")
    save_msgpack(tmp_path / "a.msgpack", {"a": 1})
    with pytest.raises(WeightsError, match="holds no tensors"):
        read_tensors(tmp_path / "a.msgpack")


# Folders


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "flax_model.msgpack"])
def test_a_folder_of_hugging_face(tmp_path, file):
    (tmp_path / "config.json").write_text('{"depth": 2}')
    if file == "model.safetensors":
        save_file({"w": W}, tmp_path / file)
    elif file == "pytorch_model.bin":
        write_zip(tmp_path / file, pickled({"w": torch_tensor("0", 2, (2,), (1,))}), {"0": W.tobytes()})
    else:
        save_msgpack(tmp_path / file, {"w": W})
    same(read_tensors(tmp_path), {"w": W})
    assert read_config(tmp_path) == read_config(tmp_path / file) == {"depth": 2}


@pytest.mark.parametrize(("text", "message"), [("{", "is no JSON: Expecting"), ("[1]", r"is no dictionary, but \[1\]")])
def test_a_broken_configuration(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(WeightsError, match=f"config.json {message}"):
        read_config(tmp_path)


def test_a_folder_of_pytorch_shards(tmp_path):
    write_zip(tmp_path / "a.bin", pickled({"w": torch_tensor("0", 2, (2,), (1,))}), {"0": W.tobytes()})
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"w": "a.bin"}}))
    same(read_tensors(tmp_path), {"w": W})


@pytest.mark.parametrize("inside", ["", "default"])
def test_a_checkpoint_of_orbax(tmp_path, rng, inside):
    import orbax.checkpoint as ocp

    params = {"a": {"kernel": rng.standard_normal((3, 2), dtype=np.float32), "bias": np.ones(2, BF16)}}
    state = {"params": params, "model_state": {"batch_stats": {"b": {"mean": W}}}, "opt_state": [W], "global_step": 3}
    with ocp.PyTreeCheckpointer() as writer:
        writer.save(tmp_path / "step" / inside, state)
    found = read_tensors(tmp_path / "step")
    expected = {"a/bias": params["a"]["bias"], "a/kernel": params["a"]["kernel"], "batch_stats/b/mean": W}
    same(dict(sorted(found.items())), expected)
    (tmp_path / "step" / inside / "_METADATA").write_text("{")
    with pytest.raises(WeightsError, match=r"step.*: its _METADATA cannot be read; the checkpoint is damaged"):
        read_tensors(tmp_path / "step")


def test_a_folder_without_weights_lists_what_it_has(tmp_path):
    (tmp_path / "best.pth").write_bytes(b"")
    (tmp_path / "logs").mkdir()
    with pytest.raises(WeightsError, match=r"has none of model.safetensors, .*It has 2 entries:\n  best.pth\n  logs/"):
        read_tensors(tmp_path)
    assert read_config(tmp_path) is None


# Broken files


def good_files(folder):
    big = {f"w{i}": np.full((64, 64), i, np.float32) for i in range(4)}
    save_file(big, folder / "a.safetensors")
    np.savez(folder / "a.npz", **big)
    (folder / "a.pkl").write_bytes(pickle.dumps(big))
    save_msgpack(folder / "a.msgpack", big)
    entries = {name: torch_tensor(name, 4096, (64, 64), (64, 1)) for name in big}
    write_zip(folder / "a.pth", pickled(entries), {name: array.tobytes() for name, array in big.items()})
    legacy = {name: value.replace(b"tQ", b"NtQ") for name, value in entries.items()}
    write_legacy(folder / "a.th", pickled(legacy), {name: array.tobytes() for name, array in big.items()})
    return big


FILES = ["a.safetensors", "a.npz", "a.pkl", "a.msgpack", "a.pth", "a.th"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.001, 0.2, 0.5, 0.999])
def test_truncated_files(tmp_path, name, share):
    expected = good_files(tmp_path)
    file = tmp_path / name
    found = read_tensors(file)
    same({tensor: found[tensor] for tensor in expected}, expected)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(WeightsError, match="damaged") as error:
        read_tensors(file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("name", ["a.npz", "a.pth"])
def test_a_flipped_bit_in_a_zip_archive(tmp_path, name):
    good_files(tmp_path)
    content = bytearray((tmp_path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=r"truncated or damaged .*Bad CRC-32"):
        read_tensors(tmp_path / name)


@pytest.mark.parametrize("name", [*FILES, "unknown"])
def test_empty_files(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(WeightsError, match=f"{name} is empty"):
        read_tensors(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"just some text about weights", "no weight file, or a damaged one: it begins with b'just some te'"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer, not the file itself"),
        (b"\n<!DOCTYPE html><html>404</html>", "a web page, not weights"),
        (b"<html lang=en>404</html>", "a web page, not weights"),
        (b"\x1f\x8b\x08\x00", "compressed by gzip"),
    ],
)
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "a.npz", "a"])
def test_files_that_are_no_weights(tmp_path, content, message, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=message) as error:
        read_tensors(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
    assert "Known formats are safetensors, npz, PyTorch" in str(error.value)


def test_a_zip_archive_of_other_things(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(WeightsError, match=r"is a zip archive without weights; it has:\n  readme.txt"):
        read_tensors(tmp_path / "a.pth")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weights at .*a.pth"):
        read_tensors(tmp_path / "a.pth")


@pytest.mark.parametrize("name", FILES)
def test_the_suffix_does_not_matter(tmp_path, name):
    expected = good_files(tmp_path)
    for suffix in (".bin", ".npz", ""):
        other = tmp_path / f"b{suffix}"
        other.write_bytes((tmp_path / name).read_bytes())
        found = read_tensors(other)
        same({tensor: found[tensor] for tensor in expected}, expected)


def test_legacy_magic_is_the_number():
    assert pickle.dumps(0x1950A86A20F9469CFC6C, 2)[2:] == LEGACY_MAGIC
