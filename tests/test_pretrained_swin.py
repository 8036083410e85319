"""Swin of timm, microsoft, torchvision and transformers: built small with random numbers, saved, loaded, compared."""

import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvision.backbones.swin import SWIN_SIZES, SwinSize, offset_index
from eqvision.classifiers import swin_classifier
from eqvision.names import UnknownNameError
from eqvision.pretrained import LAYOUTS, WeightsError, load, to_layout
from eqvision.pretrained.layouts import swin_hf
from eqvision.zoo import MODELS

WIDTH, DEPTHS, HEADS, WINDOW, CLASSES = 16, (2, 4, 2), (2, 4, 8), 3, 5
TOLERANCE = 1e-5
# Maps that windows divide (the last is one window), that they do not divide, and that one window covers in height.
SIZES = [(48, 48), (60, 76), (48, 96)]


@pytest.fixture
def toy(monkeypatch):
    """``toy(window)`` makes a zoo row ``toy_swin`` with windows of this size."""
    monkeypatch.setitem(SWIN_SIZES, "toy", SwinSize(WIDTH, DEPTHS, HEADS))

    def row(window=WINDOW):
        monkeypatch.setitem(MODELS, "toy_swin", functools.partial(swin_classifier, "toy", window))

    row()
    return row


def disturb(reference, seed=0):
    """Random numbers in all parameters, norms around one, in evaluation mode."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in reference.named_parameters():
            around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            scale = 1.0 if "table" in name else 0.2
            value.copy_(around + scale * torch.randn(value.shape, generator=generator))
    return reference.eval()


def timm_swin(size, window=WINDOW):
    from timm.models.swin_transformer import SwinTransformer

    shape = {"embed_dim": WIDTH, "depths": DEPTHS, "num_heads": HEADS, "window_size": window}
    return disturb(SwinTransformer(img_size=size, num_classes=CLASSES, **shape))


def torchvision_swin(size):
    from torchvision.models import SwinTransformer

    shape = {"embed_dim": WIDTH, "depths": list(DEPTHS), "num_heads": list(HEADS), "window_size": [WINDOW] * 2}
    return disturb(SwinTransformer(patch_size=[4, 4], num_classes=CLASSES, **shape))


def hf_swin(size, name="SwinForImageClassification", **options):
    import transformers

    shape = {"embed_dim": WIDTH, "depths": list(DEPTHS), "num_heads": list(HEADS), "window_size": WINDOW}
    config = transformers.SwinConfig(image_size=list(size), num_labels=CLASSES, **shape, **options)
    return disturb(getattr(transformers, name)(config))


def save_torch(reference, folder):
    from safetensors.torch import save_file

    save_file(reference.state_dict(), folder / "model.safetensors")


def save_hf(reference, folder):
    reference.save_pretrained(folder)


# library: reference by image size, how it writes a file, its layout
LIBRARIES = {
    "timm": (timm_swin, save_torch, "timm_swin"),
    "torchvision": (torchvision_swin, save_torch, "torchvision_swin"),
    "hf": (hf_swin, save_hf, "hf_swin"),
}
every_library = pytest.mark.parametrize("library", LIBRARIES)


def last_blocks(library, reference):
    """What ends each stage, before merging."""
    if library == "timm":
        return [stage.blocks for stage in reference.layers]
    if library == "torchvision":
        return [reference.features[2 * stage + 1] for stage in range(len(DEPTHS))]
    return [stage.blocks[-1] for stage in reference.swin.encoder.layers]


def run_theirs(library, reference, batch):
    """Logits, and the output of each stage."""
    import torch

    found = []
    for module in last_blocks(library, reference):
        module.register_forward_hook(lambda _, __, out: found.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        out = reference(to_torch(batch))
    return (out if library != "hf" else out.logits).numpy(), [each.numpy() for each in found]


def to_torch(batch):
    import torch

    return torch.from_numpy(batch.transpose(0, 3, 1, 2).copy())


def images(rng, size):
    return rng.standard_normal((2, *size, 3)).astype(np.float32)


@jax.jit
def run(model, state, batch):
    return model(batch, state)[0], model.backbone(batch, state)[0]


def compare(library, reference, batch, folder, assert_close):
    LIBRARIES[library][1](reference, folder)
    model, state = load("toy_swin", folder)
    expected, stages = run_theirs(library, reference, batch)
    logits, features = run(model, state, batch)
    assert_close(logits, expected, TOLERANCE)
    assert len(stages) == len(features)
    for ours, theirs in zip(features, stages, strict=True):
        assert_close(np.asarray(ours), theirs.reshape(ours.shape), TOLERANCE)
    return model, state


@pytest.mark.parity
@pytest.mark.parametrize("size", SIZES)
@every_library
def test_logits_and_stages_are_those_of_the_library(library, size, toy, rng, tmp_path, assert_close):
    reference = LIBRARIES[library][0](size)
    model, _ = compare(library, reference, images(rng, size), tmp_path, assert_close)
    assert model.backbone.stages[0].rule == {"hf": "huggingface"}.get(library, library)


@pytest.mark.parity
@pytest.mark.parametrize(("library", "size"), [("torchvision", (32, 20)), ("hf", (58, 75))])
def test_maps_below_a_window_and_images_that_patches_do_not_divide(library, size, toy, rng, tmp_path, assert_close):
    compare(library, LIBRARIES[library][0](size), images(rng, size), tmp_path, assert_close)


@pytest.mark.parity
def test_epsilon_and_activation_of_a_config(toy, rng, tmp_path, assert_close):
    reference = hf_swin((48, 48), hidden_act="gelu_pytorch_tanh", layer_norm_eps=0.1)
    model, _ = compare("hf", reference, images(rng, (48, 48)), tmp_path, assert_close)
    assert (model.head.norm.eps, model.backbone.norm.eps) == (0.1, 1e-5)


@pytest.mark.parity
def test_a_bare_model_of_transformers(toy, rng, tmp_path, assert_close):
    import torch

    reference, batch = hf_swin((48, 48), "SwinModel"), images(rng, (48, 48))
    reference.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"no classification layer \(it would be classifier.bias, classifier.weight"):
        load("toy_swin", tmp_path)
    model, state = load("toy_swin", tmp_path, num_classes=7)
    with torch.no_grad():
        expected = reference(to_torch(batch)).pooler_output
    pooled, logits = jax.jit(lambda m, s, x: (m.pooled(x, s), m(x, s)[0]))(model, state, batch)
    assert_close(pooled, expected.numpy(), TOLERANCE)
    assert logits.shape == (2, 7)


@pytest.mark.parity
def test_files_of_microsoft(toy, rng, tmp_path, assert_close):
    """timm's own reader of that format (``checkpoint_filter_fn``) is the oracle."""
    import torch
    from safetensors.torch import save_file
    from timm.models.swin_transformer import checkpoint_filter_fn

    original, batch = timm_swin((48, 48)), images(rng, (48, 48))
    tensors = {microsoft_name(name): value for name, value in original.state_dict().items()}
    tensors["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(9, 9, dtype=torch.int64)
    tensors["layers.0.blocks.1.attn_mask"] = torch.zeros(16, 9, 9)
    save_file(tensors, tmp_path / "model.safetensors")
    reference = timm_swin((48, 48)).train()
    reference.load_state_dict(checkpoint_filter_fn(tensors, reference))
    with torch.no_grad():
        expected = reference.eval()(to_torch(batch)).numpy()
    model, state = load("toy_swin", tmp_path)
    assert_close(run(model, state, batch)[0], expected, TOLERANCE)
    out = to_layout(model, state, LAYOUTS["microsoft_swin"])
    assert sorted(out) == sorted(name for name in tensors if not name.endswith(("_index", "_mask")))
    assert all(np.array_equal(array, tensors[name].numpy()) for name, array in out.items())


def microsoft_name(name):
    name = re.sub(r"layers\.(\d)\.downsample", lambda found: f"layers.{int(found[1]) - 1}.downsample", name)
    return name.replace("head.fc.", "head.")


@pytest.mark.parity
@every_library
def test_saved_in_their_names_gives_the_same_numbers_there(library, toy, rng, tmp_path, assert_close):
    import torch
    from safetensors.numpy import save_file

    build, save, layout = LIBRARIES[library]
    reference, batch = build((48, 48)), images(rng, (48, 48))
    expected, _ = run_theirs(library, reference, batch)
    save(reference, tmp_path)
    tensors = to_layout(*load("toy_swin", tmp_path), LAYOUTS[layout])
    if library == "hf":
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        again, report = type(reference).from_pretrained(tmp_path, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
    else:
        again = build((48, 48))
        with torch.no_grad():
            for value in again.parameters():
                value.zero_()
        again.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in tensors.items()}, strict=True)
    assert_close(run_theirs(library, again.eval(), batch)[0], expected, 0)


@pytest.mark.parity
def test_gradients_are_those_of_torchvision(toy, rng, tmp_path, assert_close):
    """Of maps with padding and shifted windows; the network is in training mode, without anything random in it."""
    import torch

    size = (60, 76)
    reference, batch = torchvision_swin(size), images(rng, size)
    weights = rng.standard_normal((2, CLASSES)).astype(np.float32)
    save_torch(reference, tmp_path)
    model, state = load("toy_swin", tmp_path)
    (reference(to_torch(batch)) * torch.from_numpy(weights)).sum().backward()

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def gradient(model):
        return jax.grad(lambda m: jnp.sum(m(jnp.asarray(batch), state, train=True)[0] * weights))(model)

    ours = to_layout(gradient(model), state, LAYOUTS["torchvision_swin"])
    theirs = {name: value.grad.numpy() for name, value in reference.named_parameters()}
    assert sorted(theirs) == sorted(name for name in ours if not name.endswith("_index"))
    assert_close({name: ours[name] for name in theirs}, theirs, TOLERANCE)


@pytest.mark.parity
def test_another_window_as_timm_reads_it(toy, rng, tmp_path, assert_close, caplog):
    import torch
    from timm.models.swin_transformer import checkpoint_filter_fn

    size = (64, 64)
    original, reference, batch = timm_swin(size), timm_swin(size, 4), images(rng, size)
    save_torch(original, tmp_path)
    reference.load_state_dict(checkpoint_filter_fn(original.state_dict(), reference))
    with torch.no_grad():
        expected = reference(to_torch(batch)).numpy()
    toy(window=4)
    with caplog.at_level("INFO", logger="eqvision.pretrained"):
        model, state = load("toy_swin", tmp_path)
    assert_close(run(model, state, batch)[0], expected, TOLERANCE)
    assert "3 tables of relative positions resampled" in caplog.text
    assert "backbone.stages.0.blocks.relative_bias: (5, 5) to (7, 7)" in caplog.text


@pytest.mark.parity
def test_another_window_as_microsoft_reads_it(toy, tmp_path, assert_close, rng):
    """``load_pretrained`` of their utils.py: the table as an image, by ``interpolate(mode="bicubic")``."""
    import torch

    tensors = random_tensors("microsoft_swin", rng)
    write(tensors, tmp_path)
    toy(window=4)
    model, _ = load("toy_swin", tmp_path)
    table = torch.from_numpy(tensors["layers.1.blocks.3.attn.relative_position_bias_table"])
    grid = table.permute(1, 0).reshape(1, HEADS[1], 5, 5)
    expected = torch.nn.functional.interpolate(grid, size=(7, 7), mode="bicubic")[0].permute(1, 2, 0)
    assert_close(np.asarray(model.backbone.stages[1].blocks.relative_bias[3]), expected.numpy(), TOLERANCE)


# Without the originals


def initial(key):
    return eqx.nn.make_with_state(MODELS["toy_swin"])(num_classes=CLASSES, in_channels=3, key=key)


def random_tensors(layout, rng):
    tensors = to_layout(*initial(jax.random.key(0)), LAYOUTS[layout])
    return {
        name: x if x.dtype == np.int64 else rng.standard_normal(x.shape).astype(np.float32)
        for name, x in tensors.items()
    }


def write(tensors, folder):
    from safetensors.numpy import save_file

    save_file(tensors, folder / "model.safetensors")


ALL = ["timm_swin", "microsoft_swin", "torchvision_swin", "hf_swin"]


@pytest.mark.parametrize("layout", ALL)
def test_there_and_back(layout, toy, rng, tmp_path):
    tensors = random_tensors(layout, rng)
    assert [each.name for each in LAYOUTS.values() if each.recognises(tensors)] == [layout]
    write(tensors, tmp_path)
    out = to_layout(*load("toy_swin", tmp_path), LAYOUTS[layout])
    assert sorted(out) == sorted(tensors)
    assert all(np.array_equal(out[name], tensors[name]) for name in tensors)


def test_the_index_of_torchvision_must_be_that_of_the_window(toy, rng, tmp_path):
    tensors = random_tensors("torchvision_swin", rng)
    name = "features.3.2.attn.relative_position_index"
    assert np.array_equal(tensors[name], offset_index(WINDOW).reshape(-1))
    tensors[name] = tensors[name][::-1].copy()
    write(tensors, tmp_path)
    with pytest.raises(WeightsError, match=r"stages.1.blocks.relative_bias from .*not that of a square window"):
        load("toy_swin", tmp_path)


@pytest.mark.parametrize("layout", ["torchvision_swin", "hf_swin"])
def test_another_window_is_refused_where_the_original_refuses_it(layout, toy, rng, tmp_path):
    write(random_tensors(layout, rng), tmp_path)
    toy(window=4)
    message = r"3 leaves differ:\n.*stages.0.blocks.relative_bias: \(2, 5, 5, 2\) in the file, \(2, 7, 7, 2\) in the"
    with pytest.raises(WeightsError, match=message):
        load("toy_swin", tmp_path)


def test_another_depth_is_refused_with_names(toy, rng, tmp_path, monkeypatch):
    write(random_tensors("timm_swin", rng), tmp_path)
    monkeypatch.setitem(SWIN_SIZES, "toy", SwinSize(WIDTH, (2, 6, 2), HEADS))
    with pytest.raises(WeightsError, match=r"26 tensors are missing:\n  layers.1.blocks.4.norm1.weight"):
        load("toy_swin", tmp_path)


def test_a_table_that_is_not_square_is_refused(toy, rng, tmp_path):
    tensors = random_tensors("timm_swin", rng)
    name = "layers.0.blocks.1.attn.relative_position_bias_table"
    tensors[name] = tensors[name][:-1].copy()
    write(tensors, tmp_path)
    with pytest.raises(WeightsError, match=r"shape \(24, 2\), expected \(25, 2\)"):
        load("toy_swin", tmp_path)


def test_other_classes_and_channels(toy, rng, tmp_path):
    tensors = random_tensors("timm_swin", rng)
    write(tensors, tmp_path)
    model, _ = load("toy_swin", tmp_path, num_classes=9, in_channels=1)
    assert model.head.linear.weight.shape == (WIDTH << 2, 9)
    assert np.array_equal(model.head.norm.weight, tensors["norm.weight"])
    kernel = tensors["patch_embed.proj.weight"].transpose(2, 3, 1, 0).sum(axis=2, keepdims=True)
    assert np.allclose(model.backbone.patch_embed.weight, kernel)


def test_configurations_of_transformers():
    assert swin_hf.from_config({}) == {"activation": "gelu", "eps": 1e-5}
    given = {"hidden_act": "gelu_new", "layer_norm_eps": 1e-6, "mlp_ratio": 4, "qkv_bias": True}
    assert swin_hf.from_config(given) == {"activation": "gelu_tanh", "eps": 1e-6}
    with pytest.raises(WeightsError, match="use_absolute_embeddings = True, expected False"):
        swin_hf.from_config({"use_absolute_embeddings": True})
    with pytest.raises(UnknownNameError, match=r"hidden_act of config.json 'gleu' .*gelu"):
        swin_hf.from_config({"hidden_act": "gleu"})
