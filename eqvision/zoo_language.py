"""Rows of the zoo that work with text: one builder per model name, called with ``key`` and what it has of sizes."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from eqvision.backbones import bert_encoder
from eqvision.backbones.t5 import T5_V1_0, T5_V1_1, T5Encoder, T5Size
from eqvision.detectors.owlvit import owlvit
from eqvision.language import (
    T5,
    bert_classifier,
    bert_pretraining,
    git_text_base,
    git_text_large,
    mt5_base,
    mt5_large,
    mt5_small,
    mt5_xl,
    mt5_xxl,
    t5_base,
    t5_large,
    t5_small,
    t5_v1_1_base,
    t5_v1_1_large,
    t5_v1_1_small,
    t5_v1_1_xl,
    t5_v1_1_xxl,
    t5_xl,
    t5_xxl,
)
from eqvision.multimodal import CLIP_RESNET_SIZES, CLIP_VIT_SIZES, SIGLIP_SIZES, Clip, clip_resnet, clip_vit, siglip
from eqvision.multimodal.clip_small import clip_tiny
from eqvision.names import nearest

# A row takes ``num_classes``, ``image_size`` and ``in_channels`` only if it has such a thing.
LANGUAGE: dict[str, Callable[..., Any]] = {
    "bert_ti": partial(bert_pretraining, "ti"),
    "bert_mini": partial(bert_pretraining, "mini"),
    "bert_small": partial(bert_pretraining, "small"),
    "bert_medium": partial(bert_pretraining, "medium"),
    "bert_s": partial(bert_pretraining, "s"),
    "bert_b": partial(bert_pretraining, "b"),
    "bert_l": partial(bert_pretraining, "l"),
    "bert_ti_classifier": partial(bert_classifier, "ti"),
    "bert_mini_classifier": partial(bert_classifier, "mini"),
    "bert_small_classifier": partial(bert_classifier, "small"),
    "bert_medium_classifier": partial(bert_classifier, "medium"),
    "bert_s_classifier": partial(bert_classifier, "s"),
    "bert_b_classifier": partial(bert_classifier, "b"),
    "bert_l_classifier": partial(bert_classifier, "l"),
    "bert_ti_encoder": partial(bert_encoder, "ti"),
    "bert_mini_encoder": partial(bert_encoder, "mini"),
    "bert_small_encoder": partial(bert_encoder, "small"),
    "bert_medium_encoder": partial(bert_encoder, "medium"),
    "bert_s_encoder": partial(bert_encoder, "s"),
    "bert_b_encoder": partial(bert_encoder, "b"),
    "bert_l_encoder": partial(bert_encoder, "l"),
    "t5_xs": partial(T5, T5Size(128, 2, 4, 32, 512, gated=False), tied=True),  # ours, for texts of a few megabytes
    "t5_efficient_tiny": partial(T5, T5Size(256, 4, 4, 64, 1024, gated=False), tied=True),  # Tay et al. 2022
    "t5_efficient_tiny_nl2": partial(T5, T5Size(256, 2, 4, 64, 1024, gated=False), tied=True),
    "t5_small": t5_small,
    "t5_base": t5_base,
    "t5_large": t5_large,
    "t5_xl": t5_xl,
    "t5_xxl": t5_xxl,
    "t5_v1_1_small": t5_v1_1_small,  # and FLAN-T5
    "t5_v1_1_base": t5_v1_1_base,
    "t5_v1_1_large": t5_v1_1_large,
    "t5_v1_1_xl": t5_v1_1_xl,
    "t5_v1_1_xxl": t5_v1_1_xxl,
    "mt5_small": mt5_small,
    "mt5_base": mt5_base,
    "mt5_large": mt5_large,
    "mt5_xl": mt5_xl,
    "mt5_xxl": mt5_xxl,
    "t5_small_encoder": partial(T5Encoder, T5_V1_0["small"]),
    "t5_base_encoder": partial(T5Encoder, T5_V1_0["base"]),
    "t5_large_encoder": partial(T5Encoder, T5_V1_0["large"]),
    "t5_xl_encoder": partial(T5Encoder, T5_V1_0["xl"]),
    "t5_xxl_encoder": partial(T5Encoder, T5_V1_0["xxl"]),
    "t5_v1_1_small_encoder": partial(T5Encoder, T5_V1_1["small"]),
    "t5_v1_1_base_encoder": partial(T5Encoder, T5_V1_1["base"]),
    "t5_v1_1_large_encoder": partial(T5Encoder, T5_V1_1["large"]),
    "t5_v1_1_xl_encoder": partial(T5Encoder, T5_V1_1["xl"]),
    "t5_v1_1_xxl_encoder": partial(T5Encoder, T5_V1_1["xxl"]),
    "git_text_base": git_text_base,
    "git_text_large": git_text_large,
    "clip_vit_b32": partial(clip_vit, CLIP_VIT_SIZES["b32"]),
    "clip_vit_b16": partial(clip_vit, CLIP_VIT_SIZES["b16"]),
    "clip_vit_l14": partial(clip_vit, CLIP_VIT_SIZES["l14"]),
    "clip_vit_l14_336": partial(clip_vit, CLIP_VIT_SIZES["l14_336"]),
    "clip_resnet50": partial(clip_resnet, CLIP_RESNET_SIZES["50"]),
    "clip_resnet101": partial(clip_resnet, CLIP_RESNET_SIZES["101"]),
    "clip_resnet50x4": partial(clip_resnet, CLIP_RESNET_SIZES["50x4"]),
    "clip_resnet50x16": partial(clip_resnet, CLIP_RESNET_SIZES["50x16"]),
    "clip_resnet50x64": partial(clip_resnet, CLIP_RESNET_SIZES["50x64"]),
    "clip_tiny": partial(clip_tiny),
    "siglip_b16": partial(siglip, SIGLIP_SIZES["b16"]),
    "siglip_l16": partial(siglip, SIGLIP_SIZES["l16"]),
    "siglip_so400m14": partial(siglip, SIGLIP_SIZES["so400m14"]),
    "owlvit_b32": partial(owlvit, "b32"),
    "owlvit_b16": partial(owlvit, "b16"),
    "owlvit_l14": partial(owlvit, "l14"),
    "owlv2_b16": partial(owlvit, "v2_b16", objectness=True),
    "owlv2_l14": partial(owlvit, "v2_l14", objectness=True),
    "owlvit_small": partial(owlvit, "small", position="sincos2d", mimetic=True, class_std=0.02, class_factor=10.0),
}

SIZES = ("num_classes", "image_size", "in_channels")


def open_vocabulary_names() -> list[str]:
    """The rows that are open-vocabulary detectors."""
    return [name for name, row in LANGUAGE.items() if getattr(row, "func", None) is owlvit]


def clip_names() -> list[str]:
    """The rows that are models of images and text, CLIP and SigLIP."""
    return [name for name, row in LANGUAGE.items() if inspect.signature(row).return_annotation is Clip]


def language_builder(name: str, options: Mapping[str, Any]) -> Callable[..., Any]:
    """``sized_builder`` of a row of ``LANGUAGE``. Raises UnknownNameError with the nearest names."""
    if name not in LANGUAGE:
        raise nearest(name, list(LANGUAGE), "model")
    return sized_builder(name, LANGUAGE[name], options)


def sized_builder(name: str, row: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """The builder of a row with other ``options``; called with ``key`` and with sizes that differ from the row's.

    Raises ValueError for an option or a size that the model does not have.
    """
    accepted = inspect.signature(row).parameters
    _check_options(name, options, [option for option in accepted if option not in (*SIZES, "key")])

    def build(
        *,
        num_classes: int | None = None,
        image_size: int | tuple[int, int] | None = None,
        in_channels: int | None = None,
        key: Any,
    ) -> Any:
        sizes = zip(SIZES, (num_classes, image_size, in_channels), strict=True)
        given = {size: value for size, value in sizes if value is not None}
        for size in given:
            if size not in accepted:
                raise ValueError(f"model {name!r} has no {size}, and {given[size]} is given; leave it out")
        return row(**{**options, **given}, key=key)

    return build


def _check_options(name: str, options: Mapping[str, Any], offered: list[str]) -> None:
    for option in options:
        if option not in offered:
            raise ValueError(f"model {name!r} has no option {option!r}; it has: {', '.join(offered) or 'none of them'}")
