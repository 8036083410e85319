"""Small ViTs in the dialects of timm and facebookresearch, ours and timm's, for the tests of their layouts."""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
from safetensors.numpy import save_file

from eqvision.backbones import SIZES, ViTSize
from eqvision.classifiers import vit_classifier
from eqvision.pretrained import LAYOUTS, to_layout
from eqvision.zoo import MODELS

SHAPE = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4, "mlp_ratio": 1.5}


class Dialect(NamedTuple):
    """One kind of published ViT: how timm builds it, how our zoo does, and which layout must be recognised."""

    timm: dict[str, Any]
    ours: dict[str, Any]
    layout: str = "timm_vit"


GAP = {"class_token": False, "global_pool": "avg"}
DINOV2_REG = {"init_values": 1e-5, "reg_tokens": 3, "no_embed_class": True}

DIALECTS = {
    "token": Dialect({}, {}),
    "no_qkv_bias": Dialect({"qkv_bias": False}, {"use_qkv_bias": False}),
    "gap": Dialect({**GAP, "fc_norm": False}, {"pool": "mean"}),
    "gap_fc_norm": Dialect(GAP, {"pool": "mean", "norm_after_pool": True}),
    "reg_gap": Dialect(
        {**GAP, "reg_tokens": 3, "no_embed_class": True, "init_values": 1e-5},
        {"pool": "mean", "norm_after_pool": True, "num_registers": 3, "layer_scale": 1e-5},
        "timm_vit_reg",
    ),
    # MAE as fine-tuned: the class token stays, the average is over the patches.
    "mae_finetuned": Dialect({"global_pool": "avg"}, {"pool": "mean", "norm_after_pool": True, "class_token": True}),
    "distilled": Dialect({"distilled": True}, {"distillation_token": True}),
    "deit3": Dialect({"no_embed_class": True, "init_values": 1e-6}, {"position_on_class": False, "layer_scale": 1e-6}),
    "dinov2": Dialect({"init_values": 1e-5}, {"layer_scale": 1e-5}),
    "dinov2_reg": Dialect(DINOV2_REG, {"layer_scale": 1e-5, "num_registers": 3}, "timm_vit_reg"),
    "dinov2_giant": Dialect({"init_values": 1e-5, "swiglu": True}, {"layer_scale": 1e-5, "mlp": "swiglu"}),
}


def add_toys(monkeypatch):
    """The dialects as models of the zoo, three blocks deep, and names ``toy_...``."""
    monkeypatch.setitem(SIZES, "toy", ViTSize(width=32, depth=3, num_heads=4, mlp_dim=48))
    monkeypatch.setitem(SIZES, "toy_gated", ViTSize(width=32, depth=3, num_heads=4, mlp_dim=24))
    for name, dialect in DIALECTS.items():
        add_toy(monkeypatch, name, dialect.ours)


def add_toy(monkeypatch, name, options):
    row = functools.partial(vit_classifier, "toy_gated" if "mlp" in options else "toy", 4, **options)
    monkeypatch.setitem(MODELS, f"toy_{name}", row)


def timm_model(name, seed=0, num_classes=5, **changes):
    """timm's model of a dialect, with noise on every parameter."""
    import torch
    from timm.layers import SwiGLUPacked
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    options = {**SHAPE, **DIALECTS[name].timm, **changes}
    gated = {"mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU} if options.pop("swiglu", False) else {}
    build = VisionTransformerDistilled if options.pop("distilled", False) else VisionTransformer
    model = build(**options, **gated, num_classes=num_classes).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def numpy_state(model):
    return {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}


def written(tensors, folder):
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "file.safetensors")
    return folder / "file.safetensors"


def images_of(*size, seed=1):
    return np.random.default_rng(seed).normal(size=(2, *size, 3)).astype(np.float32)


def torch_images(images):
    import torch

    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


@eqx.filter_jit
def logits_of(model, state, images):
    return model(images, state)[0]


def timm_logits(model, images):
    import torch

    with torch.no_grad():
        return model(torch_images(images)).numpy()


def timm_features(model, images):
    """Prefix and grid behind each block, before the final norm."""
    import torch

    with torch.no_grad():
        outputs = model.forward_intermediates(
            torch_images(images), return_prefix_tokens=True, intermediates_only=True, output_fmt="NLC"
        )
    if model.num_prefix_tokens == 0:
        return [(np.zeros((2, 0, 32), np.float32), patches.numpy()) for patches in outputs]
    return [(prefix.numpy(), patches.numpy()) for patches, prefix in outputs]


@eqx.filter_jit
def blocks_of(model, state, images):
    return model.backbone.intermediates(images, state, (0, 1, 2), normalise=False)


def our_features(model, state, images):
    outputs = blocks_of(model, state, images)
    return [(np.asarray(f.prefix), np.asarray(f.patches).reshape(2, -1, 32)) for f in outputs]


def made(name, num_classes=5, seed=0):
    """A toy with noise on every leaf."""
    row = eqx.nn.make_with_state(MODELS[f"toy_{name}"])
    model, state = row(num_classes=num_classes, image_size=16, in_channels=3, key=jax.random.key(seed))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + rng.normal(size=x.shape).astype(np.float32), model), state


def ours_in_layout(name, layout, *dropped):
    return without(to_layout(*made(name), LAYOUTS[layout]), *dropped)


def without(tensors, *names):
    return {key: array for key, array in tensors.items() if key not in names}
