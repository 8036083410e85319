"""Rows of the zoo that work with text: one builder per model name, called with ``key`` and what it has of sizes."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from eqvision.backbones import bert_encoder
from eqvision.backbones.t5 import T5Size
from eqvision.detectors.owlvit import owlvit
from eqvision.language import T5, bert_classifier, bert_pretraining
from eqvision.multimodal import CLIP_RESNET_SIZES, CLIP_VIT_SIZES, SIGLIP_SIZES, clip_resnet, clip_vit, siglip
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
    "t5_efficient_tiny": partial(T5, T5Size(256, 4, 4, 64, 1024, gated=False), tied=True),  # Tay et al. 2022
    "clip_vit_b32": partial(clip_vit, CLIP_VIT_SIZES["b32"]),
    "clip_vit_b16": partial(clip_vit, CLIP_VIT_SIZES["b16"]),
    "clip_vit_l14": partial(clip_vit, CLIP_VIT_SIZES["l14"]),
    "clip_vit_l14_336": partial(clip_vit, CLIP_VIT_SIZES["l14_336"]),
    "clip_resnet50": partial(clip_resnet, CLIP_RESNET_SIZES["50"]),
    "clip_resnet101": partial(clip_resnet, CLIP_RESNET_SIZES["101"]),
    "clip_resnet50x4": partial(clip_resnet, CLIP_RESNET_SIZES["50x4"]),
    "clip_resnet50x16": partial(clip_resnet, CLIP_RESNET_SIZES["50x16"]),
    "clip_resnet50x64": partial(clip_resnet, CLIP_RESNET_SIZES["50x64"]),
    "siglip_b16": partial(siglip, SIGLIP_SIZES["b16"]),
    "siglip_l16": partial(siglip, SIGLIP_SIZES["l16"]),
    "siglip_so400m14": partial(siglip, SIGLIP_SIZES["so400m14"]),
    "owlvit_b32": partial(owlvit, "b32"),
    "owlvit_b16": partial(owlvit, "b16"),
    "owlvit_l14": partial(owlvit, "l14"),
    "owlv2_b16": partial(owlvit, "v2_b16", objectness=True),
    "owlv2_l14": partial(owlvit, "v2_l14", objectness=True),
    "owlvit_small": partial(owlvit, "small", class_std=0.02),
}

SIZES = ("num_classes", "image_size", "in_channels")


def language_builder(name: str, options: Mapping[str, Any]) -> Callable[..., Any]:
    """The builder of a name with other ``options`` than its row's; called with ``key`` and with sizes that differ.

    Raises UnknownNameError with the nearest names, ValueError for an option or a size that the model does not have.
    """
    if name not in LANGUAGE:
        raise nearest(name, list(LANGUAGE), "model")
    row = LANGUAGE[name]
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
