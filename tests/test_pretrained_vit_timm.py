"""ViT weights in timm's names, against timm's own models."""

import functools
import logging

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from vit_references import (
    DIALECTS,
    add_toys,
    images_of,
    logits_of,
    made,
    numpy_state,
    our_features,
    ours_in_layout,
    timm_features,
    timm_logits,
    timm_model,
    torch_images,
    written,
)

from eqvision.classifiers import vit_classifier
from eqvision.pretrained import LAYOUTS, WeightsError, load, to_layout
from eqvision.pretrained.leaf_names import named_tensors
from eqvision.zoo import MODELS

parity = pytest.mark.parity
every_dialect = pytest.mark.parametrize("name", DIALECTS)


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    add_toys(monkeypatch)


# timm


@parity
@every_dialect
def test_logits_and_features_equal_timms(name, tmp_path, assert_close, caplog):
    reference, images = timm_model(name), images_of(16, 16)
    path = written(numpy_state(reference), tmp_path)
    with caplog.at_level(logging.INFO, logger="eqvision.pretrained"):
        model, state = load(f"toy_{name}", path)
    assert caplog.messages == []
    assert_close(logits_of(model, state, images), timm_logits(reference, images), 1e-5)
    if "distilled" in DIALECTS[name].timm:  # timm's intermediates leave the second prefix token among the patches
        return
    assert_close(our_features(model, state, images), timm_features(reference, images), 1e-5)


@parity
@every_dialect
def test_back_in_timms_names(name, tmp_path, assert_close):
    import torch

    path = written(numpy_state(timm_model(name)), tmp_path)
    model, state = load(f"toy_{name}", path)
    tensors = to_layout(model, state, LAYOUTS[DIALECTS[name].layout])
    back = timm_model(name, seed=7)
    back.load_state_dict({key: torch.tensor(array) for key, array in tensors.items()}, strict=True)
    images = images_of(16, 16)
    assert_close(timm_logits(back, images), logits_of(model, state, images), 1e-5)


@parity
@pytest.mark.parametrize("name", ["token", "distilled", "reg_gap", "dinov2_giant"])
def test_gradients_equal_timms(name, tmp_path, assert_close):
    import torch

    reference, images = timm_model(name), images_of(16, 16)
    model, state = load(f"toy_{name}", written(numpy_state(reference), tmp_path))
    weights = np.random.default_rng(2).normal(size=(2, 5)).astype(np.float32)
    (reference(torch_images(images)) * torch.from_numpy(weights)).sum().backward()
    expected = {key: parameter.grad.numpy() for key, parameter in reference.named_parameters()}
    gradient = eqx.filter_jit(eqx.filter_grad(lambda m, x: jnp.sum(m(x, state)[0] * weights)))(model, images)
    actual = to_layout(gradient, state, LAYOUTS[DIALECTS[name].layout])
    assert actual.keys() == expected.keys()
    for key in expected:
        assert_close({key: actual[key]}, {key: expected[key]}, 2e-5)  # sums over 34 tokens in another order


@parity
@pytest.mark.parametrize(
    ("name", "size"),
    [("token", (24, 24)), ("token", (8, 8)), ("token", (32, 20)), ("reg_gap", (24, 24)), ("distilled", (24, 24))],
)
def test_another_size_equals_timms_resampling(name, size, tmp_path, assert_close):
    from timm.models.vision_transformer import checkpoint_filter_fn

    small, large = timm_model(name), timm_model(name, seed=3, img_size=size)
    large.load_state_dict(checkpoint_filter_fn(dict(small.state_dict()), large), strict=True)
    model, state = load(f"toy_{name}", written(numpy_state(small), tmp_path), image_size=size)
    assert model.backbone.position.weight.shape == (size[0] // 4, size[1] // 4, 32)
    images = images_of(*size)
    assert_close(logits_of(model, state, images), timm_logits(large, images), 1e-5)
    assert_close(to_layout(model, state, LAYOUTS[DIALECTS[name].layout])["pos_embed"], positions(large), 1e-5)


def positions(model):
    return model.state_dict()["pos_embed"].numpy()


# Without the originals


def test_positions_of_class_tokens_are_added_where_timm_has_none(tmp_path, assert_close):
    """DINOv2 with registers, from facebookresearch's names to timm's: no_embed_class there."""
    model, state = made("dinov2_reg")
    assert model.backbone.class_position is not None
    path = written(to_layout(model, state, LAYOUTS["timm_vit_reg"]), tmp_path)
    back, _ = load("toy_dinov2_reg", path)
    assert back.backbone.class_position is None
    images = images_of(16, 16)
    assert_close(logits_of(back, state, images), logits_of(model, state, images), 1e-6)


@pytest.mark.parametrize("name", [name for name in DIALECTS if name != "dinov2_reg"])
def test_there_and_back(name, tmp_path, assert_close):
    model, state = made(name)
    layout = DIALECTS[name].layout
    path = written(to_layout(model, state, LAYOUTS[layout]), tmp_path)
    for given in (None, layout):
        assert_close(named_tensors(*load(f"toy_{name}", path, layout=given)), named_tensors(model, state), 0)


def test_both_heads_of_a_distilled_model_are_fresh_for_other_classes(tmp_path, caplog):
    path = written(ours_in_layout("distilled", "timm_vit"), tmp_path)
    with caplog.at_level(logging.INFO, logger="eqvision.pretrained"):
        model, _ = load("toy_distilled", path, num_classes=7)
    assert model.head.linear.weight.shape == model.head.linear_distilled.weight.shape == (32, 7)
    assert np.ptp(model.head.linear.weight) > 0
    assert not np.allclose(model.head.linear.weight, model.head.linear_distilled.weight)
    assert "the layer for 5 classes is dropped" in caplog.text


def test_half_a_head_is_an_error(tmp_path):
    path = written(ours_in_layout("distilled", "timm_vit", "head_dist.weight", "head_dist.bias"), tmp_path)
    with pytest.raises(WeightsError, match=r"2 tensors are missing:\n  head_dist.weight\n  head_dist.bias"):
        load("toy_distilled", path)


@pytest.mark.parametrize(
    ("file", "model", "message"),
    [
        ("distilled", "token", r"belong to no part of this model:\n  dist_token\n  head_dist.bias"),
        ("gap_fc_norm", "gap", r"missing:\n  norm.weight\n  norm.bias.*\n.*of this model:\n  fc_norm.bias"),
        ("mae_finetuned", "gap_fc_norm", r"1 tensors belong to no part of this model:\n  cls_token"),
        ("token", "no_qkv_bias", r"3 tensors belong to no part of this model:\n  blocks.0.attn.qkv.bias"),
        ("dinov2", "token", r"6 tensors belong to no part of this model:\n  blocks.0.ls1.gamma"),
        ("token", "reg_gap", r"tensors are missing:\n  reg_token"),
        (
            "deit3",
            "dinov2",
            r"no legal shape:\n  backbone.class_position, backbone.position.weight from pos_embed",
        ),
    ],
)
def test_a_file_of_another_dialect_is_refused(file, model, message, tmp_path):
    path = written(ours_in_layout(file, DIALECTS[file].layout), tmp_path)
    with pytest.raises(WeightsError, match=message):
        load(f"toy_{model}", path)


def test_registers_in_a_model_without(tmp_path):
    path = written(ours_in_layout("dinov2_reg", "timm_vit_reg"), tmp_path)
    with pytest.raises(WeightsError, match=r"timm VisionTransformer with registers\), which toy_token is not"):
        load("toy_token", path)


def test_timm_computes_the_exact_gelu_whatever_the_row_says(monkeypatch, tmp_path):
    row = functools.partial(vit_classifier, "toy", 4, activation="gelu_tanh", eps=1e-3)
    monkeypatch.setitem(MODELS, "toy_augreg", row)
    model, _ = load("toy_augreg", written(ours_in_layout("token", "timm_vit"), tmp_path))
    assert model.backbone.encoder.blocks.mlp.activation == "gelu"
    assert model.backbone.norm.eps == model.backbone.encoder.blocks.norm1.eps == 1e-6
