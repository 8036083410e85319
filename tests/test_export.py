"""Exported files: read back they give the same numbers; damage, another model and other images are named."""

import dataclasses
import json
import os
import struct

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvision import inference
from eqvision.data import normalize
from eqvision.export import (
    ModelFile,
    export_safetensors,
    export_stablehlo,
    load_exported,
    load_safetensors,
    model_of_zoo,
    read_card,
    sidecar,
)

SIZES = {"resnet20_cifar": 12, "vit_ti4": 8, "mixer_s16": 16}


def shaken(source: ModelFile, seed: int = 1) -> ModelFile:
    """Every parameter and statistic moved, so that none is a zero or a one whose loss would not be seen."""
    rng = np.random.default_rng(seed)
    model = jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.05, x.shape), x.dtype), source.model)
    state = jax.tree.map(lambda x: x + jnp.asarray(rng.uniform(0.1, 0.5, x.shape), x.dtype), source.state)
    return source._replace(model=model, state=state)


@pytest.fixture(scope="module", params=SIZES)
def source(request):
    return shaken(model_of_zoo(request.param, num_classes=5, image_size=SIZES[request.param]))


@pytest.fixture(scope="module")
def small():
    return shaken(model_of_zoo("small_cnn", num_classes=3, image_size=8))


def pixels(source: ModelFile, count: int, seed: int = 0):
    shape = (count, *source.card.image_size, source.card.in_channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def floats(source: ModelFile, images):
    return normalize(jnp.asarray(images), source.card.mean, source.card.std)


def same(tree, other) -> bool:
    return jax.tree.structure(tree) == jax.tree.structure(other) and all(
        a.dtype == b.dtype and np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    )


# StableHLO


@pytest.mark.parametrize("inside", [True, False])
def test_a_program_equals_its_model_at_any_batch_size(source, inside, tmp_path, assert_close):
    program = export_stablehlo(source, tmp_path / "model", normalize=inside)
    exported = load_exported(tmp_path / "model")
    assert exported.program == program
    # Normalised in the same compiled program: XLA's rounding of two programs differs by 1e-6 and a little.
    prepare = (lambda x: floats(source, x)) if inside else (lambda x: x)
    model = jax.jit(lambda model, state, x: model(prepare(x), state)[0])
    for count in (1, 5) if inside else (3,):
        images = pixels(source, count, seed=count)
        given = images if inside else floats(source, images)
        expected = model(source.model, source.state, given)
        assert np.ptp(np.asarray(expected)) > 1e-3  # else equal zeros would do
        assert_close(exported(given), expected, 1e-6)


def test_a_program_does_not_need_the_model(small, tmp_path):
    """The arrays are in the file: what is exported does not change with the tree that it came from."""
    export_stablehlo(small, tmp_path / "model")
    images = pixels(small, 2)
    other = shaken(small, seed=2)
    was = np.asarray(inference(small.model, small.state)(floats(small, images)))
    now = np.asarray(inference(other.model, other.state)(floats(small, images)))
    found = np.asarray(load_exported(tmp_path / "model")(images))
    assert np.abs(found - was).max() < 1e-6 * np.abs(was).max()
    assert np.abs(found - now).max() > 1e-2 * np.abs(was).max()


def test_the_sidecar_says_how_to_use_the_program(small, tmp_path):
    card = dataclasses.replace(small.card, class_names=("süß", "b", "c"), mean=(0.1, 0.2, 0.3))
    export_stablehlo(small._replace(card=card), tmp_path / "m.hlo", platforms=("cuda", "cpu", "cuda"))
    written = json.loads((tmp_path / "m.hlo.json").read_text())
    assert written["normalize"] is True
    assert written["input"] == "uint8[b, 8, 8, 3]"
    assert written["output"] == "float32[b, 3]"
    assert written["platforms"] == ["cuda", "cpu"]
    assert written["card"]["class_names"] == ["süß", "b", "c"]
    assert written["card"]["mean"] == [0.1, 0.2, 0.3]
    assert {"jax", "jaxlib", "eqvision"} <= written["card"]["versions"].keys()
    assert load_exported(tmp_path / "m.hlo").program.card == card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.hlo", "m.hlo.json"]


def test_files_have_the_usual_permissions(small, tmp_path):
    (tmp_path / "plain").touch()
    export_stablehlo(small, tmp_path / "program")
    export_safetensors(small, tmp_path / "weights")
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {(tmp_path / "plain").stat().st_mode}


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), r"takes uint8\[b, 8, 8, 3\], pixels 0..255; got float32\[2, 8, 8, 3\]"),
        (np.zeros((2, 9, 8, 3), np.uint8), r"got uint8\[2, 9, 8, 3\].*--image-size"),
        (np.zeros((8, 8, 3), np.uint8), r"got uint8\[8, 8, 3\]"),
        (np.zeros((0, 8, 8, 3), np.uint8), r"got uint8\[0, 8, 8, 3\]"),
    ],
)
def test_other_images_are_refused(images, message, small, tmp_path):
    export_stablehlo(small, tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        load_exported(tmp_path / "model")(images)


def test_a_program_for_floats_refuses_pixels(small, tmp_path):
    export_stablehlo(small, tmp_path / "model", normalize=False)
    with pytest.raises(ValueError, match=r"takes float32\[b, 8, 8, 3\], normalised images.*got uint8"):
        load_exported(tmp_path / "model")(pixels(small, 2))


def test_a_program_for_another_platform_is_refused_by_name(small, tmp_path):
    export_stablehlo(small, tmp_path / "model", platforms=("tpu",))
    with pytest.raises(ValueError, match=r"tpu.*cpu"):
        load_exported(tmp_path / "model")(pixels(small, 2))


def test_an_unknown_platform_is_refused(small, tmp_path):
    with pytest.raises(ValueError, match="platform 'tpus' does not exist; nearest: tpu"):
        export_stablehlo(small, tmp_path / "model", platforms=("tpus",))
    with pytest.raises(ValueError, match="no platform to export for; name one or more of cpu, cuda"):
        export_stablehlo(small, tmp_path / "model", platforms=())
    assert list(tmp_path.iterdir()) == []


def test_parameters_beyond_the_format_are_refused(small, tmp_path, monkeypatch):
    monkeypatch.setattr("eqvision.export.stablehlo.LIMIT", 1000)
    with pytest.raises(ValueError, match=r"small_cnn has .* GiB of parameters.*--format safetensors"):
        export_stablehlo(small, tmp_path / "model")


def test_every_flipped_bit_of_a_program_is_found(small, tmp_path):
    export_stablehlo(small, tmp_path / "model")
    whole = bytearray((tmp_path / "model").read_bytes())
    for place in np.random.default_rng(0).integers(0, len(whole), 20):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        (tmp_path / "model").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model is damaged.*SHA-256 differs"):
            load_exported(tmp_path / "model")
    (tmp_path / "model").write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="SHA-256 differs"):
        load_exported(tmp_path / "model")


def test_what_is_wrong_with_the_sidecar_is_named(small, tmp_path):
    export_stablehlo(small, tmp_path / "model")
    text = sidecar(tmp_path / "model").read_text()
    sidecar(tmp_path / "model").write_text(text.replace('"num_classes": 3', '"num_classes": "three"'))
    with pytest.raises(ValueError, match=r"model\.json is damaged: card\.num_classes: expected a whole number"):
        load_exported(tmp_path / "model")
    sidecar(tmp_path / "model").write_text(text[:40])
    with pytest.raises(ValueError, match=r"model\.json is damaged"):
        load_exported(tmp_path / "model")
    sidecar(tmp_path / "model").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.json does not exist; eqvision export writes it beside"):
        load_exported(tmp_path / "model")


# safetensors


def test_safetensors_give_back_the_model_bit_for_bit(source, tmp_path):
    card = export_safetensors(source, tmp_path / "model.safetensors")
    model, state = load_safetensors(tmp_path / "model.safetensors")
    assert same((model, state), (source.model, source.state))
    assert read_card(tmp_path / "model.safetensors") == card == source.card


def test_names_in_the_file(tmp_path):
    from safetensors import safe_open

    export_safetensors(model_of_zoo("resnet20_cifar", num_classes=3, image_size=8), tmp_path / "model")
    with safe_open(tmp_path / "model", framework="numpy") as opened:
        names, header = list(opened.keys()), opened.metadata()
        assert opened.get_tensor("stats.backbone.stem.norm.variance").tolist() == [1.0] * 16
    assert "backbone.stages.0.0.convs.0.conv.weight" in names
    assert len([name for name in names if name.startswith("stats.")]) == 2 * 19
    assert header["model"] == "resnet20_cifar"
    assert json.loads(header["image_size"]) == [8, 8]
    assert json.loads(header["versions"])["eqvision"]


def test_a_loaded_model_computes_and_trains(small, tmp_path):
    export_safetensors(small, tmp_path / "model")
    model, state = load_safetensors(tmp_path / "model")
    images = floats(small, pixels(small, 4))
    assert np.array_equal(inference(model, state)(images), inference(small.model, small.state)(images))
    grads = eqx.filter_grad(lambda m: m(images, state, train=True, key=jax.random.key(0))[0].sum())(model)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def rewritten(file, change):
    """The file with ``change(header)`` applied to its JSON header."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def test_every_flipped_bit_of_safetensors_is_found(small, tmp_path):
    file = tmp_path / "model"
    export_safetensors(small, file)
    whole = file.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    rng = np.random.default_rng(0)
    for place in [*rng.integers(0, header, 60), *rng.integers(header, len(whole), 20)]:
        damaged = bytearray(whole)
        damaged[place] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=str(file)):
            load_safetensors(file)


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1])
def test_truncation_is_found(keep, small, tmp_path):
    file = tmp_path / "model"
    export_safetensors(small, file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="model is damaged, or no safetensors file"):
        load_safetensors(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda h: h["__metadata__"].update(model="resnet20_cifar"),
            r"(?s)not hold the model resnet20_cifar; .* more",
        ),
        (lambda h: h["__metadata__"].update(model="smal_cnn"), "model 'smal_cnn' does not exist; nearest: small_cnn"),
        (
            lambda h: h["__metadata__"].update(num_classes="7"),
            r"head\S*: \S*model float32\[\d+, 3\], small_cnn float32",
        ),
        (lambda h: h["__metadata__"].update(num_classes="many"), "header of .*model is damaged"),
        (lambda h: h["__metadata__"].update(num_classes='"3"'), "num_classes: expected a whole number, got str '3'"),
        (lambda h: h["__metadata__"].update(mean="[0.4]"), "do not have the SHA-256"),
        (lambda h: h["__metadata__"].pop("sha256"), "do not have the SHA-256"),
        (lambda h: h["__metadata__"].pop("mean"), "not written by eqvision export: its header lacks mean"),
        (lambda h: h.pop("__metadata__"), "not written by eqvision export: its header lacks model, num_classes"),
        (
            lambda h: h.update(extra=h.pop("head.linear.bias")),
            r"2 tensors differ:\n  extra: \S+model float32\[3\], sma",
        ),
    ],
)
def test_a_file_of_something_else_is_named(change, message, small, tmp_path):
    export_safetensors(small, tmp_path / "model")
    rewritten(tmp_path / "model", change)
    with pytest.raises(ValueError, match=message):
        load_safetensors(tmp_path / "model")


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no safetensors file at .*none"):
        load_safetensors(tmp_path / "none")


# Writing


@pytest.mark.parametrize("export", [export_stablehlo, export_safetensors])
def test_files_are_not_replaced_unless_told(export, small, tmp_path):
    file = tmp_path / "deep" / "model"
    export(small, file)
    before = file.read_bytes()
    with pytest.raises(FileExistsError, match=r"model exists; nothing was written.*--force"):
        export(shaken(small), file)
    assert file.read_bytes() == before
    export(shaken(small), file, force=True)
    assert file.read_bytes() != before
    with pytest.raises(FileExistsError, match="deep is a folder"):
        export(small, tmp_path / "deep", force=True)


def test_a_foreign_json_is_not_replaced_either(small, tmp_path):
    sidecar(tmp_path / "model").write_text("mine")
    with pytest.raises(FileExistsError, match=r"model\.json exists"):
        export_stablehlo(small, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model.json"]


@pytest.mark.parametrize("export", [export_stablehlo, export_safetensors])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(export, small, tmp_path, monkeypatch):
    export(small, tmp_path / "model")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        export(shaken(small), tmp_path / "model", force=True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
