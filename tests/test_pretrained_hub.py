"""Weights of huggingface.co: its cache first, the network only for what is not here, and what is said without it."""

import dataclasses
import hashlib
import json
import socket
import sys
import types

import numpy as np
import pytest
from safetensors.numpy import save

from eqvision.pretrained import cards
from eqvision.pretrained.cards import find_card
from eqvision.pretrained.download import place_of
from eqvision.pretrained.errors import WeightsError
from eqvision.pretrained.hub import HubSource, parse_hub
from eqvision.pretrained.locate import locate

CONTENT = save({"w": np.ones(3, np.float32)})
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Every way to the network is closed; the fixture's value has what was tried."""
    tried = []

    def refuse(*args, **options):
        tried.append(args)
        raise OSError("no route to host")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    return tried


def test_forms_of_a_repository():
    assert parse_hub("hf:timm/vit.a_in1k") == HubSource("timm/vit.a_in1k")
    assert parse_hub("hf:google/bit-50@refs/pr/3") == HubSource("google/bit-50", "refs/pr/3")
    assert parse_hub("hf:a/b@v1.0:x/y.npz") == HubSource("a/b", "v1.0", "x/y.npz")
    assert parse_hub("hf:a/b:y.npz").url("y.npz") == "https://huggingface.co/a/b/resolve/main/y.npz"


class Hub:
    """A stand-in for huggingface_hub: ``files`` are in the repository, ``cached`` on this machine."""

    class EntryNotFoundError(Exception):
        pass

    class LocalEntryNotFoundError(EntryNotFoundError, FileNotFoundError):
        pass

    def __init__(self, folder, files=(), cached=(), online=True):
        self.folder, self.files, self.online, self.asked = folder, dict(files), online, []
        for name in cached:
            self._store(name)

    def _store(self, name):
        self.folder.mkdir(exist_ok=True)
        (self.folder / name).write_bytes(self.files[name])
        return str(self.folder / name)

    def try_to_load_from_cache(self, repo_id, filename, revision=None):
        return str(self.folder / filename) if (self.folder / filename).exists() else None

    def hf_hub_download(self, repo_id, filename, revision=None):
        self.asked.append((repo_id, filename, revision))
        if not self.online:
            raise self.LocalEntryNotFoundError("no connection\nto the hub")
        if filename not in self.files:
            raise self.EntryNotFoundError(filename)
        return self._store(filename)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    def install(**options):
        stand_in = Hub(tmp_path / "snapshot", **options)
        module = types.ModuleType("huggingface_hub")
        module.try_to_load_from_cache = stand_in.try_to_load_from_cache
        module.hf_hub_download = stand_in.hf_hub_download
        errors = types.ModuleType("huggingface_hub.errors")
        errors.EntryNotFoundError = Hub.EntryNotFoundError
        errors.LocalEntryNotFoundError = Hub.LocalEntryNotFoundError
        monkeypatch.setitem(sys.modules, "huggingface_hub", module)
        monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
        return stand_in

    return install


SHARDS = {
    "config.json": b"{}",
    "model.safetensors.index.json": json.dumps({"weight_map": {"a": "one", "b": "two"}}).encode(),
    "one": CONTENT,
    "two": CONTENT,
}


def test_a_cached_repository_is_not_asked_for(hub):
    stand_in = hub(files={"model.safetensors": CONTENT}, cached=["model.safetensors"], online=False)
    assert locate("vit_b16", "hf:timm/vit").path == stand_in.folder / "model.safetensors"
    assert stand_in.asked == []


def test_a_repository_is_downloaded_with_its_configuration(hub, monkeypatch):
    stand_in = hub(files={"pytorch_model.bin": CONTENT, "config.json": b"{}"})
    card = dataclasses.replace(find_card("vit_b16", None), location="hf:timm/vit@v1", sha256=SHA256, layout="timm_vit")
    monkeypatch.setattr(cards, "CARDS", (card,))
    assert locate("vit_b16", None) == (stand_in.folder / "pytorch_model.bin", "timm_vit")
    assert (stand_in.folder / "config.json").exists()
    assert {(repository, revision) for repository, _, revision in stand_in.asked} == {("timm/vit", "v1")}


def test_one_file_of_a_repository(hub):
    stand_in = hub(files={"model.safetensors": b"", "other.npz": CONTENT})
    assert locate("vit_b16", "hf:timm/vit:other.npz").path == stand_in.folder / "other.npz"
    assert "model.safetensors" not in [name for _, name, _ in stand_in.asked]


@pytest.mark.parametrize("cached", [[], ["model.safetensors.index.json", "one"]])
def test_shards_are_downloaded(hub, cached):
    stand_in = hub(files=SHARDS, cached=cached)
    assert locate("vit_b16", "hf:timm/vit").path.name == "model.safetensors.index.json"
    assert {path.name for path in stand_in.folder.iterdir()} == set(SHARDS)


def test_a_repository_lacks_a_file(hub):
    hub(files={"README.md": b""})
    with pytest.raises(
        WeightsError, match=r"hf:timm/vit has no file model.safetensors or .*; name one: hf:ORG/REPO:FILE"
    ):
        locate("vit_b16", "hf:timm/vit")
    hub(files={name: SHARDS[name] for name in list(SHARDS)[:3]})
    with pytest.raises(WeightsError, match="hf:timm/vit has no file two, which its index names"):
        locate("vit_b16", "hf:timm/vit")


def instruction(name):
    url = f"https://huggingface.co/timm/vit/resolve/main/{name}"
    return f"Download\n  {url}\nand put it at\n  {place_of(url)}\nwith its config.json beside it"


def test_a_repository_without_network(hub):
    hub(online=False)
    with pytest.raises(FileNotFoundError, match="LocalEntryNotFoundError: no connection\\)") as error:
        locate("vit_b16", "hf:timm/vit")
    assert instruction("model.safetensors") in str(error.value)
    with pytest.raises(FileNotFoundError) as error:
        locate("vit_b16", "hf:timm/vit:a.npz")
    assert str(error.value).endswith(instruction("a.npz"))


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"huggingface_hub is not installed: pip install 'eqvision\[hub\]'") as error:
        locate("vit_b16", "hf:timm/vit")
    assert instruction("model.safetensors") in str(error.value)
    place = place_of("https://huggingface.co/timm/vit/resolve/main/pytorch_model.bin")
    place.parent.mkdir(parents=True)
    place.write_bytes(CONTENT)
    assert locate("vit_b16", "hf:timm/vit").path == place


def test_a_wrong_digest_in_the_cache_of_huggingface_hub(hub):
    """The file is theirs, so it stays where it is."""
    from eqvision.pretrained.hub import fetch_hub

    stand_in = hub(files={"model.safetensors": b"other"}, cached=["model.safetensors"])
    with pytest.raises(WeightsError, match=f"published is {SHA256}. Delete it to download it again"):
        fetch_hub(parse_hub("hf:timm/vit"), SHA256)
    assert (stand_in.folder / "model.safetensors").exists()


def test_the_real_huggingface_hub(tmp_path, monkeypatch, no_network):
    """Its cache as it lays it out, and its errors without network."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # else it tries again for half a minute
    with pytest.raises(FileNotFoundError) as error:
        locate("vit_b16", "hf:timm/vit")
    assert instruction("model.safetensors") in str(error.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    repository = tmp_path / "models--timm--vit"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (snapshot / "model.safetensors").write_bytes(CONTENT)
    assert locate("vit_b16", "hf:timm/vit").path == snapshot / "model.safetensors"
    assert no_network == []
