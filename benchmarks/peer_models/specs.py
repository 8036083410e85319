"""The networks that every contestant builds, as numbers only, and what a JAX contestant hands back."""

from collections.abc import Callable
from typing import Any, NamedTuple


class ViTSpec(NamedTuple):
    """Vision Transformer with class token and learned positions (Dosovitskiy et al. 2021, Table 1)."""

    width: int
    depth: int
    heads: int
    mlp_dim: int
    patch: int = 16
    num_classes: int = 1000
    image_size: int = 224


class ResNetSpec(NamedTuple):
    """Bottleneck ResNet v1.5, stride in the 3x3 (He et al. 2016, Table 1; torchvision's variant)."""

    width: int
    depths: tuple[int, ...]
    num_classes: int = 1000
    image_size: int = 224


Spec = ViTSpec | ResNetSpec

SPECS: dict[str, Spec] = {
    "vit_s16": ViTSpec(384, 12, 6, 1536),
    "vit_b16": ViTSpec(768, 12, 12, 3072),
    "vit_s16_depth24": ViTSpec(384, 24, 6, 1536),
    "resnet50": ResNetSpec(64, (3, 4, 6, 3)),
}

# At 224 px and 1000 classes, as timm lists them; the deep one adds 12 layers of 12 w^2 + 13 w.
PARAMETERS = {
    "vit_s16": 22_050_664,
    "vit_b16": 86_567_656,
    "vit_s16_depth24": 43_344_232,
    "resnet50": 25_557_032,
}

# Two layers at 32 px: what the tests run.
TOY_SPECS: dict[str, Spec] = {
    "vit_s16": ViTSpec(32, 2, 2, 64, num_classes=10, image_size=32),
    "resnet50": ResNetSpec(8, (1, 1), num_classes=10, image_size=32),
}


class JaxModel(NamedTuple):
    """Parameters, batch statistics and the two pure functions that one JAX contestant brings.

    ``evaluate(params, state, images) -> logits`` and ``train(params, state, images) -> (logits, state)``;
    every leaf of ``params`` and ``state`` is an array. ``channels_first`` says which image layout the
    functions take, since each contestant gets its native one.
    """

    params: Any
    state: Any
    evaluate: Callable
    train: Callable
    channels_first: bool = False
