"""transformers' ViT, MAE, DeiT and DINOv2: built small with random numbers, saved, loaded here, and compared."""

import functools
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvision.backbones.vit import SIZES, ViTSize
from eqvision.classifiers import vit_classifier
from eqvision.names import UnknownNameError
from eqvision.pretrained import LAYOUTS, WeightsError, load, to_layout
from eqvision.pretrained.layouts.vit_hf import config_options
from eqvision.zoo import MODELS

WIDTH, PATCH, SIDE, CLASSES = 32, 8, 32, 5
TOLERANCE = 1e-5

COMMON = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
    "num_labels": CLASSES,
}
PLAIN = {**COMMON, "intermediate_size": 64}
toy = functools.partial(vit_classifier, "toy_hf", PATCH)
toy_dinov2 = functools.partial(toy, layer_scale=1.0, pool="token_mean")
toy_deit = functools.partial(toy, distillation_token=True)

# test id: (layout, transformers' config, its options, transformers' model, our builder)
CLASSIFIERS = {
    "vit": ("hf_vit", "ViTConfig", PLAIN, "ViTForImageClassification", toy),
    "vit_no_bias": ("hf_vit", "ViTConfig", {**PLAIN, "qkv_bias": False}, "ViTForImageClassification", toy),
    # the GELU and an eps that is large enough to be seen, from config.json
    "vit_config": (
        "hf_vit",
        "ViTConfig",
        {**PLAIN, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 0.1},
        "ViTForImageClassification",
        toy,
    ),
    "deit": ("hf_deit", "DeiTConfig", PLAIN, "DeiTForImageClassification", toy_deit),
    "deit_distilled": ("hf_deit_distilled", "DeiTConfig", PLAIN, "DeiTForImageClassificationWithTeacher", toy_deit),
    "dinov2": (
        "hf_dinov2",
        "Dinov2Config",
        {**COMMON, "mlp_ratio": 2},
        "Dinov2ForImageClassification",
        toy_dinov2,
    ),
    # 32 * 3 * 2 / 3 = 64 features behind the gate
    "dinov2_gated": (
        "hf_dinov2",
        "Dinov2Config",
        {**COMMON, "mlp_ratio": 3, "use_swiglu_ffn": True},
        "Dinov2ForImageClassification",
        functools.partial(toy_dinov2, mlp="swiglu"),
    ),
    "dinov2_registers": (
        "hf_dinov2_registers",
        "Dinov2WithRegistersConfig",
        {**COMMON, "mlp_ratio": 2, "num_register_tokens": 3},
        "Dinov2WithRegistersForImageClassification",
        functools.partial(toy_dinov2, num_registers=3),
    ),
}
MAE = {**PLAIN, "mask_ratio": 0.0, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1}
MAE |= {"decoder_num_attention_heads": 2, "decoder_intermediate_size": 32}
BACKBONES = {
    "vit": ("hf_vit_backbone", "ViTConfig", PLAIN, "ViTModel", toy),
    "msn": ("hf_vit_backbone", "ViTMSNConfig", PLAIN, "ViTMSNModel", toy),
    "mae": ("hf_vit_backbone", "ViTMAEConfig", MAE, "ViTMAEModel", toy),
    "mae_pretraining": ("hf_vit", "ViTMAEConfig", MAE, "ViTMAEForPreTraining", toy),
    "dinov2": ("hf_dinov2_backbone", "Dinov2Config", {**COMMON, "mlp_ratio": 2}, "Dinov2Model", toy_dinov2),
    "dinov2_registers": (
        "hf_dinov2_registers_backbone",
        "Dinov2WithRegistersConfig",
        {**COMMON, "mlp_ratio": 2, "num_register_tokens": 4},
        "Dinov2WithRegistersModel",
        functools.partial(toy_dinov2, num_registers=4),
    ),
}


@pytest.fixture
def rows(monkeypatch):
    """``rows(builder)`` makes a zoo row ``toy_hf`` of a builder."""
    monkeypatch.setitem(SIZES, "toy_hf", ViTSize(WIDTH, 3, 2, 64))
    return lambda builder: monkeypatch.setitem(MODELS, "toy_hf", builder)


def theirs(config: str, options: dict, model: str, *, seed: int = 0):
    """transformers' model with random numbers everywhere, norms around one, in evaluation mode."""
    import torch
    import transformers

    reference = getattr(transformers, model)(getattr(transformers, config)(**options)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in reference.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            value.copy_(around + 0.2 * noise)
    return reference


def images(rng, height: int = SIDE, width: int = SIDE):
    return rng.standard_normal((2, height, width, 3)).astype(np.float32)


def to_torch(batch):
    import torch

    return torch.from_numpy(batch.transpose(0, 3, 1, 2).copy())


def tokens(features) -> np.ndarray:
    """Our token features in their order: prefix, then patches row by row."""
    b, h, w, d = features.patches.shape
    return np.concatenate([features.prefix, np.reshape(features.patches, (b, h * w, d))], axis=1)


@pytest.mark.parity
@pytest.mark.parametrize("case", CLASSIFIERS)
def test_classifier_gives_the_numbers_of_transformers(case, rows, rng, tmp_path, assert_close):
    import torch

    layout, config, options, name, builder = CLASSIFIERS[case]
    reference = theirs(config, options, name)
    reference.save_pretrained(tmp_path)
    rows(builder)
    model, state = load("toy_hf", tmp_path)
    batch = images(rng)
    with torch.no_grad():
        outputs = reference(to_torch(batch), output_hidden_states=True)
    logits, _ = model(jnp.asarray(batch), state)
    assert_close(logits, outputs.logits, TOLERANCE)
    hidden = model.backbone.intermediates(jnp.asarray(batch), state, (0, 1, 2), normalise=False)
    assert_close([tokens(each) for each in hidden], [np.asarray(each) for each in outputs.hidden_states[1:]], TOLERANCE)
    assert layout in LAYOUTS


@pytest.mark.parity
@pytest.mark.parametrize("case", BACKBONES)
def test_backbone_gives_the_tokens_of_transformers(case, rows, rng, tmp_path, assert_close):
    import torch

    _, config, options, name, builder = BACKBONES[case]
    reference = theirs(config, options, name)
    reference.save_pretrained(tmp_path)
    rows(builder)
    model, state = load("toy_hf", tmp_path, num_classes=CLASSES)
    batch = images(rng)
    # without masking MAE still shuffles patches; noise that rises keeps their order
    order = {"noise": torch.linspace(0, 1, 16).expand(2, 16)} if case.startswith("mae") else {}
    backbone = reference.vit if case == "mae_pretraining" else reference
    with torch.no_grad():
        expected = backbone(to_torch(batch), **order).last_hidden_state
    features, _ = model.features(jnp.asarray(batch), state)
    assert_close(tokens(features), expected.numpy(), TOLERANCE)


@pytest.mark.parity
@pytest.mark.parametrize("size", [(48, 48), (24, 24), (40, 64)])
@pytest.mark.parametrize("case", ["vit", "deit_distilled", "dinov2", "dinov2_registers"])
def test_another_image_size_is_resampled_as_in_transformers(case, size, rows, rng, tmp_path, assert_close):
    import torch

    _, config, options, name, builder = CLASSIFIERS[case]
    reference = theirs(config, options, name)
    reference.save_pretrained(tmp_path)
    rows(builder)
    model, state = load("toy_hf", tmp_path, image_size=size)
    assert model.backbone.position.weight.shape == (size[0] // PATCH, size[1] // PATCH, WIDTH)
    batch = images(rng, *size)
    extra = {} if case.startswith("dinov2") else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        expected = reference(to_torch(batch), **extra).logits
    assert_close(model(jnp.asarray(batch), state)[0], expected.numpy(), TOLERANCE)


@pytest.mark.parity
@pytest.mark.slow
def test_vit_b16_at_384_from_a_file_of_224(rng, tmp_path, assert_close):
    import torch

    reference = theirs("ViTConfig", {"num_labels": CLASSES}, "ViTForImageClassification")
    with torch.no_grad():  # a width of 768 with numbers of 0.2 saturates the softmax
        for value in reference.parameters():
            value.mul_(0.2 if value.ndim == 2 else 1.0)
    reference.save_pretrained(tmp_path)
    model, state = load("vit_b16", tmp_path, image_size=384)
    batch = images(rng, 384, 384)[:1]
    with torch.no_grad():
        expected = reference(to_torch(batch), interpolate_pos_encoding=True).logits
    assert_close(model(jnp.asarray(batch), state)[0], expected.numpy(), TOLERANCE)


@pytest.mark.parity
@pytest.mark.parametrize("case", CLASSIFIERS)
def test_saved_in_their_names_gives_the_same_numbers_there(case, rows, rng, tmp_path, assert_close):
    import torch
    import transformers
    from safetensors.numpy import save_file

    layout, config, options, name, builder = CLASSIFIERS[case]
    reference = theirs(config, options, name, seed=1)
    reference.save_pretrained(tmp_path)
    rows(builder)
    tensors = to_layout(*load("toy_hf", tmp_path), LAYOUTS[layout])
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again, report = getattr(transformers, name).from_pretrained(tmp_path, output_loading_info=True)
    # DINOv2's token for masked patches is used in its training only, and our models have none
    assert [key for key in report["missing_keys"] if not key.endswith("mask_token")] == []
    assert list(report["unexpected_keys"]) == []
    batch = to_torch(images(rng))
    with torch.no_grad():
        assert_close(again.eval()(batch).logits.numpy(), reference(batch).logits.numpy(), TOLERANCE)


@pytest.mark.parity
@pytest.mark.parametrize("case", ["vit", "deit_distilled", "dinov2_gated"])
def test_gradients_are_those_of_transformers(case, rows, rng, tmp_path, assert_close):
    import torch
    from safetensors.numpy import load_file

    layout, config, options, name, builder = CLASSIFIERS[case]
    reference = theirs(config, options, name)
    reference.save_pretrained(tmp_path)
    rows(builder)
    model, state = load("toy_hf", tmp_path)
    batch, weights = images(rng), rng.standard_normal((2, CLASSES)).astype(np.float32)
    ours = to_layout(_gradient(model, state, jnp.asarray(batch), jnp.asarray(weights)), state, LAYOUTS[layout])
    (reference(to_torch(batch)).logits * torch.from_numpy(weights)).sum().backward()
    with torch.no_grad():  # the gradients saved as if they were parameters: under the published names
        for value in reference.parameters():
            value.copy_(torch.zeros_like(value) if value.grad is None else value.grad)
    reference.save_pretrained(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    # the gradients of key biases are zero but for rounding: a softmax does not change with them
    used = {name: array for name, array in expected.items() if name in ours and not name.endswith("key.bias")}
    assert_close({name: ours[name] for name in used}, used, TOLERANCE)


def _gradient(model, state, batch, weights):
    return eqx.filter_grad(lambda m: jnp.sum(m(batch, state)[0] * weights))(model)


@pytest.mark.parity
def test_the_pooler_is_the_pre_logits_of_a_model_that_has_them(rows, rng, tmp_path, assert_close):
    import torch

    reference = theirs("ViTConfig", PLAIN, "ViTModel")
    reference.save_pretrained(tmp_path)
    rows(functools.partial(toy, pre_logits=WIDTH))
    model, state = load("toy_hf", tmp_path, num_classes=3)
    batch = images(rng)
    with torch.no_grad():
        expected = reference(to_torch(batch)).pooler_output
    assert_close(model.pooled(jnp.asarray(batch), state), expected.numpy(), TOLERANCE)


def _write(folder, model, state, layout: str, prefix: str = ""):
    from safetensors.numpy import save_file

    save_file({prefix + name: array for name, array in to_layout(model, state, LAYOUTS[layout]).items()}, folder)
    return folder


def _built(builder, key):
    return eqx.nn.make_with_state(builder)(num_classes=CLASSES, image_size=SIDE, in_channels=3, key=key)


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_exactly_one_layout_recognises_a_file(case, rows, key):
    layout, _, _, _, builder = CLASSIFIERS[case]
    rows(builder)
    options = {"distilled_head": False} if case == "deit" else {}
    names = to_layout(*_built(functools.partial(builder, **options), key), LAYOUTS[layout])
    assert [each.name for each in LAYOUTS.values() if each.recognises(names)] == [layout]


@pytest.mark.parametrize("case", BACKBONES)
def test_exactly_one_layout_recognises_a_backbone(case, rows, key):
    layout, _, _, _, builder = BACKBONES[case]
    rows(builder)
    names = [name for name in to_layout(*_built(builder, key), LAYOUTS[layout]) if not name.startswith("classifier")]
    assert [each.name for each in LAYOUTS.values() if each.recognises(names)] == [layout]


def test_a_backbone_without_a_head_asks_for_the_number_of_classes(rows, key, tmp_path):
    from safetensors.numpy import save_file

    rows(toy)
    tensors = to_layout(*_built(toy, key), LAYOUTS["hf_vit_backbone"])
    tensors = {name: array for name, array in tensors.items() if not name.startswith("classifier")}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"no classification layer .*classifier.bias.*give num_classes"):
        load("toy_hf", tmp_path)


def test_a_distilled_file_is_not_read_into_a_plain_model(rows, key, tmp_path):
    rows(toy_deit)
    file = _write(tmp_path / "model.safetensors", *_built(toy_deit, key), "hf_deit_distilled")
    rows(toy)
    with pytest.raises(WeightsError, match=r"hf_deit_distilled .*which toy_hf is not a model of"):
        load("toy_hf", file)


def test_registers_that_the_model_lacks_are_named(rows, key, tmp_path):
    builder = functools.partial(toy_dinov2, num_registers=3)
    rows(builder)
    file = _write(tmp_path / "model.safetensors", *_built(builder, key), "hf_dinov2_registers")
    rows(toy_dinov2)
    with pytest.raises(WeightsError, match=r"belong to no part of this model.*\n.*embeddings.register_tokens"):
        load("toy_hf", file)


def test_options_of_a_config():
    assert config_options({}, 1e-12) == {"eps": 1e-12, "activation": "gelu", "use_qkv_bias": True}
    given = {"layer_norm_eps": 1e-5, "hidden_act": "gelu_new", "qkv_bias": False}
    assert config_options(given, 1e-12) == {"eps": 1e-5, "activation": "gelu_tanh", "use_qkv_bias": False}
    with pytest.raises(UnknownNameError, match=r"hidden_act of config.json 'gelu_nwe'.*gelu_new"):
        config_options({"hidden_act": "gelu_nwe"}, 1e-12)


def test_another_number_of_heads_in_the_config_is_an_error(rows, key, tmp_path):
    """No tensor shows it, and the numbers would be others."""
    rows(toy)
    file = _write(tmp_path / "model.safetensors", *_built(toy, key), "hf_vit")
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 4}))
    with pytest.raises(WeightsError, match=r"num_attention_heads = 4, expected 2"):
        load("toy_hf", file)
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 2}))
    load("toy_hf", file)


def test_without_a_config_the_eps_is_that_of_transformers(rows, key, tmp_path):
    rows(toy)
    file = _write(tmp_path / "model.safetensors", *_built(toy, key), "hf_vit")
    model, _ = load("toy_hf", file)
    assert model.backbone.norm.eps == 1e-12
    assert jax.tree.leaves(model.backbone.encoder.blocks)  # loaded, and stacked over depth
    assert model.backbone.encoder.blocks.norm1.eps == 1e-12
