"""Layouts of BiT against timm, transformers, and google's ``.npz`` names as timm's own reader has them."""

import functools
import json

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

from eqvision.backbones.bit import BIT_DEPTHS
from eqvision.classifiers import bit_classifier
from eqvision.pretrained import LAYOUTS, WeightsError, load, to_layout
from eqvision.pretrained.leaf_names import named_arrays, with_leaves
from eqvision.zoo import MODELS

# Kernels so small that what is added to their variance, 1e-8 or 1e-10, changes them by tens of percents or by one,
# and images so dark that the 1e-5 of the group norms shows.
SMALL = 1e-3
DARK = 1e-2


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    monkeypatch.setitem(BIT_DEPTHS, 17, BLOCKS)
    monkeypatch.setitem(MODELS, "toy_bit", functools.partial(bit_classifier, 17, 1))


def timm_bit(eps=1e-8):
    from timm.layers import StdConv2d
    from timm.models.resnetv2 import ResNetV2

    conv = functools.partial(StdConv2d, eps=eps)
    return ResNetV2(list(BLOCKS), num_classes=CLASSES, stem_type="fixed", conv_layer=conv)


def timm_stages(module):
    return [*list(module.stages)[:3], module.norm]


def hf_bit():
    import transformers

    return transformers.BitForImageClassification(transformers.BitConfig(depths=list(BLOCKS), num_labels=CLASSES))


def hf_stages(module):
    return [*list(module.bit.encoder.stages)[:3], module.bit.norm]


def saved(module, folder):
    from safetensors.torch import save_file

    path = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, path)
    return path


REFERENCES = [("timm_bit", timm_bit, timm_stages), ("hf_bit", hf_bit, hf_stages)]


@pytest.mark.parity
@pytest.mark.parametrize(("layout", "build", "stages"), REFERENCES)
def test_outputs_and_back(layout, build, stages, tmp_path, rng, assert_close):
    pytest.importorskip("torch")
    module = randomised(build(), kernel_scale=SMALL)
    images = jnp.asarray(images_for(rng, size=50, scale=DARK))
    model, state = load("toy_bit", saved(module, tmp_path))
    check_outputs(model, state, module, stages(module), images, assert_close)
    check_back(model, state, randomised(build(), seed=1), layout, images, assert_close)


@pytest.mark.parity
def test_a_folder_of_transformers(tmp_path, assert_close):
    """As ``save_pretrained`` writes it, with its ``config.json``."""
    pytest.importorskip("transformers")
    module = randomised(hf_bit())
    module.save_pretrained(tmp_path)
    tensors = to_layout(*load("toy_bit", tmp_path), LAYOUTS["hf_bit"])
    assert_close(tensors, {name: module.state_dict()[name].numpy() for name in tensors}, 0.0)
    assert set(tensors) == published_names(module)


@pytest.mark.parity
@pytest.mark.slow
def test_gradients(tmp_path, rng, assert_close):
    pytest.importorskip("torch")
    module = randomised(timm_bit(), kernel_scale=SMALL)
    model, state = load("toy_bit", saved(module, tmp_path))
    check_training(model, state, module, "timm_bit", images_for(rng, size=32), rng, assert_close)


def google_names(module):
    """Tensors of timm's module as google-research/big_transfer calls them: ``load_from`` in bit_pytorch/models.py."""
    tensors = {}
    for name, tensor in module.state_dict().items():
        array = tensor.detach().numpy()
        tensors[google_name(name)] = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
    return tensors


def google_name(name):
    fixed = {"stem.conv": "root_block/standardized_conv2d", "norm": "group_norm", "head.fc": "head/conv2d"}
    layer, _, leaf = name.rpartition(".")
    leaves = {"weight": "gamma", "bias": "beta"} if "norm" in layer else {"weight": "kernel", "bias": "bias"}
    if layer in fixed:
        return f"resnet/{fixed[layer]}/{leaves[leaf]}"
    _, stage, _, block, part = layer.split(".", 4)
    unit = "a/proj" if part == "downsample.conv" else "abc"[int(part[-1]) - 1]
    kind = "group_norm" if "norm" in part else "standardized_conv2d"
    return f"resnet/block{int(stage) + 1}/unit{int(block) + 1:02d}/{unit}/{kind}/{leaves[leaf]}"


@pytest.mark.parity
def test_google_npz(tmp_path, rng, assert_close):
    """timm's own reader of these files is the reference, with what google adds to the variance, 1e-10."""
    pytest.importorskip("timm")
    path, back = tmp_path / "BiT-M-R50x1.npz", tmp_path / "back.npz"
    np.savez(path, **google_names(randomised(timm_bit(), kernel_scale=SMALL)))
    module = randomised(timm_bit(eps=1e-10), seed=1)
    module.load_pretrained(str(path))
    images = jnp.asarray(images_for(rng, size=50, scale=DARK))
    model, state = load("toy_bit", path)
    check_outputs(model, state, module, timm_stages(module), images, assert_close)

    np.savez(back, **to_layout(model, state, LAYOUTS["google_bit"]))
    module = randomised(timm_bit(eps=1e-10), seed=2)
    module.load_pretrained(str(back))
    logits, _ = run(module, [], images)
    assert_close(jax.jit(lambda m, s, x: m(x, s)[0])(model, state, images), logits.detach().numpy(), 1e-5)


PUBLISHED = ["bit_r50x1", "bit_r50x3", "bit_r101x1", "bit_r101x3", "bit_r152x2", "bit_r152x4"]


@pytest.mark.parity
@pytest.mark.parametrize("name", PUBLISHED)
def test_names_of_the_published_models(name):
    torch = pytest.importorskip("torch")
    import timm

    with torch.device("meta"):
        module = timm.create_model(name.replace("bit_r", "resnetv2_") + "_bit")
    assert published_names(module) == layout_names(name, "timm_bit")
    assert {google_name(each) for each in published_names(module)} == layout_names(name, "google_bit")


@pytest.mark.parity
def test_names_of_google_bit_50():
    """The only one that transformers publishes: its norm has the wrong width for factors above one."""
    torch = pytest.importorskip("torch")
    import transformers

    with torch.device("meta"):
        module = transformers.BitForImageClassification(transformers.BitConfig())
    assert published_names(module) == layout_names("bit_r50x1", "hf_bit")


@functools.cache
def random_toy():
    """A toy and its state, with random numbers everywhere."""
    rng = np.random.default_rng(1)
    build = functools.partial(bit_classifier, 17, 1, num_classes=CLASSES, in_channels=3)
    model, state = eqx.nn.make_with_state(build)(key=jax.random.key(0))
    leaves = named_arrays(model, state)
    return with_leaves(model, state, {n: jnp.asarray(rng.uniform(0.5, 1, x.shape), x.dtype) for n, x in leaves.items()})


def tensors_of(layout):
    return to_layout(*random_toy(), LAYOUTS[layout])


def write(tensors, path):
    from safetensors.numpy import save_file

    save_file(tensors, path)
    return path


@pytest.mark.parametrize(("layout", "eps"), [("google_bit", 1e-10), ("timm_bit", 1e-8), ("hf_bit", 1e-8)])
def test_written_and_read_again(layout, eps, tmp_path):
    tensors = tensors_of(layout)
    assert {name for name, each in LAYOUTS.items() if each.recognises(tensors)} == {layout}
    model, state = load("toy_bit", write(tensors, tmp_path / "weights.safetensors"))
    for leaf, old in zip(jax.tree.leaves((model, state)), jax.tree.leaves(random_toy()), strict=True):
        np.testing.assert_array_equal(leaf, old)
    assert model.backbone.stem.eps == model.backbone.stages[1].rest.conv2.eps == eps


def test_names_of_a_google_file():
    tensors = tensors_of("google_bit")
    assert tensors["resnet/root_block/standardized_conv2d/kernel"].shape == (7, 7, 3, 64)
    assert tensors["resnet/block2/unit02/c/standardized_conv2d/kernel"].shape == (1, 1, 128, 512)
    assert tensors["resnet/block4/unit01/a/proj/standardized_conv2d/kernel"].shape == (1, 1, 1024, 2048)
    assert tensors["resnet/head/conv2d/kernel"].shape == (1, 1, 2048, CLASSES)
    assert len(tensors) == 1 + 5 * 9 + 4 + 4


def test_a_head_that_is_no_1x1_convolution_is_refused(tmp_path):
    tensors = tensors_of("google_bit")
    tensors["resnet/head/conv2d/kernel"] = np.zeros((7, 7, 2048, CLASSES), np.float32)
    path = write(tensors, tmp_path / "weights.safetensors")
    with pytest.raises(WeightsError, match=r"head\.linear\.weight from .*: shape \(7, 7, 2048, 7\), expected \(1, 1,"):
        load("toy_bit", path)


def test_a_block_missing_from_a_stack_is_named(tmp_path):
    tensors = tensors_of("google_bit")
    del tensors["resnet/block2/unit02/b/standardized_conv2d/kernel"]
    with pytest.raises(
        WeightsError, match="1 tensors are missing:\n  resnet/block2/unit02/b/standardized_conv2d/kernel"
    ):
        load("toy_bit", write(tensors, tmp_path / "weights.safetensors"))


@pytest.mark.parametrize(("name", "what"), [("bit_r50x3", "leaves differ|are missing"), ("bit_r50x1", "are missing")])
def test_another_bit_is_refused(name, what, tmp_path):
    with pytest.raises(WeightsError, match=what):
        load(name, write(tensors_of("timm_bit"), tmp_path / "weights.safetensors"))


@pytest.mark.parametrize("extra", ["stages.0.blocks.0.norm1.running_mean", "stem.norm.weight"])
def test_other_resnets_v2_of_timm_are_of_no_layout(extra, tmp_path):
    """Batch norm in ``resnetv2_50``, a norm in the stem of the hybrid ViT's."""
    tensors = {**tensors_of("timm_bit"), extra: np.ones(64, np.float32)}
    with pytest.raises(WeightsError, match="is of no known layout for toy_bit; nearest: timm_bit"):
        load("toy_bit", write(tensors, tmp_path / "weights.safetensors"))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("layer_type", "bottleneck"),
        ("global_padding", "SAME"),
        ("embedding_dynamic_padding", True),
        ("num_groups", 16),
        ("output_stride", 16),
        ("hidden_act", "gelu"),
    ],
)
def test_another_bit_of_transformers_is_refused_by_its_config(option, value, tmp_path):
    write(tensors_of("hf_bit"), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"global_padding": None, option: value}))
    with pytest.raises(WeightsError, match=f"model that BiT here is not.*\n  {option} = {value!r}, expected"):
        load("toy_bit", tmp_path)
