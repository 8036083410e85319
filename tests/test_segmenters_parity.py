"""Segmenters with the weights of torchvision, of transformers and of Segmenter's heads, built small and at random."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from resnet_references import BLOCKS, CLASSES, randomised

import eqvision
from eqvision.backbones.convnext import CONVNEXT_SIZES, ConvNeXtSize
from eqvision.backbones.resnet import DEPTHS
from eqvision.backbones.swin import SWIN_SIZES, SwinSize
from eqvision.heads import MaskTransformerHead
from eqvision.pretrained import LAYOUTS, to_layout
from eqvision.segmenters import deeplabv3_resnet, fcn_resnet, upernet_convnext, upernet_resnet, upernet_swin
from eqvision.types import TokenFeatures
from eqvision.zoo import SEGMENTERS

pytestmark = pytest.mark.parity
WIDTH, HEAD = 4, 8  # of the ResNet's stem, and of UPerNet's head
CONVNEXT = ConvNeXtSize((1, 2, 1, 1), (8, 12, 16, 20))
SWIN = SwinSize(8, (2, 2, 2), (1, 2, 4))
WINDOW = 3  # which no map of the tests has as a side, or less: see upernet_hf


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    monkeypatch.setitem(DEPTHS, 17, (BLOCKS, True))
    monkeypatch.setitem(CONVNEXT_SIZES, "toy", CONVNEXT)
    monkeypatch.setitem(SWIN_SIZES, "toy", SWIN)
    rows = {
        "fcn": functools.partial(fcn_resnet, 17),
        "deeplabv3": functools.partial(deeplabv3_resnet, 17),
        "resnet": functools.partial(upernet_resnet, 17, width=WIDTH, head_width=HEAD),
        "convnext": functools.partial(upernet_convnext, "toy", head_width=HEAD),
        "swin": functools.partial(upernet_swin, "toy", WINDOW, head_width=HEAD),
    }
    for name, row in rows.items():
        monkeypatch.setitem(SEGMENTERS, f"toy_{name}", functools.partial(row, auxiliary=True))
        monkeypatch.setitem(SEGMENTERS, f"toy_{name}_alone", row)


def torchvision_model(name):
    from torchvision.models.resnet import Bottleneck, ResNet
    from torchvision.models.segmentation.deeplabv3 import _deeplabv3_resnet
    from torchvision.models.segmentation.fcn import _fcn_resnet

    backbone = ResNet(Bottleneck, list(BLOCKS), replace_stride_with_dilation=[False, True, True])
    build = _fcn_resnet if name == "fcn" else _deeplabv3_resnet
    return build(backbone, CLASSES, True)


def upernet(name):
    import transformers

    shape: dict[str, Any]
    stages: dict[str, Any] = {"out_features": [f"stage{i + 1}" for i in range(3 if name == "swin" else 4)]}
    if name == "resnet":
        sizes = [4 * WIDTH * 2**i for i in range(4)]
        shape = {"embedding_size": WIDTH, "hidden_sizes": sizes, "depths": list(BLOCKS)}
        config = transformers.ResNetConfig(layer_type="bottleneck", **shape, **stages)
    elif name == "convnext":
        shape = {"depths": list(CONVNEXT.depths), "hidden_sizes": list(CONVNEXT.widths)}
        config = transformers.ConvNextConfig(**shape, **stages)
    else:
        shape = {"embed_dim": SWIN.width, "depths": list(SWIN.depths), "num_heads": list(SWIN.num_heads)}
        config = transformers.SwinConfig(window_size=WINDOW, image_size=64, **shape, **stages)
    options: dict[str, Any] = {"hidden_size": HEAD, "num_labels": CLASSES, "auxiliary_in_channels": None}
    return transformers.UperNetForSemanticSegmentation(transformers.UperNetConfig(backbone_config=config, **options))


def logits_of_torchvision(module, x):
    out = module(x)
    return [out["out"], out["aux"]]


def logits_of_upernet(module, x):
    import torch

    second = module.auxiliary_head(module.backbone(x).feature_maps)
    resize = torch.nn.functional.interpolate
    return [module(x).logits, resize(second, size=x.shape[2:], mode="bilinear", align_corners=False)]


REFERENCES = [
    ("fcn", "torchvision_fcn", torchvision_model, logits_of_torchvision, (41, 50)),
    ("deeplabv3", "torchvision_deeplabv3", torchvision_model, logits_of_torchvision, (41, 50)),
    ("resnet", "hf_upernet_resnet", upernet, logits_of_upernet, (75, 98)),
    ("convnext", "hf_upernet_convnext", upernet, logits_of_upernet, (75, 98)),
    ("swin", "hf_upernet_swin", upernet, logits_of_upernet, (66, 90)),
]


def saved(module, folder):
    """As published: a state dict, or what transformers writes, whose names differ from those in memory."""
    import torch

    if hasattr(module, "save_pretrained"):
        module.save_pretrained(folder)
        return folder / "model.safetensors"
    torch.save(module.state_dict(), folder / "model.pth")
    return folder / "model.pth"


def tensors_of(path):
    import torch
    from safetensors.numpy import load_file

    if path.suffix == ".safetensors":
        return load_file(path)
    return {name: x.numpy() for name, x in torch.load(path).items()}


@pytest.mark.parametrize(("name", "layout", "build", "run", "size"), REFERENCES, ids=[r[1] for r in REFERENCES])
def test_logits_and_every_tensor_back(name, layout, build, run, size, tmp_path, rng, assert_close):
    import torch

    module = randomised(build(name), kernel_scale=1.2)
    path, row = saved(module, tmp_path), LAYOUTS[layout]
    model, state = eqvision.load(f"toy_{name}", path)
    assert {each.name for each in LAYOUTS.values() if each.describes(model)} == {"eqvision", layout}
    images = rng.normal(size=(2, *size, 3)).astype(np.float32)
    with torch.no_grad():
        outputs = run(module.double(), torch.tensor(images).permute(0, 3, 1, 2).double())
    ours = eqx.filter_jit(lambda m, s, x: m.with_auxiliary(x, s)[0])(model, state, jnp.asarray(images))
    # a dozen layers in float32 behind each other, against the same in float64
    assert_close(list(ours), [each.permute(0, 2, 3, 1).numpy() for each in outputs], 1e-5 if name == "fcn" else 5e-5)

    tensors = tensors_of(path)
    read = {n: x for n, x in tensors.items() if not row.ignores(n) or n.startswith("aux")}
    read = {n: x for n, x in read.items() if not n.endswith("num_batches_tracked")}
    again = to_layout(model, state, row)
    assert set(again) == set(read)
    for each, tensor in read.items():
        np.testing.assert_array_equal(again[each], tensor, err_msg=each)
    alone, _ = eqvision.load(f"toy_{name}_alone", path, num_classes=3)
    assert alone.auxiliary == ()
    assert alone.head.pixels.conv.bias.shape == (3,)


def test_mask_transformer(rng, assert_close):
    """rstrudel/segmenter's ``MaskTransformer`` of one block, in PyTorch."""
    import torch

    width, heads, classes, functional = 16, 2, 5, torch.nn.functional
    head = eqx.filter_jit(MaskTransformerHead)(width, classes, depth=1, num_heads=heads, key=jax.random.key(0))
    head = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.4, jnp.float32), head)
    patches = rng.normal(size=(2, 3, 4, width)).astype(np.float32)
    features = TokenFeatures(jnp.zeros((2, 1, width)), jnp.asarray(patches))
    ours = eqx.filter_jit(lambda h, f: h(f, eqx.nn.State(h))[0])(head, features)

    block = jax.tree.map(lambda x: torch.tensor(np.asarray(x[0])).double(), head.blocks.blocks)
    head = jax.tree.map(lambda x: torch.tensor(np.asarray(x)).double(), head)

    def linear(layer, x):
        return x @ layer.weight + layer.bias

    def norm(layer, x):
        return functional.layer_norm(x, x.shape[-1:], layer.weight, layer.bias, eps=1e-5)

    def attend(x):
        b, n, _ = x.shape
        attention = block.attention
        parts = [linear(each, x) for each in (attention.query, attention.key, attention.value)]
        q, k, v = (each.reshape(b, n, heads, -1).transpose(1, 2) for each in parts)
        weights = (q @ k.transpose(-2, -1) * (width // heads) ** -0.5).softmax(-1)
        return linear(attention.out, (weights @ v).transpose(1, 2).reshape(b, n, width))

    x = linear(head.projection, torch.tensor(patches).double().reshape(2, 12, width))
    x = torch.cat([x, head.classes.expand(2, -1, -1)], 1)
    x = x + attend(norm(block.norm1, x))
    x = x + linear(block.mlp.fc2, functional.gelu(linear(block.mlp.fc1, norm(block.norm2, x))))
    x = norm(head.norm, x)
    patches, embeddings = x[:, :12] @ head.patch_projection, x[:, 12:] @ head.class_projection
    patches, embeddings = (each / each.norm(dim=-1, keepdim=True) for each in (patches, embeddings))
    masks = norm(head.mask_norm, patches @ embeddings.transpose(1, 2))
    assert_close(ours, masks.reshape(2, 3, 4, classes).numpy(), 1e-5)
