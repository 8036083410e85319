"""``eqvision convert``: the layout that is chosen, the files that are written, and that the original reads them."""

import functools
import json

import jax
import numpy as np
import pytest
from resnet_references import BLOCKS, randomised
from safetensors.numpy import load_file, save_file
from vit_references import add_toys, made, timm_logits, timm_model

import eqvision
from eqvision import cli
from eqvision.backbones import SIZES, ViTSize
from eqvision.backbones.bit import BIT_DEPTHS
from eqvision.backbones.convnext import CONVNEXT_SIZES, ConvNeXtSize
from eqvision.backbones.resnet import DEPTHS
from eqvision.backbones.swin import SWIN_SIZES, SwinSize
from eqvision.classifiers import (
    Classifier,
    bit_classifier,
    convnext_classifier,
    resnet_classifier,
    swin_classifier,
    vit_classifier,
)
from eqvision.convert import convert
from eqvision.data import eval_transform
from eqvision.export import load_safetensors, model_of_zoo, read_card
from eqvision.names import UnknownNameError
from eqvision.pretrained import LAYOUTS, WeightsError, to_layout
from eqvision.pretrained.cards import Preprocessing
from eqvision.pretrained.convert import builder_options, computed_otherwise, origins, target_layout
from eqvision.pretrained.hf_config import preprocessor_config
from eqvision.pretrained.preprocess import known_preprocessing
from eqvision.zoo import MODELS

CLASSES = 5


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """Small ViTs ``toy_token`` ... and a small ResNet ``toy_resnet``."""
    add_toys(monkeypatch)


def noisy(name: str, image_size: int = 16, seed: int = 0):
    """A model of the zoo with noise on every leaf, its statistics too."""
    file = model_of_zoo(name, num_classes=CLASSES, image_size=image_size)
    rng = np.random.default_rng(seed)
    draw = functools.partial(jax.tree.map, lambda x: x + 0.1 * np.abs(rng.normal(size=x.shape)).astype(np.float32))
    return draw(file.model), draw(file.state)


def written(folder, name: str, layout: str, image_size: int = 16):
    folder.mkdir(exist_ok=True)
    model, state = noisy(name, image_size)
    save_file(to_layout(model, state, LAYOUTS[layout]), folder / "file.safetensors")
    return model, state, folder / "file.safetensors"


def batch(size: int = 16):
    return np.random.default_rng(1).normal(size=(2, size, size, 3)).astype(np.float32)


def logits(model, state, images):
    return jax.jit(lambda m, s, x: m(x, s)[0])(model, state, images)


# Which layout


def abstract(name: str):
    file = model_of_zoo(name, num_classes=CLASSES, image_size=16)
    return file.model, file.state


@pytest.mark.parametrize(
    ("name", "to", "expected"),
    [
        ("toy_token", "timm", "timm_vit"),
        ("toy_token", "hf", "hf_vit"),
        ("toy_reg_gap", "timm", "timm_vit_reg"),
        ("toy_distilled", "hf", "hf_deit_distilled"),
        ("toy_dinov2", "hf", "hf_dinov2"),
        ("toy_dinov2_reg", "timm", "timm_vit_reg"),
        ("toy_token", "google_vit", "google_vit"),
        ("toy_token", "facebook_vit", "facebook_vit"),
        ("resnet20_cifar", "akamaster", "akamaster_resnet_cifar"),
    ],
)
def test_an_origin_gives_its_layout_for_the_model(name, to, expected):
    assert target_layout(*abstract(name), to).name == expected


def test_torchvisions_names_are_timms_too():
    model, state = abstract("resnet18")
    assert target_layout(model, state, "timm").name == "torchvision_resnet"
    assert target_layout(model, state, "torchvision").name == "torchvision_resnet"


def test_the_layout_of_the_source_comes_first():
    model, state = abstract("toy_token")
    assert target_layout(model, state, "google", "google_vit").name == "google_vit"


def test_impossible_and_unknown_targets_name_what_there_is():
    model, state = abstract("resnet20_cifar")
    with pytest.raises(WeightsError, match=r"cannot be written as timm; .* akamaster_resnet_cifar \(akamaster"):
        target_layout(model, state, "timm")
    with pytest.raises(WeightsError, match="cannot be written as hf_vit; layouts that there are for it: eqvision"):
        target_layout(model, state, "hf_vit")
    with pytest.raises(UnknownNameError, match="layout or origin 'tim' does not exist; nearest: timm"):
        target_layout(model, state, "tim")
    assert {"timm", "hf", "torchvision", "google", "akamaster"} <= set(origins())


def test_what_would_be_computed_otherwise_is_named(monkeypatch):
    monkeypatch.setitem(SIZES, "toy", ViTSize(width=32, depth=1, num_heads=4, mlp_dim=48))
    monkeypatch.setitem(MODELS, "toy", functools.partial(vit_classifier, "toy", 4))
    assert builder_options("toy", {"eps": 1e-5})["eps"] == 1e-5
    assert computed_otherwise("toy", {"eps": 1e-12}, LAYOUTS["timm_vit"], None) == ["eps: 1e-12 -> 1e-06"]
    config = {"layer_norm_eps": 1e-12}
    assert computed_otherwise("toy", {"eps": 1e-12}, LAYOUTS["hf_vit"], config) == []
    found = computed_otherwise("toy", {"activation": "gelu_tanh"}, LAYOUTS["timm_vit"], None)
    assert "activation: gelu_tanh -> gelu" in found


# Files


def test_to_eqvision_and_back(tmp_path, assert_close):
    """The options of the layout, here an epsilon of 1e-12, travel in the header."""
    model, _, file = written(tmp_path / "in", "toy_token", "hf_vit")
    done = convert(file, tmp_path / "own.safetensors", to="eqvision", name="toy_token")
    assert done.files == (tmp_path / "own.safetensors",)
    card = read_card(tmp_path / "own.safetensors")
    assert (card.model, card.num_classes, card.image_size) == ("toy_token", CLASSES, (16, 16))
    assert card.options["eps"] == 1e-12
    assert card.origin == "file.safetensors, layout hf_vit"
    for loaded, _ in (
        load_safetensors(tmp_path / "own.safetensors"),
        eqvision.load("toy_token", tmp_path / "own.safetensors"),
    ):
        assert isinstance(loaded, Classifier)
        assert loaded.backbone.norm.eps == 1e-12
        assert_close(loaded.head, model.head, 0)
    convert(tmp_path / "own.safetensors", tmp_path / "back.safetensors", to="hf")
    assert load_file(tmp_path / "back.safetensors").keys() == load_file(file).keys()
    for name, tensor in load_file(file).items():
        np.testing.assert_array_equal(load_file(tmp_path / "back.safetensors")[name], tensor)


def test_statistics_go_along(tmp_path, assert_close):
    model, state, file = written(tmp_path / "in", "resnet20_cifar", "akamaster_resnet_cifar", 32)
    convert(file, tmp_path / "own.safetensors", to="eqvision", name="resnet20_cifar")
    assert_close(eqvision.load("resnet20_cifar", tmp_path / "own.safetensors"), (model, state), 0)


def test_npz_is_written_by_its_suffix(tmp_path):
    _, _, file = written(tmp_path / "in", "toy_token", "timm_vit")
    convert(file, tmp_path / "file.npz", to="google", name="toy_token")
    with np.load(tmp_path / "file.npz") as opened:
        assert "Transformer/encoderblock_0/LayerNorm_0/scale" in opened.files


def test_hugging_face_gets_configurations(tmp_path):
    _, _, file = written(tmp_path / "in", "toy_token", "timm_vit")
    done = convert(file, tmp_path / "out", to="hf", name="toy_token")
    names = [path.name for path in done.files]
    assert names == ["model.safetensors", "config.json", "preprocessor_config.json"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["ViTForImageClassification"]
    assert (config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"]) == (32, 3, 48)
    assert (config["image_size"], config["patch_size"], config["layer_norm_eps"]) == (16, 4, 1e-6)
    assert len(config["id2label"]) == CLASSES
    assert done.differences == ()


@pytest.mark.parametrize("fraction", [0.0, 0.875, 1.0])
def test_the_preprocessing_is_written_as_it_is_read(fraction, tmp_path):
    prepared = Preprocessing(224, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", fraction)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor_config(prepared)))
    found = known_preprocessing("small_cnn", tmp_path, tmp_path)
    assert found is not None
    assert found.preprocessing == prepared
    assert eval_transform("imagenet", 224, "bilinear", fraction)(np.zeros((300, 400, 3), np.uint8)).shape[0] == 224


def test_nothing_is_overwritten_unless_forced(tmp_path):
    _, _, file = written(tmp_path / "in", "toy_token", "timm_vit")
    out = tmp_path / "out.safetensors"
    out.write_text("mine")
    for to in ("eqvision", "timm"):
        with pytest.raises(FileExistsError, match="exists; nothing was written"):
            convert(file, out, to=to, name="toy_token")
    assert out.read_text() == "mine"
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("mine")
    with pytest.raises(FileExistsError, match=r"config.json exists"):
        convert(file, tmp_path / "hf", to="hf", name="toy_token")
    assert not (tmp_path / "hf" / "model.safetensors").exists()
    convert(file, out, to="timm", name="toy_token", force=True)
    assert load_file(out).keys() == load_file(file).keys()
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []


def test_a_target_without_a_suffix_is_refused(tmp_path):
    _, _, file = written(tmp_path / "in", "toy_token", "timm_vit")
    with pytest.raises(WeightsError, match=r"name a file that ends in .safetensors or .npz"):
        convert(file, tmp_path / "out", to="timm", name="toy_token")
    with pytest.raises(WeightsError, match=r"eqvision's own files are safetensors"):
        convert(file, tmp_path / "out.npz", to="eqvision", name="toy_token")


def test_the_model_must_be_named_for_files_that_do_not_know_it(tmp_path):
    _, _, file = written(tmp_path / "in", "toy_token", "timm_vit")
    with pytest.raises(WeightsError, match=r"does not say which model it is of; name it: --model NAME"):
        convert(file, tmp_path / "out.safetensors", to="timm")


def test_what_transformers_cannot_build_is_refused(tmp_path):
    _, _, file = written(tmp_path / "in", "toy_gap", "timm_vit")
    with pytest.raises(WeightsError, match=r"transformers' model reads pool='token'.*this one has pool='mean'"):
        convert(file, tmp_path / "out", to="hf_vit", name="toy_gap")


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "in", "toy_token", "hf_vit")
    cli.main(["convert", "in/file.safetensors", "out.safetensors", "--model", "toy_token", "--to", "timm"])
    printed = capsys.readouterr()
    assert printed.out.startswith("out.safetensors\n")
    assert "tensors as timm_vit, timm VisionTransformer" in printed.out
    assert "eps: 1e-12 -> 1e-06" in printed.err
    with pytest.raises(SystemExit) as caught:
        cli.main(["convert", "in/file.safetensors", "out.safetensors", "--model", "toy_token", "--to", "timm"])
    assert caught.value.code == 2
    assert "--force to replace it" in capsys.readouterr().err


# The original libraries read what is written

TOLERANCE = 1e-5


@pytest.mark.parity
def test_timm_reads_what_is_written(tmp_path, assert_close):
    """From our own file, as a run is exported, into a fresh model of timm."""
    import torch

    model, state = made("reg_gap", CLASSES)
    save_file(to_layout(model, state, LAYOUTS["timm_vit_reg"]), tmp_path / "file.safetensors")
    convert(tmp_path / "file.safetensors", tmp_path / "own.safetensors", to="eqvision", name="toy_reg_gap")
    convert(tmp_path / "own.safetensors", tmp_path / "timm.safetensors", to="timm")
    theirs = timm_model("reg_gap", seed=7)
    tensors = {name: torch.from_numpy(array) for name, array in load_file(tmp_path / "timm.safetensors").items()}
    theirs.load_state_dict(tensors, strict=True)
    assert_close(logits(model, state, batch()), timm_logits(theirs, batch()), TOLERANCE)


# Small models: the layout that is read, the builder, and transformers' class
HF_MODELS = {
    "vit": ("timm_vit", functools.partial(vit_classifier, "toy", 4), "ViTForImageClassification"),
    "vit_no_bias": (
        "timm_vit",
        functools.partial(vit_classifier, "toy", 4, use_qkv_bias=False),
        "ViTForImageClassification",
    ),
    "deit": (
        "timm_vit",
        functools.partial(vit_classifier, "toy", 4, distillation_token=True),
        "DeiTForImageClassificationWithTeacher",
    ),
    "dinov2": (
        "timm_vit",
        functools.partial(vit_classifier, "toy_double", 4, layer_scale=1e-5, pool="token_mean"),
        "Dinov2ForImageClassification",
    ),
    "resnet": ("torchvision_resnet", functools.partial(resnet_classifier, 12), "ResNetForImageClassification"),
    "resnet_bottleneck": (
        "torchvision_resnet",
        functools.partial(resnet_classifier, 17),
        "ResNetForImageClassification",
    ),
    "bit": ("hf_bit", functools.partial(bit_classifier, 17, 1), "BitForImageClassification"),
    "convnext": (
        "torchvision_convnext",
        functools.partial(convnext_classifier, "toy"),
        "ConvNextForImageClassification",
    ),
    "convnextv2": (
        "timm_convnext",
        functools.partial(convnext_classifier, "toy", version=2),
        "ConvNextV2ForImageClassification",
    ),
    "swin": ("torchvision_swin", functools.partial(swin_classifier, "toy", 3), "SwinForImageClassification"),
}


@pytest.fixture
def sizes(monkeypatch):
    monkeypatch.setitem(SIZES, "toy_double", ViTSize(width=32, depth=2, num_heads=4, mlp_dim=64))
    monkeypatch.setitem(DEPTHS, 12, (BLOCKS, False))
    monkeypatch.setitem(DEPTHS, 17, (BLOCKS, True))
    monkeypatch.setitem(BIT_DEPTHS, 17, BLOCKS)
    monkeypatch.setitem(CONVNEXT_SIZES, "toy", ConvNeXtSize((1, 2, 1, 1), (8, 12, 16, 20)))
    monkeypatch.setitem(SWIN_SIZES, "toy", SwinSize(16, (2, 4, 2), (2, 4, 8)))


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize("case", HF_MODELS)
def test_transformers_reads_what_is_written(case, sizes, tmp_path, assert_close, monkeypatch):
    """``from_pretrained`` takes the folder as it is, misses no tensor, and gives the numbers that were read here."""
    import torch
    import transformers

    layout, row, architecture = HF_MODELS[case]
    monkeypatch.setitem(MODELS, "toy_case", row)
    size = 16 if layout == "timm_vit" else 48
    _, _, file = written(tmp_path / "in", "toy_case", layout, size)
    done = convert(file, tmp_path / "out", to="hf", name="toy_case")
    model, state = eqvision.load("toy_case", file)
    kind = getattr(transformers, architecture)
    theirs, report = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    # Counters of batches, and DINOv2's token for masked patches, serve training only; models here have none.
    training = ("num_batches_tracked", "mask_token")
    assert [name for name in report["missing_keys"] if not name.endswith(training)] == []
    assert not report["unexpected_keys"]
    images = batch(size)
    with torch.no_grad():
        expected = theirs.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).logits.numpy()
    assert_close(logits(model, state, images), expected, TOLERANCE)
    if case != "swin":  # the rule for maps below a window differs, and these are not below one
        assert done.differences == ()


@pytest.mark.parity
def test_torchvision_reads_what_is_written(tmp_path, assert_close):
    """From Hugging Face's ResNet, with random statistics, to torchvision's."""
    import torch
    from torchvision.models import resnet18
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}
    source = randomised(ResNetForImageClassification(ResNetConfig(num_labels=CLASSES, **sizes)))
    source.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "out.safetensors", to="torchvision", name="resnet18")
    theirs = resnet18(num_classes=CLASSES).eval()
    tensors = {name: torch.from_numpy(array) for name, array in load_file(tmp_path / "out.safetensors").items()}
    theirs.load_state_dict(tensors, strict=True)
    images = torch.from_numpy(batch(64).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        assert_close(theirs(images).numpy(), source(images).logits.numpy(), TOLERANCE)
