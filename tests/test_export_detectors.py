"""Detectors as files for elsewhere: our own, StableHLO programs, and folders that transformers reads."""

import dataclasses
import functools
import json

import deformable_detr_references as deformable_toys
import detr_references as detr_toys
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from detr_references import made, padded_batch, torch_inputs
from safetensors.numpy import save_file

import eqvision
from eqvision.backbones.resnet import DEPTHS
from eqvision.convert import convert
from eqvision.detectors import decode_softmax, detr
from eqvision.export import Card, ModelFile, export_safetensors, export_stablehlo, load_exported, load_safetensors
from eqvision.pretrained import LAYOUTS, WeightsError, to_layout
from eqvision.pretrained.convert import target_layout
from eqvision.pretrained.hf_detector_config import detector_config
from eqvision.published_detector import load_published_detector
from eqvision.run_folder import versions
from eqvision.types import PaddedImages
from eqvision.zoo import DETECTORS

NAMES = ("ant", "bee", "cat", "dog", "elk")


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    for name, row in {**detr_toys.TOYS, **deformable_toys.TOYS}.items():
        monkeypatch.setitem(DETECTORS, name, row)


def card_of(name, **changes):
    card = Card(
        model=name,
        num_classes=5,
        image_size=(64, 96),
        in_channels=3,
        class_names=NAMES,
        task="detection",
        mean=(0.5,),
        std=(0.25,),
        interpolation="bilinear",
        crop_fraction=0.0,
        origin="a test",
        versions=versions(),
        transform="lsj",
    )
    return dataclasses.replace(card, **changes)


def file_of(name="toy_detr", **changes):
    return ModelFile(*made(name), card_of(name, **changes))


def own_file(folder, name="toy_detr", **changes):
    export_safetensors(file_of(name, **changes), folder / "own.safetensors")
    return folder / "own.safetensors"


# Files of our own


def test_safetensors_there_and_back(tmp_path, assert_close):
    source, file = file_of(), own_file(tmp_path)
    assert_close(load_safetensors(file)[0], source.model, 0)
    run = load_published_detector("toy_detr", file)
    assert_close(run.model, source.model, 0)
    data = run.config.data
    assert (run.class_names, data.transform, data.size) == (NAMES, "lsj", (64, 96))
    assert (data.mean, data.std) == ((0.5,), (0.25,))


def test_a_file_of_another_rule_of_sizes(tmp_path):
    file = own_file(tmp_path, transform="detr", sides=(320, 512))
    data = load_published_detector("toy_detr", file).config.data
    assert (data.transform, data.scales, data.longest) == ("detr", (320,), 512)


# For transformers


def test_the_layout_that_needs_no_other_package_comes_first():
    assert target_layout(*made("toy_detr"), "hf").name == "hf_detr_no_timm"
    assert target_layout(*made("toy_detr_dc5"), "hf").name == "hf_detr"
    assert target_layout(*made("toy_detr"), "hf", "hf_detr").name == "hf_detr"
    assert target_layout(*made("toy_detr_panoptic"), "hf").name == "hf_detr_panoptic_no_timm"


def test_a_folder_for_transformers(tmp_path):
    done = convert(own_file(tmp_path), tmp_path / "out", to="hf")
    assert [file.name for file in done.files] == ["model.safetensors", "config.json", "preprocessor_config.json"]
    assert done.differences == ()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["DetrForObjectDetection"]
    assert config["id2label"] == {str(n): name for n, name in enumerate(NAMES)}
    assert (config["d_model"], config["encoder_layers"], config["decoder_layers"], config["num_queries"]) == (
        32,
        2,
        3,
        7,
    )
    assert config["backbone_config"]["hidden_sizes"] == [8, 16, 24, 32]
    prepared = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert prepared["image_processor_type"] == "DetrImageProcessor"
    assert prepared["size"] == {"max_height": 64, "max_width": 96}
    assert (prepared["image_mean"], prepared["image_std"]) == ([0.5], [0.25])
    run = load_published_detector("toy_detr", tmp_path / "out")
    assert (run.class_names, run.config.data.transform, run.config.data.size) == (NAMES, "lsj", (64, 96))


def test_what_transformers_cannot_compute_is_refused():
    with pytest.raises(WeightsError, match=r"knows no dilation, and this model has stride 16 \(DC5\)"):
        detector_config("hf_detr_no_timm", made("toy_detr_dc5")[0], NAMES)
    with pytest.raises(WeightsError, match=r"timm has no ResNet of \(1, 1, 1, 2\) blocks, 3 convolutions each, behind"):
        detector_config("hf_detr", made("toy_detr")[0], NAMES)
    with pytest.raises(WeightsError, match=r"no config.json is known for layout facebook_detr; .* hf_detr, "):
        detector_config("facebook_detr", made("toy_detr")[0], NAMES)
    with pytest.raises(WeightsError, match="cannot be written as hf; layouts that there are for it: "):
        target_layout(*made("toy_detr_pre"), "hf")


@eqx.filter_jit
def forward(model, state, inputs):
    return model(inputs, state)[0]


def theirs_and_ours(folder, source, inputs):
    """What transformers gives from the folder, and our model."""
    import torch
    import transformers

    config = json.loads((folder / "config.json").read_text())
    module, report = getattr(transformers, config["architectures"][0]).from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    pixels, mask = torch_inputs(inputs)
    with torch.no_grad():
        output = module.eval()(pixels, pixel_mask=mask)
    found = forward(source.model, source.state, inputs)
    return output, found


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize("name", ["toy_detr", "toy_detr_panoptic"])
def test_transformers_reads_our_detr(name, tmp_path, rng, assert_close):
    inputs, source = padded_batch(rng), file_of(name)
    convert(own_file(tmp_path, name), tmp_path / "out", to="hf")
    output, found = theirs_and_ours(tmp_path / "out", source, inputs)
    assert_close((found.logits[-1], found.boxes_cxcywh[-1]), (output.logits.numpy(), output.pred_boxes.numpy()), 1e-4)
    if found.masks is not None:
        assert_close(found.masks, output.pred_masks.numpy(), 1e-4)


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["multi_scale", "refine", "two_stage", "single_scale"])
def test_transformers_reads_our_deformable_detr(kind, tmp_path, rng, assert_close):
    name, module = f"toy_deformable_{kind}", deformable_toys.hf_deformable(kind)
    detr_toys.published(module, tmp_path / "random")
    model, state = eqvision.load(name, tmp_path / "random")
    source, inputs = ModelFile(model, state, card_of(name)), padded_batch(rng)
    export_safetensors(source, tmp_path / "own.safetensors")
    convert(tmp_path / "own.safetensors", tmp_path / "out", to="hf")
    output, found = theirs_and_ours(tmp_path / "out", source, inputs)
    assert_close((found.logits[-1], found.boxes_cxcywh[-1]), (output.logits.numpy(), output.pred_boxes.numpy()), 1e-4)


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize("dc5", [False, True], ids=["c5", "dc5"])
def test_transformers_reads_our_detr_on_timms_resnet(dc5, tmp_path, rng, assert_close, monkeypatch):
    monkeypatch.setitem(DEPTHS, 26, ((2, 2, 2, 2), True))
    row = functools.partial(detr, 26, num_classes=5, dc5=dc5, **detr_toys.SIZES)
    monkeypatch.setitem(DETECTORS, "toy_r26", row)
    monkeypatch.setitem(detr_toys.TOYS, "toy_r26", row)
    source, inputs = ModelFile(*made("toy_r26", dc5=dc5), card_of("toy_r26")), padded_batch(rng)
    export_safetensors(source, tmp_path / "own.safetensors")
    convert(tmp_path / "own.safetensors", tmp_path / "out", to="hf_detr")
    output, found = theirs_and_ours(tmp_path / "out", source, inputs)
    assert_close((found.logits[-1], found.boxes_cxcywh[-1]), (output.logits.numpy(), output.pred_boxes.numpy()), 1e-4)


# Programs


@pytest.mark.slow
@pytest.mark.parametrize("normalize", [True, False])
def test_a_program_finds_what_the_model_finds(normalize, tmp_path, rng, assert_close):
    source, file = jax.tree.map(jnp.asarray, file_of()[:2]), tmp_path / "detr.stablehlo"
    source = ModelFile(*source, card_of("toy_detr"))
    program = export_stablehlo(source, file, normalize=normalize, platforms=("cpu",))
    assert program.input == f"{'uint8' if normalize else 'float32'}[b, 64, 96, 3], int32[b, 2]"
    assert program.output == "float32[b, 7, 4], float32[b, 7], int32[b, 7]"
    size = np.array([[64, 96], [40, 80]], np.int32)
    inside = (np.arange(64)[None, :, None] < size[:, :1, None]) & (np.arange(96)[None, None] < size[:, 1:, None])
    pixels = rng.integers(0, 256, (2, 64, 96, 3), dtype=np.uint8)
    normal = (np.where(inside[..., None], (pixels / 255 - 0.5) / 0.25, 0)).astype(np.float32)
    found = load_exported(file)(pixels if normalize else normal, size)
    inputs = PaddedImages(jnp.asarray(normal), jnp.asarray(size))
    expected = decode_softmax(forward(source.model, source.state, inputs), inputs.size)
    assert_close((found.boxes, found.scores), (expected.boxes, expected.scores), 1e-5)
    np.testing.assert_array_equal(found.labels, expected.labels)
    with pytest.raises(ValueError, match=r"takes .*\[b, 64, 96, 3\], int32\[b, 2\], .*; got float64\[2, 64, 64, 3\]"):
        load_exported(file)(np.zeros((2, 64, 64, 3)), size)


@pytest.mark.slow
def test_a_program_of_two_stages_takes_any_batch(tmp_path, rng):
    row = eqx.nn.make_with_state(deformable_toys.TOYS["toy_deformable_two_stage"])
    model, state = row(key=jax.random.key(0))
    file = tmp_path / "two_stage.stablehlo"
    export_stablehlo(ModelFile(model, state, card_of("toy_deformable_two_stage")), file, platforms=("cpu",))
    for batch in (1, 3):
        pixels = rng.integers(0, 256, (batch, 64, 96, 3), dtype=np.uint8)
        found = load_exported(file)(pixels, np.tile(np.array([[64, 96]], np.int32), (batch, 1)))
        assert found.boxes.shape == (batch, deformable_toys.QUERIES * 5, 4)


def test_published_names_are_written_from_our_files(tmp_path, assert_close):
    done = convert(own_file(tmp_path), tmp_path / "facebook.safetensors", to="facebook")
    assert done.layout.name == "facebook_detr"
    save_file(to_layout(*made("toy_detr"), LAYOUTS["facebook_detr"]), tmp_path / "wanted.safetensors")
    found, wanted = (eqvision.load("toy_detr", tmp_path / f"{n}.safetensors")[0] for n in ("facebook", "wanted"))
    assert_close(found, wanted, 0)
