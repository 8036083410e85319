"""Published R-CNNs and CenterNets, used: how images are prepared for them, what is found, pictures, programs."""

import dataclasses
import json
from pathlib import Path

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
import rcnn_names
from images import noise
from PIL import Image
from test_pretrained_centernet import ROWS as CENTERNETS
from test_pretrained_centernet import published as published_centernet
from test_pretrained_rcnn import DEPTH, ROWS
from test_pretrained_rcnn import published as published_rcnn

from eqvision import cli
from eqvision.backbones.resnet import DEPTHS
from eqvision.detectors import decode_centers, decode_sigmoid, decode_softmax, find_objects, found_in
from eqvision.export import load_exported
from eqvision.export.card import ModelFile
from eqvision.export.detector_card import detector_card
from eqvision.export.stablehlo import export_stablehlo
from eqvision.losses import CenterNetConfig, RCNNLossConfig
from eqvision.published_detector import load_published_detector
from eqvision.types import CenterPredictions, Detections, PaddedImages, SetPredictions
from eqvision.zoo import DETECTORS


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    monkeypatch.setitem(DEPTHS, DEPTH, (rcnn_names.TOY.blocks, True))
    for name, row in {**ROWS, **CENTERNETS}.items():
        monkeypatch.setitem(DETECTORS, name, row)


def saved(path, tensors):
    np.savez(path / "weights.npz", **tensors)
    return path / "weights.npz"


def tame(tensors):
    """Small weights, and variances above 0: what comes out is finite."""
    return {name: 0.05 * x if x.ndim > 1 else abs(x) for name, x in tensors.items()}


# What a model says -> objects


def inputs_of(height=8, width=12):
    return PaddedImages(jnp.zeros((1, height, width, 3)), jnp.array([[height, width]]))


@pytest.mark.slow
def test_every_kind_of_prediction_is_decoded(rng, assert_close):
    inputs, size = inputs_of(), jnp.array([[16, 36]])
    logits, boxes = rng.normal(size=(2, 1, 4, 3)).astype(np.float32), rng.random((2, 1, 4, 4)).astype(np.float32)
    sets = SetPredictions(jnp.asarray(logits), jnp.asarray(boxes))
    assert_close(found_in(sets, inputs, size, softmax=True), decode_softmax(sets, size), 0)
    assert_close(found_in(sets, inputs, size, count=5), decode_sigmoid(sets, size, 5), 0)
    maps = (rng.normal(size=(1, 1, 2, 3, k)).astype(np.float32) for k in (3, 2, 2))
    centers = CenterPredictions(*map(jnp.asarray, maps))
    assert_close(found_in(centers, inputs, size, count=2), decode_centers(centers, inputs.size, size, count=2), 0)
    labels, valid = jnp.array([[1]]), jnp.array([[True]])
    found = Detections(jnp.array([[[1.0, 2, 3, 4]]]), jnp.array([[0.5]]), labels, valid, jnp.ones((1, 1, 28, 28)))
    scaled = found_in(found, inputs, size)
    np.testing.assert_allclose(scaled.boxes, [[[3, 4, 9, 8]]])
    assert scaled.masks is found.masks


def test_a_classifiers_logits_are_no_objects():
    with pytest.raises(TypeError, match=r"gives .*; expected SetPredictions .* or Detections .*: is it a detector\?"):
        found_in(jnp.zeros((1, 3)), inputs_of(), jnp.array([[8, 12]]))


def test_the_stride_is_the_models(rng):
    """Of a CenterNet whose maps are not of stride 4."""

    class Wide(eqx.Module):
        stride: int = eqx.field(static=True, default=8)

        def __call__(self, inputs, state):
            maps = (jnp.zeros((1, 1, 1, 2, 2)).at[0, 0, 0, 1, 0].set(3.0), jnp.ones((1, 1, 1, 2, 2)))
            return CenterPredictions(*maps, jnp.full((1, 1, 1, 2, 2), 0.5)), state

    inputs = inputs_of(8, 16)
    found = find_objects(Wide(), inputs, eqx.nn.State(Wide()), inputs.size, count=1)
    np.testing.assert_allclose(found.boxes, [[[8, 0, 16, 8]]])


# Files of weights


@pytest.mark.parametrize(("file", "name"), [("torchvision_mask", "mask"), ("detectron2_mask", "mask"),
                                            ("mmdet_cascade", "cascade")])  # fmt: skip
def test_images_are_prepared_as_is_usual_for_the_layout(file, name, tmp_path, rng, capsys):
    run = load_published_detector(name, saved(tmp_path, published_rcnn(file, rng)))
    data, layout = run.config.data, f"{file.partition('_')[0]}_rcnn"
    assert (data.transform, data.scales, data.longest, data.size) == ("detr", (800,), 1333, (1344, 1344))
    assert data.mean == (0.485, 0.456, 0.406)
    assert data.std == ((1 / 255,) * 3 if "detectron2" in file else (0.229, 0.224, 0.225))
    assert isinstance(run.config.task, RCNNLossConfig)
    assert run.config.model.dialect == (None if "torchvision" in file else file.partition("_")[0])
    printed = capsys.readouterr().err
    assert f"images are prepared as is usual for layout {layout}: shorter side 800, longer at most 1333" in printed


def test_centernets_see_what_fits_into_512_pixels(tmp_path, rng, capsys):
    run = load_published_detector("resnet", saved(tmp_path, published_centernet("resnet", rng)))
    data = run.config.data
    assert (data.scales, data.longest, data.size) == ((512,), 512, (512, 512))
    np.testing.assert_allclose(data.mean, (0.4703, 0.4472, 0.4079), atol=5e-5)  # red, green, blue
    np.testing.assert_allclose(data.std, (0.2781, 0.2741, 0.2886), atol=5e-5)
    assert run.config.task == CenterNetConfig()
    assert "usual for layout centernet_resnet: shorter side 512, longer at most 512" in capsys.readouterr().err


def test_what_lies_beside_the_weights_comes_first(tmp_path, rng):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 320, "max_size": 640, "image_std": [0.25]}))
    names = {str(number): name for number, name in enumerate(("ant", "bee", "cat"))}
    (tmp_path / "config.json").write_text(json.dumps({"id2label": names}))
    run = load_published_detector("mask", saved(tmp_path, published_rcnn("detectron2_mask", rng)))
    data = run.config.data
    assert (data.scales, data.longest, data.std) == ((320,), 640, (0.25,))
    assert run.class_names == ("ant", "bee", "cat")


def test_a_published_file_is_known_by_its_name(tmp_path, rng, capsys, monkeypatch):
    monkeypatch.setitem(DETECTORS, "mask_rcnn_r50_fpn", ROWS["mask"])
    file = saved(tmp_path, published_rcnn("detectron2_mask", rng)).rename(tmp_path / "model_final_f10217.pkl")
    data = load_published_detector("mask_rcnn_r50_fpn", file).config.data
    assert data.std == (1 / 255,) * 3
    assert "images are prepared by card detectron2_3x: shorter side 800" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("file", "name"), [("torchvision_2019_mask", "mask"), ("detectron2_cascade", "cascade_mask"),
                                            ("resnet", "resnet")])  # fmt: skip
def test_published_weights_by_the_command_line(file, name, tmp_path, rng, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors = tame(published_centernet("resnet", rng) if file == "resnet" else published_rcnn(file, rng))
    image = tmp_path / "image.png"
    Image.fromarray(noise((40, 60, 3))).save(image)
    options = ["--weights", str(saved(tmp_path, tensors)), "--image-size", "64", "--threshold", "0", "--top", "2"]
    cli.main(["predict", name, str(image), *options])
    printed = capsys.readouterr()
    assert "images are prepared as is usual for layout" in printed.err
    assert printed.out.startswith(f"{image}: 2 objects of score 0 or more  -> predictions/{name}/image.png\n  class ")
    assert Path(f"predictions/{name}/image.png").exists()


# Programs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mask", "resnet"])
def test_a_program_finds_what_the_model_finds(name, tmp_path, rng, assert_close):
    tensors = published_centernet(name, rng) if name == "resnet" else published_rcnn("torchvision_mask", rng)
    run = load_published_detector(name, saved(tmp_path, tame(tensors)))
    card = detector_card(run, "a test", {}, num_classes=len(run.class_names))
    card = dataclasses.replace(card, image_size=(64, 96))
    source, file = ModelFile(run.model, run.stats, card), tmp_path / "detector.stablehlo"
    program = export_stablehlo(source, file, normalize=False, platforms=("cpu",))
    assert program.output == "float32[b, 100, 4], float32[b, 100], int32[b, 100]"
    size = np.array([[64, 96], [40, 80]], np.int32)
    inside = (np.arange(64)[None, :, None] < size[:, :1, None]) & (np.arange(96)[None, None] < size[:, 1:, None])
    pixels = np.where(inside[..., None], rng.normal(size=(2, 64, 96, 3)), 0).astype(np.float32)
    found = load_exported(file)(pixels, size)
    inputs = PaddedImages(jnp.asarray(pixels), jnp.asarray(size))
    expected = eqx.filter_jit(find_objects)(run.model, inputs, run.stats, inputs.size)
    assert np.asarray(expected.valid).any()
    np.testing.assert_array_equal(found.valid, expected.valid)
    assert_close(found.scores, expected.scores, 1e-5)
    same = np.asarray(found.labels == expected.labels)
    assert same.mean() > 0.98  # where scores are equal but for rounding, objects may change places
    kept = np.where(same[..., None], np.asarray(found.boxes), np.asarray(expected.boxes))
    assert_close(jnp.asarray(kept), expected.boxes, 1e-4)
