"""What the strict loader says of files that do not fit a model. Nothing here needs another library."""

import functools
import logging

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import eqvision
from eqvision.backbones import SIZES, ViTSize
from eqvision.classifiers import vit_classifier
from eqvision.pretrained import LAYOUTS, to_layout
from eqvision.zoo import MODELS


@pytest.fixture(autouse=True)
def _toys(monkeypatch):
    """``toy`` has two blocks, ``deep_toy`` three."""
    monkeypatch.setitem(SIZES, "toy", ViTSize(16, 2, 2, 32))
    monkeypatch.setitem(SIZES, "deep_toy", ViTSize(16, 3, 2, 32))
    for name in ("toy", "deep_toy"):
        monkeypatch.setitem(MODELS, name, functools.partial(vit_classifier, name, 8))


@pytest.fixture
def tensors():
    return to_layout(*eqvision.create("toy", num_classes=5, image_size=16, key=jax.random.key(0)), LAYOUTS["timm_vit"])


@pytest.fixture
def write(tmp_path):
    def write(tensors):
        save_file(tensors, tmp_path / "model.safetensors")
        return tmp_path / "model.safetensors"

    return write


def test_what_fits_is_loaded_in_silence(tensors, write, caplog):
    with caplog.at_level(logging.INFO, "eqvision.pretrained"):
        model, state = eqvision.load("toy", write(tensors))
    assert caplog.text == ""
    again = to_layout(model, state, LAYOUTS["timm_vit"])
    assert all(np.array_equal(tensors[name], again[name]) for name in {**tensors, **again})


def test_a_file_with_fewer_blocks_names_the_first_tensors_that_it_lacks(tensors, write):
    message = r"does not hold this model .*timm_vit.*\n12 tensors are missing:(\n  blocks\.2\..*){5}\n  and 7 more"
    with pytest.raises(eqvision.WeightsError, match=message):
        eqvision.load("deep_toy", write(tensors))


def test_a_file_with_more_blocks_names_the_first_tensors_that_are_left(write):
    deep = eqvision.create("deep_toy", num_classes=5, image_size=16, key=jax.random.key(0))
    message = r"12 tensors belong to no part of this model:(\n  blocks\.2\..*){5}\n  and 7 more"
    with pytest.raises(eqvision.WeightsError, match=message):
        eqvision.load("toy", write(to_layout(*deep, LAYOUTS["timm_vit"])))


def test_one_tensor_too_many_is_not_overlooked(tensors, write):
    with pytest.raises(eqvision.WeightsError, match=r"1 tensors belong to no part of this model:\n  blocks\.0\.extra"):
        eqvision.load("toy", write(tensors | {"blocks.0.extra": np.zeros(3, np.float32)}))


def test_other_shapes_are_named_with_both_sizes(tensors, write, monkeypatch):
    monkeypatch.setitem(SIZES, "toy", ViTSize(16, 2, 2, 64))
    message = (
        r"3 leaves differ:\n  backbone\.encoder\.blocks\.mlp\.fc1\.weight: \(2, 16, 32\) in the file, \(2, 16, 64\)"
    )
    with pytest.raises(eqvision.WeightsError, match=message):
        eqvision.load("toy", write(tensors))


@pytest.mark.parametrize("kind", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_other_types_are_converted_with_a_warning(kind, tensors, write, caplog):
    narrow = {name: array.astype(kind) for name, array in tensors.items()}
    with caplog.at_level(logging.WARNING, "eqvision.pretrained"):
        model, _ = eqvision.load("toy", write(narrow))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(model))
    assert "leaves are converted to float32:" in caplog.text
    assert caplog.text.count(np.dtype(kind).name) == 5  # the first five are named
    np.testing.assert_array_equal(model.head.linear.bias, narrow["head.bias"].astype(np.float32))


def test_whole_numbers_are_refused(tensors, write):
    wrong = tensors | {"norm.weight": np.ones(16, np.int64)}
    with pytest.raises(eqvision.WeightsError, match=r"1 leaves are not floating.*\n  backbone\.norm\.weight: int64"):
        eqvision.load("toy", write(wrong))


def test_a_file_without_a_last_layer_needs_the_number_of_classes(tensors, write, caplog):
    file = write({name: array for name, array in tensors.items() if not name.startswith("head.")})
    with pytest.raises(
        eqvision.WeightsError, match=r"has no classification layer .*head.bias, head.weight.*num_classes="
    ):
        eqvision.load("toy", file)
    with caplog.at_level(logging.INFO, "eqvision.pretrained"):
        model, _ = eqvision.load("toy", file, num_classes=3)
    assert model.head.linear.weight.shape == (16, 3)
    assert "fresh values for head.linear.weight, head.linear.bias" in caplog.text


def test_a_head_that_is_half_there_is_not_a_backbone_alone(tensors, write):
    del tensors["head.bias"]
    with pytest.raises(eqvision.WeightsError, match=r"1 tensors are missing:\n  head\.bias"):
        eqvision.load("toy", write(tensors), num_classes=3)


def test_a_file_of_another_family(tensors, write):
    with pytest.raises(
        eqvision.WeightsError, match=r"is of layout timm_vit .* which resnet18 is not a model of; it holds:"
    ):
        eqvision.load("resnet18", write(tensors))


def test_a_file_of_no_known_layout_names_the_nearest(write):
    file = write({f"layer.{i}.kernel": np.zeros(2, np.float32) for i in range(7)})
    message = r"no known layout for toy; nearest: .*\(.*\); it holds:(\n  layer\.\d\.kernel){5}\n  and 2 more"
    with pytest.raises(eqvision.WeightsError, match=message):
        eqvision.load("toy", file)


def test_an_unknown_layout_names_the_nearest(tensors, write):
    with pytest.raises(eqvision.UnknownNameError, match=r"layout 'tim_vit' does not exist; nearest: timm_vit"):
        eqvision.load("toy", write(tensors), layout="tim_vit")


def test_an_unknown_model_names_the_nearest(tensors, write):
    with pytest.raises(eqvision.UnknownNameError, match=r"model 'resnet5O' does not exist; nearest: .*resnet50"):
        eqvision.load("resnet5O", write(tensors))


def test_another_number_of_classes_takes_the_key(tensors, write):
    file = write(tensors)
    one, two = (eqvision.load("toy", file, num_classes=3, key=jax.random.key(i))[0] for i in (1, 2))
    assert not np.array_equal(one.head.linear.weight, two.head.linear.weight)
    np.testing.assert_array_equal(one.backbone.norm.weight, two.backbone.norm.weight)


def test_a_table_that_is_no_square_is_an_error(tensors, write):
    tensors["pos_embed"] = tensors["pos_embed"][:, :-1]
    with pytest.raises(eqvision.WeightsError, match=r"pos_embed \(1, 4, 16\)"):
        eqvision.load("toy", write(tensors))
