"""Layouts of DETR there and back; test_detr_parity.py has the numbers."""

import dataclasses

import numpy as np
import pytest
from detr_references import CLASSES, TOYS, made

import eqvision
from eqvision.export import export_safetensors
from eqvision.export.card import Card, ModelFile
from eqvision.pretrained import LAYOUTS, WeightsError, to_layout
from eqvision.pretrained.leaf_names import named_tensors
from eqvision.zoo import DETECTORS


@pytest.fixture
def toys(monkeypatch):
    for name, row in TOYS.items():
        monkeypatch.setitem(DETECTORS, name, row)


DETR_LAYOUTS = [
    ("facebook_detr", "toy_detr"),
    ("facebook_detr", "toy_detr_pre"),
    ("facebook_detr_panoptic", "toy_detr_panoptic"),
    ("hf_detr", "toy_detr"),
    ("hf_detr_no_timm", "toy_detr"),
    ("hf_detr_panoptic", "toy_detr_panoptic"),
    ("hf_detr_panoptic_no_timm", "toy_detr_panoptic"),
    ("scenic_detr", "toy_detr"),
    ("scenic_detr", "toy_detr_pre"),
]


@pytest.mark.parametrize(("layout", "name"), DETR_LAYOUTS)
def test_every_layout_there_and_back(layout, name, tmp_path, toys, assert_close):
    model, state = made(name)
    tensors = to_layout(model, state, LAYOUTS[layout])
    assert [each for each in LAYOUTS if LAYOUTS[each].recognises(tensors)] == [layout]
    np.savez(tmp_path / "detr.npz", **tensors)
    again, state = eqvision.load(name, tmp_path / "detr.npz")
    assert_close(named_tensors(again, state), named_tensors(model, state), 0)
    assert again.encoder.layers.norm1.eps == (1e-6 if layout == "scenic_detr" else 1e-5)


def test_trained_batch_norms_have_the_same_names(tmp_path, toys):
    model, state = made("toy_detr", norm="batch")
    trained = to_layout(model, state, LAYOUTS["facebook_detr"])
    frozen = to_layout(*made(), LAYOUTS["facebook_detr"])
    assert {name: array.shape for name, array in trained.items()} == {n: a.shape for n, a in frozen.items()}


def test_no_layout_of_classifiers_describes_a_detector_with_their_backbone():
    model, _ = made()
    assert {name for name, each in LAYOUTS.items() if each.describes(model)} == {
        "eqvision", "facebook_detr", "hf_detr", "hf_detr_no_timm", "scenic_detr"
    }  # fmt: skip


def test_scenics_no_object_is_first_there_and_last_here():
    model, state = made()
    theirs = to_layout(model, state, LAYOUTS["scenic_detr"])["ObjectClassPredictor_0/Dense_0/bias"]
    np.testing.assert_array_equal(theirs[1:], model.head.classes.bias[:-1])
    assert theirs[0] == model.head.classes.bias[-1]


@pytest.mark.parametrize(("name", "norms"), [("toy_detr", {"0"}), ("toy_detr_pre", {"0", "1"})])
def test_scenics_names_as_its_own_program_writes_them(name, norms):
    """Checked against scenic/projects/baselines/detr/model.py run on Flax: outputs equal to 2.4e-7 of their scale."""
    tensors = to_layout(*made(name), LAYOUTS["scenic_detr"])
    outer = {
        each.split("/")[1].removeprefix("LayerNorm_") for each in tensors if each.startswith("DETRTransformer_0/L")
    }
    assert outer == norms
    for theirs, shape in {
        "DETRTransformer_0/encoder/encoderblock_1/MultiHeadDotProductAttention_0/query/kernel": (32, 4, 8),
        "DETRTransformer_0/decoder/decoderblock_2/MultiHeadDotProductAttention_1/out/kernel": (4, 8, 32),
        "DETRTransformer_0/decoder/decoderblock_2/LayerNorm_2/scale": (32,),
        "DETRTransformer_0/decoder/decoderblock_0/MlpBlock_0/Dense_1/kernel": (64, 32),
        "backbone/ResidualBlock_4/conv3/kernel": (1, 1, 8, 32),
        "batch_stats/backbone/ResidualBlock_3/proj_bn/var": (32,),
        "Conv_0/kernel": (1, 1, 32, 32),
        "BBoxCoordPredictor_0/Dense_2/bias": (4,),
    }.items():
        assert tensors[theirs].shape == shape


def test_other_classes_get_a_fresh_layer_and_keep_the_boxes(tmp_path, toys):
    model, state = made()
    np.savez(tmp_path / "detr.npz", **to_layout(model, state, LAYOUTS["facebook_detr"]))
    other, _ = eqvision.load("toy_detr", tmp_path / "detr.npz", num_classes=2)
    assert other.head.classes.weight.shape == (32, 3)
    np.testing.assert_array_equal(other.head.boxes.layers[2].weight, model.head.boxes.layers[2].weight)
    with pytest.raises(WeightsError, match=r"no classification layer \(it would be detr\.class_embed\.bias"):
        eqvision.load("toy_detr_panoptic", tmp_path / "detr.npz", layout="facebook_detr_panoptic")


def test_own_files_of_detectors(tmp_path, toys, assert_close):
    model, state = made()
    fields = {field.name: None for field in dataclasses.fields(Card) if field.default is dataclasses.MISSING}
    given = {"model": "toy_detr", "num_classes": CLASSES, "image_size": (64, 64), "in_channels": 3, "options": {}}
    card = Card(**{**fields, **given, "class_names": (), "task": "single_label", "mean": (0.5,), "std": (0.5,),
                   "interpolation": "bilinear", "crop_fraction": 1.0, "origin": "test", "versions": {}})  # fmt: skip
    export_safetensors(ModelFile(model, state, card), tmp_path / "detr.safetensors")
    again, _ = eqvision.load("toy_detr", tmp_path / "detr.safetensors")
    assert_close(named_tensors(again, state), named_tensors(model, state), 0)
    fewer, _ = eqvision.load("toy_detr", tmp_path / "detr.safetensors", num_classes=2)
    assert fewer.head.classes.bias.shape == (3,)
