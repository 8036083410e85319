"""What ``eqvision info NAME`` prints: size, cost and features of a zoo model, from shapes alone."""

import inspect
import math
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp

from eqvision.counting import count
from eqvision.types import PaddedImages, TokenFeatures
from eqvision.zoo import MODELS, create, row_of


def describe(name: str, *, image_size: int = 224, num_classes: int | None = None, in_channels: int = 3) -> str:
    """Parameters by part, multiply-adds and activations of one image, and the features that the backbone gives.

    Raises UnknownNameError, and ValueError for an image size that the model cannot take.
    """
    model, state = eqx.filter_eval_shape(
        lambda: create(
            name, image_size=image_size, num_classes=num_classes, in_channels=in_channels, key=jax.random.key(0)
        )
    )
    images = jax.ShapeDtypeStruct((1, image_size, image_size, in_channels), jnp.float32)
    sizes: Any = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    inputs = images if name in MODELS else PaddedImages(cast(Any, images), sizes)
    counts = count(model, inputs, state)
    features = eqx.filter_eval_shape(lambda m, s, x: m.backbone(x, s)[0], model, state, images)
    lines = [
        f"{name}, {image_size}x{image_size}x{in_channels}, {_classes(name, num_classes)} classes",
        f"  parameters      {counts.params:,} ({counts.params * 4 / 1e6:.1f} MB in float32)",
        f"  multiply-adds   {counts.macs / 1e9:.3f} G for one image",
        f"  activations     {counts.activations / 1e6:.2f} M put out by matrix products and convolutions",
        f"  strides         {model.backbone.strides}",
        *(f"  feature         {line}" for line in _features(features)),
        "  parameters by part",
        *(f"    {part:<28}{size:>14,}" for part, size in _parts(model).items()),
    ]
    return "\n".join(lines)


def _classes(name: str, num_classes: int | None) -> int:
    """As ``create`` understands None."""
    if num_classes is not None:
        return num_classes
    return 1000 if name in MODELS else inspect.signature(row_of(name)).parameters["num_classes"].default


def _features(features: TokenFeatures | tuple[jax.ShapeDtypeStruct, ...]) -> list[str]:
    if isinstance(features, TokenFeatures):
        return [f"{name} {leaf.shape}" for name, leaf in features._asdict().items()]
    return [str(leaf.shape) for leaf in features]


def _parts(model: eqx.Module) -> dict[str, int]:
    """Parameters below each of the first two levels of names, in the order of the model."""
    sizes: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        name = ".".join(str(part).strip(".[]") for part in path[:2])
        sizes[name] = sizes.get(name, 0) + math.prod(leaf.shape)
    return sizes
