"""Where weights are found: local files first, the network only for what is not here, and what is said without it."""

import dataclasses
import hashlib
import io
import os
import socket
import urllib.request
from pathlib import Path
from urllib.error import HTTPError, URLError

import numpy as np
import pytest
from safetensors.numpy import save

from eqvision.names import UnknownNameError
from eqvision.pretrained import cards
from eqvision.pretrained.cards import find_card
from eqvision.pretrained.download import check_digest, fetch, place_of
from eqvision.pretrained.errors import WeightsError
from eqvision.pretrained.hub import parse_hub
from eqvision.pretrained.locate import locate

URL = "https://weights.example.org/models/one%20b16.safetensors"
OTHER = "https://weights.example.org/models/other.npz"
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


@pytest.fixture
def serve(monkeypatch):
    """Have ``urlopen`` answer: ``serve(content, length)``; its value has the requests."""
    asked = []

    def serve(content, length=None):
        def urlopen(request, timeout):
            assert timeout is not None
            asked.append(request.full_url)
            answer = io.BytesIO(content)
            answer.headers = {} if length is None else {"Content-Length": str(length)}
            return answer

        monkeypatch.setattr(urllib.request, "urlopen", urlopen)
        return asked

    return serve


@pytest.fixture
def card(monkeypatch):
    """Have the model cards know one location: ``card(location, sha256)``."""

    def publish(location, sha256=None):
        rows = [
            dataclasses.replace(find_card("vit_b16", None), tag=tag, location=place, sha256=digest, layout="timm_vit")
            for tag, place, digest in (("first", location, sha256), ("second", OTHER, "0" * 64))
        ]
        monkeypatch.setattr(cards, "CARDS", tuple(rows))

    return publish


# Files and folders


def test_local_files_and_folders(tmp_path, no_network):
    (tmp_path / "a.pth").write_bytes(b"x")
    for source in (tmp_path, str(tmp_path), tmp_path / "a.pth"):
        assert locate("vit_b16", source) == (Path(source), None)
    assert no_network == []


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"no weights at {tmp_path}/a.pth$"):
        locate("vit_b16", tmp_path / "a.pth")
    with pytest.raises(FileNotFoundError, match=r"no weights at .*; a repository of huggingface.co is written hf:org"):
        locate("vit_b16", "timm/vit_base_patch16_224")


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.pth").write_bytes(b"x")
    assert locate("vit_b16", "~/a.pth").path == tmp_path / "a.pth"


@pytest.mark.parametrize("source", ["hf:timm", "hf:timm/", "hf:a/b/c", "hf:", "http://x.org/a.pth", "https://x.org/",
                                    "https://x.org/../a.pth", "https:///a.pth"])  # fmt: skip
def test_sources_of_no_form(source):
    with pytest.raises(ValueError, match=r"; expected (hf:organisation/repository|https://HOST/PATH/FILE)"):
        locate("vit_b16", source)


# https


def test_where_downloads_are_kept(monkeypatch):
    monkeypatch.delenv("EQVISION_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert str(place_of(URL)) == "/cache/eqvision/weights/weights.example.org/models/one b16.safetensors"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert place_of(URL).is_relative_to(Path.home() / ".cache" / "eqvision" / "weights")


def test_a_file_is_downloaded_once(serve, no_network):
    asked = serve(CONTENT, len(CONTENT))
    for _ in range(2):
        location = locate("vit_b16", URL)
        assert location.path == place_of(URL)
        assert location.path.read_bytes() == CONTENT
    assert asked == [URL]
    assert [path.name for path in location.path.parent.iterdir()] == ["one b16.safetensors"]
    assert no_network == []


def test_a_file_put_there_by_hand_is_never_asked_for(card, no_network):
    card(URL, SHA256)
    place_of(URL).parent.mkdir(parents=True)
    place_of(URL).write_bytes(CONTENT)
    assert locate("vit_b16", None) == (place_of(URL), "timm_vit")
    assert no_network == []


def test_without_network_the_error_says_what_to_do(card, no_network):
    card(URL, SHA256)
    with pytest.raises(FileNotFoundError) as error:
        locate("vit_b16", None)
    assert "no route to host" in str(error.value)
    assert str(error.value).endswith(f"Download\n  {URL}\nand put it at\n  {place_of(URL)}")
    assert len(no_network) > 0
    assert list(place_of(URL).parent.iterdir()) == []


@pytest.mark.parametrize(
    "cause", [HTTPError(URL, 404, "Not Found", {}, None), URLError("no name"), TimeoutError("slow")]
)
def test_other_failures_of_the_network(monkeypatch, cause):
    def urlopen(request, timeout):
        raise cause

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(FileNotFoundError, match=r"(404: Not Found|no name|slow)") as error:
        fetch(URL)
    assert URL in str(error.value)


def test_half_a_download_is_none(serve):
    serve(CONTENT[:50], len(CONTENT))
    with pytest.raises(FileNotFoundError, match=rf"the connection ended after 50 of {len(CONTENT)} bytes"):
        fetch(URL)
    assert list(place_of(URL).parent.iterdir()) == []


@pytest.mark.parametrize("sha256", [SHA256, SHA256.upper(), SHA256[:8]])
def test_the_digest_is_checked(serve, sha256):
    serve(CONTENT)
    assert fetch(URL, sha256) == place_of(URL)


def test_a_wrong_digest_keeps_the_file_under_another_name(serve, card):
    asked = serve(b"something else")
    card(URL, SHA256)
    found = hashlib.sha256(b"something else").hexdigest()
    for _ in range(2):  # the wrong file does not stay in the way
        with pytest.raises(
            WeightsError, match=f"its SHA-256 is {found}, published is {SHA256}. It is kept as"
        ) as error:
            locate("vit_b16", None)
        assert str(place_of(URL)) in str(error.value)
    assert asked == [URL, URL]
    aside = place_of(URL).with_name("one b16.safetensors.wrong-digest")
    assert f"kept as {aside};" in str(error.value)
    assert aside.read_bytes() == b"something else"
    assert not place_of(URL).exists()


def test_a_digest_is_computed_once_for_a_file(tmp_path, monkeypatch):
    file = tmp_path / "a"
    file.write_bytes(CONTENT)
    digest, computed = hashlib.file_digest, []
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: computed.append(args) or digest(*args))
    for _ in range(2):
        check_digest(file, SHA256, rename=False)
    assert len(computed) == 1
    file.write_bytes(CONTENT[::-1])
    os.utime(file, ns=(1, 1))
    with pytest.raises(WeightsError, match=rf"{file} is not the published file"):
        check_digest(file, SHA256, rename=False)
    assert len(computed) == 2


# Published locations


def test_a_tag_names_published_weights(card, serve):
    card(URL)
    asked = serve(CONTENT)
    with pytest.raises(WeightsError, match=f"its SHA-256 is {SHA256}, published is 0000"):
        locate("vit_b16", "second")
    assert asked == [OTHER]
    assert locate("vit_b16", "first") == (place_of(URL), "timm_vit")


def test_a_published_location_has_its_digest_checked(card, serve):
    card(URL, SHA256)
    serve(b"something else")
    with pytest.raises(WeightsError, match=f"published is {SHA256}"):
        locate("vit_b16", URL)


def test_an_unknown_tag_lists_those_of_the_model(card):
    card(URL)
    with pytest.raises(
        FileNotFoundError, match=r"no weights at .*third, and published weights of vit_b16 are: first, se"
    ):
        locate("vit_b16", "third")
    with pytest.raises(FileNotFoundError, match=r"third.pth$"):
        locate("vit_b16", "third.pth")


def test_a_file_goes_before_a_tag(card, tmp_path, monkeypatch):
    card(URL)
    monkeypatch.chdir(tmp_path)
    Path("first").write_bytes(b"x")
    assert locate("vit_b16", "first") == (Path("first"), None)


def test_models_without_published_weights():
    with pytest.raises(
        UnknownNameError, match=r"no published weights of 'resnet57'.*; or give a file, a folder, hf:org"
    ):
        locate("resnet57", None)


def test_every_card_has_a_location_of_a_known_form():
    for card in cards.CARDS:
        if card.location.startswith("hf:"):
            parse_hub(card.location)
        else:
            place_of(card.location)
