"""ViT weights in facebookresearch's names: DeiT, MAE and DINOv2, against timm's readers of these files.

The facts are from deit/models.py, deit/models_v2.py, deit/main.py, mae/models_vit.py, mae/models_mae.py,
mae/util/pos_embed.py, dinov2/models/vision_transformer.py, dinov2/hub/backbones.py and dinov2/hub/classifiers.py.
"""

from typing import Any, NamedTuple

import equinox as eqx
import numpy as np
import pytest
from vit_references import (
    add_toy,
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
    without,
    written,
)

from eqvision.pretrained import LAYOUTS, WeightsError, load, to_layout
from eqvision.pretrained.leaf_names import named_tensors

parity = pytest.mark.parity

MASK = {"mask_token": np.ones((1, 32), np.float32)}
DECODER = {
    "mask_token": np.ones((1, 1, 16), np.float32),
    "decoder_pos_embed": np.ones((1, 17, 16), np.float32),
    "decoder_embed.weight": np.ones((16, 32), np.float32),
    "decoder_embed.bias": np.ones(16, np.float32),
    "decoder_blocks.0.norm1.weight": np.ones(16, np.float32),
    "decoder_norm.weight": np.ones(16, np.float32),
    "decoder_pred.weight": np.ones((48, 16), np.float32),
}


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    add_toys(monkeypatch)


class Facebook(NamedTuple):
    """A backbone of DINOv2: the timm dialect that reads it, and our model and layout."""

    timm: str
    ours: dict[str, Any]
    layout: str


DINOV2 = {
    "plain": Facebook("dinov2", {}, "dinov2_vit"),
    "reg": Facebook("dinov2_reg", {"num_registers": 3}, "dinov2_vit_reg"),
    "giant": Facebook("dinov2_giant", {"mlp": "swiglu"}, "dinov2_vit"),
}
every_dinov2 = pytest.mark.parametrize("name", DINOV2)


@pytest.fixture
def dinov2_toys(monkeypatch):
    for name, row in DINOV2.items():
        options = {"pool": "token_mean", "layer_scale": 1e-5, **row.ours}
        add_toy(monkeypatch, name, options)


def in_dinov2_names(state, gated):
    """timm's tensors as facebookresearch/dinov2 names them, with the two that timm does not keep."""
    tensors = {key: tensor for key, tensor in state.items() if not key.startswith("head.")}
    if gated:
        names = {key: key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3") for key in tensors}
        tensors = {names[key]: tensor for key, tensor in tensors.items()}
    if "reg_token" in tensors:
        position = np.random.default_rng(5).normal(size=(1, 1, 32)).astype(np.float32)
        tensors["register_tokens"] = tensors.pop("reg_token")
        tensors["pos_embed"] = np.concatenate([position, tensors["pos_embed"]], axis=1)
    return {**tensors, "mask_token": np.ones((1, 32), np.float32)}


def read_by_timm(tensors, model):
    """The timm model with a file of facebookresearch's, by timm's own conversion."""
    import torch
    from timm.models.vision_transformer import checkpoint_filter_fn

    converted = checkpoint_filter_fn({key: torch.from_numpy(array) for key, array in tensors.items()}, model)
    missing, unused = model.load_state_dict(converted, strict=False)
    assert set(missing) <= {"head.weight", "head.bias"}
    assert unused == []
    return model


def pooled_by_timm(model, images):
    """Class token and average of the patches, as dinov2/hub/classifiers.py joins them."""
    import torch

    with torch.no_grad():
        tokens = model.forward_features(torch_images(images)).numpy()
    return np.concatenate([tokens[:, 0], tokens[:, model.num_prefix_tokens :].mean(axis=1)], axis=1)


@parity
@every_dinov2
def test_dinov2_equals_what_timm_makes_of_it(name, dinov2_toys, tmp_path, assert_close):
    row, images = DINOV2[name], images_of(16, 16)
    tensors = in_dinov2_names(numpy_state(timm_model(row.timm)), gated=name == "giant")
    reference = read_by_timm(dict(tensors), timm_model(row.timm, seed=3))
    model, state = load(f"toy_{name}", written(tensors, tmp_path), num_classes=7)
    assert_close(our_features(model, state, images), timm_features(reference, images), 1e-5)
    pooled = eqx.filter_jit(lambda m, s, x: m.pooled(x, s))(model, state, images)
    assert_close(pooled, pooled_by_timm(reference, images), 1e-5)
    back = to_layout(model, state, LAYOUTS[row.layout])
    assert back.keys() == (tensors.keys() - {"mask_token"}) | {"head.weight", "head.bias"}
    assert_close({key: back[key] for key in tensors if key != "mask_token"}, without(tensors, "mask_token"), 0)


@parity
@pytest.mark.parametrize("name", ["plain", "reg"])
def test_linear_classifier_of_dinov2(name, dinov2_toys, tmp_path, assert_close, rng):
    reference, images = timm_model(DINOV2[name].timm), images_of(16, 16)
    tensors = in_dinov2_names(numpy_state(reference), gated=False)
    reference = read_by_timm(dict(tensors), reference)
    weight, bias = rng.normal(size=(5, 64)).astype(np.float32), rng.normal(size=5).astype(np.float32)
    hub = {f"backbone.{key}": array for key, array in tensors.items()}
    path = written({**hub, "linear_head.weight": weight, "linear_head.bias": bias}, tmp_path)
    model, state = load(f"toy_{name}", path)
    expected = pooled_by_timm(reference, images) @ weight.T + bias
    assert_close(logits_of(model, state, images), expected, 1e-5)


def test_dinov2_without_number_of_classes(dinov2_toys, tmp_path):
    path = written({**ours_in_layout("plain", "dinov2_vit", "head.weight", "head.bias"), **MASK}, tmp_path)
    with pytest.raises(WeightsError, match=r"has no classification layer \(it would be head.bias, head.weight\)"):
        load("toy_plain", path)


@parity
@pytest.mark.parametrize(("name", "offset"), [("plain", 0.1), ("reg", 0.0)])
def test_dinov2_at_another_size(name, offset, dinov2_toys, tmp_path, assert_close):
    tensors = in_dinov2_names(numpy_state(timm_model(DINOV2[name].timm)), gated=False)
    model, _ = load(f"toy_{name}", written(tensors, tmp_path), num_classes=5, image_size=(24, 20))
    expected = interpolated(tensors["pos_embed"][:, 1:], (6, 5), offset=offset, antialias=offset == 0.0)
    assert_close(model.backbone.position.weight, expected, 1e-5)
    assert_close(model.backbone.class_position, tensors["pos_embed"][0, 0], 0)


def interpolated(table, grid, *, offset=0.0, antialias=False):
    """As ``interpolate_pos_encoding`` of DINOv2 and ``interpolate_pos_embed`` of MAE call it."""
    import torch

    grid_first = torch.from_numpy(table).reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    kind = {"scale_factor": [(side + offset) / 4 for side in grid]} if offset else {"size": grid}
    resized = torch.nn.functional.interpolate(grid_first, mode="bicubic", antialias=antialias, **kind)
    return resized[0].permute(1, 2, 0).numpy()


@parity
@pytest.mark.parametrize("name", ["token", "distilled", "mae_finetuned"])
def test_deit_and_mae_are_resampled_as_there_where_the_layout_is_given(name, tmp_path, assert_close):
    tensors = numpy_state(timm_model(name))
    path = written(tensors, tmp_path)
    prefix = tensors["pos_embed"].shape[1] - 16
    facebook, _ = load(f"toy_{name}", path, image_size=24, layout="facebook_vit")
    timm, _ = load(f"toy_{name}", path, image_size=24)
    plain, antialiased = (interpolated(tensors["pos_embed"][:, prefix:], (6, 6), antialias=a) for a in (False, True))
    assert np.abs(plain - antialiased).max() > 0.01
    assert_close(facebook.backbone.position.weight, plain, 1e-5)
    assert_close(timm.backbone.position.weight, antialiased, 1e-5)


@parity
def test_deit3_in_facebooks_names(tmp_path, assert_close):
    reference, images = timm_model("deit3"), images_of(16, 16)
    theirs = {key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): array
              for key, array in numpy_state(reference).items()}  # fmt: skip
    model, state = load("toy_deit3", written(theirs, tmp_path))
    assert_close(logits_of(model, state, images), timm_logits(reference, images), 1e-5)
    assert_close(to_layout(model, state, LAYOUTS["facebook_deit3"]), theirs, 0)


@parity
def test_mae_with_its_decoder(tmp_path, assert_close):
    """Checkpoints of pre-training: the encoder is that of timm without a head, the decoder is not read."""
    reference, images = timm_model("token"), images_of(16, 16)
    encoder = without(numpy_state(reference), "head.weight", "head.bias")
    path = written({**encoder, **DECODER}, tmp_path)
    model, state = load("toy_token", path, num_classes=3)
    assert_close(our_features(model, state, images), timm_features(reference, images), 1e-5)
    with pytest.raises(WeightsError, match=r"has no classification layer \(it would be head.bias, head.weight\)"):
        load("toy_token", path)


@pytest.mark.parametrize("name", ["linear_plain", "linear_reg", "plain", "reg", "giant"])
def test_dinov2_there_and_back(name, dinov2_toys, tmp_path, assert_close):
    short = name.removeprefix("linear_")
    layout = DINOV2[short].layout.replace("vit", "linear") if "linear" in name else DINOV2[short].layout
    model, state = made(short)
    tensors = to_layout(model, state, LAYOUTS[layout])
    body = "backbone." if "linear" in name else ""
    path = written({**tensors, f"{body}mask_token": MASK["mask_token"]}, tmp_path)
    assert_close(named_tensors(*load(f"toy_{short}", path)), named_tensors(model, state), 0)
