"""Layouts of ResNet and CIFAR ResNet against torchvision, timm, transformers and akamaster's names."""

import functools
import json
import logging

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from resnet_references import (
    BLOCKS,
    CLASSES,
    check_back,
    check_outputs,
    check_training,
    images_for,
    layout_names,
    published_names,
    randomised,
    run,
)

from eqvision.backbones.resnet import DEPTHS
from eqvision.classifiers import resnet_cifar_classifier, resnet_classifier
from eqvision.pretrained import LAYOUTS, WeightsError, load, to_layout
from eqvision.pretrained.leaf_names import named_arrays, with_leaves
from eqvision.zoo import MODELS

TOYS = {"toy_basic": 12, "toy_bottleneck": 17}
LOG = "eqvision.pretrained"


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    monkeypatch.setitem(DEPTHS, 12, (BLOCKS, False))
    monkeypatch.setitem(DEPTHS, 17, (BLOCKS, True))
    for name, depth in TOYS.items():
        monkeypatch.setitem(MODELS, name, functools.partial(resnet_classifier, depth))
    monkeypatch.setitem(MODELS, "toy_cifar", functools.partial(resnet_cifar_classifier, 14))


def torchvision_resnet(name, **options):
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    block = Bottleneck if name == "toy_bottleneck" else BasicBlock
    return ResNet(block, list(BLOCKS), num_classes=CLASSES, **options)


def timm_resnet(name, **options):
    from timm.models.resnet import BasicBlock, Bottleneck, ResNet

    block = Bottleneck if name == "toy_bottleneck" else BasicBlock
    return ResNet(block, BLOCKS, num_classes=CLASSES, **options)


def hf_resnet(name):
    import transformers

    kind, widest = ("bottleneck", 2048) if name == "toy_bottleneck" else ("basic", 512)
    sizes = [widest // 8, widest // 4, widest // 2, widest]
    config = transformers.ResNetConfig(layer_type=kind, depths=list(BLOCKS), hidden_sizes=sizes, num_labels=CLASSES)
    return transformers.ResNetForImageClassification(config)


def akamaster_resnet(name):
    """The module of akamaster/pytorch_resnet_cifar10's ``resnet.py``: its names and its computation, option A."""
    import torch

    nn = torch.nn

    class Block(nn.Module):
        def __init__(self, inputs, width, stride):
            super().__init__()
            self.conv1 = nn.Conv2d(inputs, width, 3, stride=stride, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(width)
            self.stride, self.extra = stride, width - inputs

        def forward(self, x):
            y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
            x = x[:, :, :: self.stride, :: self.stride]
            return (y + nn.functional.pad(x, (0, 0, 0, 0, self.extra // 2, self.extra // 2))).relu()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(16)
            self.layer1 = nn.Sequential(Block(16, 16, 1), Block(16, 16, 1))
            self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1))
            self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1))
            self.linear = nn.Linear(64, CLASSES)

        def forward(self, x):
            x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)).relu())))
            return self.linear(x.mean((2, 3)))

    return Net()


def layers(module):
    return [child for name, child in module.named_children() if name.startswith("layer")]


REFERENCES = [
    ("toy_basic", "torchvision_resnet", torchvision_resnet, layers),
    ("toy_bottleneck", "torchvision_resnet", torchvision_resnet, layers),
    ("toy_basic", "torchvision_resnet", timm_resnet, layers),
    ("toy_bottleneck", "torchvision_resnet", timm_resnet, layers),
    ("toy_basic", "hf_resnet", hf_resnet, lambda module: list(module.resnet.encoder.stages)),
    ("toy_bottleneck", "hf_resnet", hf_resnet, lambda module: list(module.resnet.encoder.stages)),
    ("toy_cifar", "akamaster_resnet_cifar", akamaster_resnet, layers),
]


def saved(module, folder):
    from safetensors.torch import save_file

    path = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, path)
    return path


@pytest.mark.parity
@pytest.mark.parametrize(("name", "layout", "build", "stages"), REFERENCES)
def test_outputs_and_back(name, layout, build, stages, tmp_path, rng, assert_close):
    pytest.importorskip("torch")
    module = randomised(build(name))
    images = jnp.asarray(images_for(rng, size=48))
    model, state = load(name, saved(module, tmp_path))
    check_outputs(model, state, module, stages(module), images, assert_close)
    check_back(model, state, randomised(build(name), seed=1), layout, images, assert_close)


@pytest.mark.parity
def test_a_folder_of_transformers(tmp_path, assert_close):
    """As ``save_pretrained`` writes it, with its ``config.json``."""
    pytest.importorskip("transformers")
    module = randomised(hf_resnet("toy_basic"))
    module.save_pretrained(tmp_path)
    tensors = to_layout(*load("toy_basic", tmp_path), LAYOUTS["hf_resnet"])
    assert_close(tensors, {name: module.state_dict()[name].numpy() for name in tensors}, 0.0)
    assert set(tensors) == published_names(module)


TRAINED = [
    ("toy_bottleneck", "torchvision_resnet", torchvision_resnet),
    ("toy_cifar", "akamaster_resnet_cifar", akamaster_resnet),
]


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout", "build"), TRAINED)
def test_gradients_and_statistics_in_training(name, layout, build, tmp_path, rng, assert_close):
    pytest.importorskip("torch")
    module = randomised(build(name))
    model, state = load(name, saved(module, tmp_path))
    check_training(model, state, module, layout, images_for(rng), rng, assert_close)


@pytest.mark.parity
@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_names_of_the_published_models(depth):
    torch = pytest.importorskip("torch")
    import timm
    import torchvision
    import transformers

    name = f"resnet{depth}"
    bottleneck = depth > 34
    config = transformers.ResNetConfig(
        depths=list(DEPTHS[depth][0]),
        layer_type="bottleneck" if bottleneck else "basic",
        hidden_sizes=[256, 512, 1024, 2048] if bottleneck else [64, 128, 256, 512],
    )
    with torch.device("meta"):
        modules = [getattr(torchvision.models, name)(), timm.create_model(name)]
        hugging = transformers.ResNetForImageClassification(config)
    assert [published_names(m) for m in modules] == [layout_names(name, "torchvision_resnet")] * 2
    assert published_names(hugging) == layout_names(name, "hf_resnet")


def random_leaves(name, num_classes=CLASSES):
    """A model of the zoo and its state, with random numbers everywhere."""
    rng = np.random.default_rng(1)
    build = functools.partial(MODELS[name], num_classes=num_classes, in_channels=3)
    model, state = eqx.nn.make_with_state(build)(key=jax.random.key(0))
    leaves = named_arrays(model, state)
    return with_leaves(model, state, {n: jnp.asarray(rng.uniform(0.5, 1, x.shape), x.dtype) for n, x in leaves.items()})


ROUND_TRIPS = [
    ("toy_basic", "torchvision_resnet"),
    ("toy_bottleneck", "hf_resnet"),
    ("toy_cifar", "akamaster_resnet_cifar"),
]


def write(tensors, path):
    from safetensors.numpy import save_file

    save_file(tensors, path)
    return path


@pytest.mark.parametrize(("name", "layout"), ROUND_TRIPS)
def test_written_and_read_again(name, layout, tmp_path):
    model, state = random_leaves(name)
    tensors = to_layout(model, state, LAYOUTS[layout])
    assert {key for key, each in LAYOUTS.items() if each.recognises(tensors)} == {layout}
    again = load(name, write(tensors, tmp_path / "weights.safetensors"))
    for leaf, old in zip(jax.tree.leaves(again), jax.tree.leaves((model, state)), strict=True):
        np.testing.assert_array_equal(leaf, old)


def toy_file(folder, **more):
    """A file in torchvision's names, and what ``more`` adds."""
    tensors = to_layout(*random_leaves("toy_basic"), LAYOUTS["torchvision_resnet"])
    return write({**tensors, **more}, folder / "model.safetensors")


def test_another_number_of_classes_is_said_in_the_log(tmp_path, caplog):
    path = toy_file(tmp_path)
    kept, _ = load("toy_basic", path)
    with caplog.at_level(logging.INFO, LOG):
        model, _ = load("toy_basic", path, num_classes=3)
    assert f"the layer for {CLASSES} classes is dropped" in caplog.text
    assert "fresh values for head.linear.weight, head.linear.bias" in caplog.text
    assert model.head.linear.weight.shape == (512, 3)
    assert np.any(model.head.linear.weight)
    same = jax.tree.map(np.array_equal, model.backbone, kept.backbone)
    assert all(jax.tree.leaves(same))


def test_the_number_of_classes_is_that_of_the_file(tmp_path, caplog):
    with caplog.at_level(logging.INFO, LOG):
        for wished in (None, CLASSES):
            model, _ = load("toy_basic", toy_file(tmp_path), num_classes=wished)
            assert model.head.linear.bias.shape == (CLASSES,)
    assert not caplog.text


def test_a_backbone_alone_needs_a_number_of_classes(tmp_path):
    tensors = to_layout(*random_leaves("toy_basic"), LAYOUTS["torchvision_resnet"])
    headless = {name: array for name, array in tensors.items() if not name.startswith("fc.")}
    path = write(headless, tmp_path / "backbone.safetensors")
    with pytest.raises(
        WeightsError, match=r"no classification layer \(it would be fc\.bias, fc\.weight\); give num_classes"
    ):
        load("toy_basic", path)
    assert load("toy_basic", path, num_classes=2)[0].head.linear.weight.shape == (512, 2)


def test_one_channel_sees_what_grey_rgb_showed(tmp_path, caplog, rng, assert_close):
    path = toy_file(tmp_path)
    grey = jnp.asarray(images_for(rng, size=32, channels=1))
    with caplog.at_level(logging.INFO, LOG):
        model, state = load("toy_basic", path, in_channels=1)
    assert "backbone.stem.conv.weight adapted from 3 to 1 channels" in caplog.text
    reference, old = load("toy_basic", path)
    expected, _ = reference.backbone.stem(jnp.repeat(grey, 3, axis=-1), old, train=False)
    assert_close(model.backbone.stem(grey, state, train=False)[0], expected, 1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_channels_are_adapted_as_timm_does(channels, tmp_path, assert_close):
    torch = pytest.importorskip("torch")
    from timm.models._manipulate import adapt_input_conv

    tensors = to_layout(*random_leaves("toy_basic"), LAYOUTS["torchvision_resnet"])
    path = write(tensors, tmp_path / "model.safetensors")
    model, _ = load("toy_basic", path, in_channels=channels)
    expected = adapt_input_conv(channels, torch.from_numpy(tensors["conv1.weight"])).numpy()
    assert_close(model.backbone.stem.conv.weight, expected.transpose(2, 3, 1, 0), 1e-6)


NO_LAYOUT = "is of no known layout for toy_bottleneck; nearest: torchvision_resnet"
# Options of timm's ResNet, and what is said of their files.
VARIANTS = {
    "resnet50d": ({"stem_type": "deep", "stem_width": 32, "avg_down": True}, NO_LAYOUT),
    "resnet50t": ({"stem_type": "deep_tiered", "stem_width": 32, "avg_down": True}, NO_LAYOUT),
    "resnet50_gn": ({"norm_layer": "groupnorm"}, NO_LAYOUT),
    "avg_down": ({"avg_down": True}, r"tensors are missing:\n  layer1\.0\.downsample\.0\.weight|have no legal shape"),
    "seresnet50": ({"block_args": {"attn_layer": "se"}}, r"belong to no part of this model:\n  layer1\.0\.se\.fc1"),
    "wide_resnet50_2": ({"base_width": 128}, r"leaves differ:\n  backbone\.stages\.0\.0\.convs\.0\.conv\.weight"),
    "resnext50_32x4d": ({"cardinality": 32, "base_width": 4}, r"leaves differ:\n  backbone\.stages\.0\.0\.convs\.0"),
}


@pytest.mark.parity
@pytest.mark.parametrize("variant", VARIANTS)
def test_other_resnets_of_timm_are_refused(variant, tmp_path):
    pytest.importorskip("timm")
    options, message = VARIANTS[variant]
    path = saved(timm_resnet("toy_bottleneck", **options), tmp_path)
    with pytest.raises(WeightsError, match=message):
        load("toy_bottleneck", path)


@pytest.mark.parametrize("architecture", ["resnetaa50", "resnetblur18"])
def test_a_resnet_that_filters_is_refused_by_its_config(architecture, tmp_path):
    path = toy_file(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": architecture}))
    with pytest.raises(WeightsError, match=f"the architecture {architecture}, a ResNet that filters before"):
        load("toy_basic", path)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18"}))
    load("toy_basic", path)


@pytest.mark.parametrize(
    ("option", "value"),
    [("downsample_in_bottleneck", True), ("downsample_in_first_stage", True), ("hidden_act", "gelu")],
)
def test_another_resnet_of_transformers_is_refused_by_its_config(option, value, tmp_path):
    write(to_layout(*random_leaves("toy_basic"), LAYOUTS["hf_resnet"]), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"hidden_act": "relu", option: value}))
    with pytest.raises(WeightsError, match=f"model that ResNet here is not.*\n  {option} = {value!r}, expected"):
        load("toy_basic", tmp_path)


def test_projections_called_shortcut_are_of_no_layout(tmp_path):
    """Names of the common CIFAR ResNet-18 with ImageNet's stages, whose stem has no pooling."""
    path = toy_file(tmp_path, **{"layer2.0.shortcut.0.weight": np.zeros((1, 1), np.float32)})
    with pytest.raises(WeightsError, match="is of no known layout for toy_basic"):
        load("toy_basic", path)


def test_an_imagenet_file_is_not_read_into_a_cifar_model(tmp_path):
    with pytest.raises(WeightsError, match=r"is of layout torchvision_resnet .*, which toy_cifar is not a model of"):
        load("toy_cifar", toy_file(tmp_path))
    tensors = to_layout(*random_leaves("toy_cifar"), LAYOUTS["akamaster_resnet_cifar"])
    path = write(tensors, tmp_path / "cifar.safetensors")
    with pytest.raises(
        WeightsError, match=r"is of layout akamaster_resnet_cifar .*, which toy_basic is not a model of"
    ):
        load("toy_basic", path)


def test_another_depth_is_refused(tmp_path):
    path = write(to_layout(*random_leaves("toy_cifar"), LAYOUTS["akamaster_resnet_cifar"]), tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=r"30 tensors are missing:\n  layer1\.2\.conv1\.weight\n"):
        load("resnet20_cifar", path)
    path = write(
        to_layout(*random_leaves("resnet20_cifar"), LAYOUTS["akamaster_resnet_cifar"]), tmp_path / "b.safetensors"
    )
    with pytest.raises(WeightsError, match=r"30 tensors belong to no part of this model:\n  layer1\.2\.bn1\.bias\n"):
        load("toy_cifar", path)


@pytest.mark.parity
def test_a_file_of_akamaster(tmp_path, rng, assert_close):
    """``model.th`` as ``trainer.py`` writes it: of a DataParallel, beside its best accuracy."""
    torch = pytest.importorskip("torch")
    module = randomised(akamaster_resnet("toy_cifar"))
    path = tmp_path / "model.th"
    torch.save({"state_dict": torch.nn.DataParallel(module).state_dict(), "best_prec1": 91.78}, path)
    model, state = load("toy_cifar", path)
    images = images_for(rng, size=32)
    logits, _ = run(module, [], images)
    assert_close(model(jnp.asarray(images), state)[0], logits.detach().numpy(), 1e-5)
