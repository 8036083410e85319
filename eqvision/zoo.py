"""The zoo: one row per model name, and ``create`` and ``list_models`` that read the rows."""

import fnmatch
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, get_args

import equinox as eqx
from jaxtyping import PRNGKeyArray

from eqvision.classifiers import (
    Classifier,
    axial_resnet_classifier,
    bit_classifier,
    convnext_classifier,
    hybrid_classifier,
    mixer_classifier,
    mlp_classifier,
    resnet_cifar_classifier,
    resnet_classifier,
    small_cnn_classifier,
    swin_classifier,
    vit_classifier,
)
from eqvision.detectors import (
    cascade_mask_rcnn_vitdet_b,
    cascade_mask_rcnn_vitdet_h,
    cascade_mask_rcnn_vitdet_l,
    centernet_dla34,
    centernet_hourglass104,
    centernet_r18_dcn,
    centernet_resnet,
    deformable_detr,
    detr,
    mask_rcnn_small,
    mask_rcnn_vitdet_b,
    mask_rcnn_vitdet_h,
    mask_rcnn_vitdet_l,
    rcnn_resnet_fpn,
)
from eqvision.layers import Implementation, Remat
from eqvision.models import Model
from eqvision.names import nearest
from eqvision.pretraining import MAES
from eqvision.segmenters import (
    deeplabv3_resnet,
    deeplabv3plus_resnet,
    fcn_resnet,
    setr_naive,
    unet,
    upernet_convnext,
    upernet_resnet,
    upernet_swin,
    vit_segmenter,
)
from eqvision.segmenters.sam import prompted_sam, sam_small
from eqvision.zoo_language import LANGUAGE, language_builder, sized_builder

# What google-research/vision_transformer and big_vision do otherwise than timm.
augreg = partial(vit_classifier, activation="gelu_tanh", zero_head=True)
big_vision = partial(vit_classifier, activation="gelu_tanh", zero_head=True, position_on_class=False, pool="map")
# timm's global average pool, and MAE's: the norm stands behind it.
gap = partial(vit_classifier, pool="mean", norm_after_pool=True)
deit3 = partial(vit_classifier, position_on_class=False, layer_scale=1e-6)
dinov2 = partial(vit_classifier, pool="token_mean", layer_scale=1e-5)

MODELS: dict[str, Callable[..., Classifier]] = {
    "resnet18": partial(resnet_classifier, 18),
    "resnet34": partial(resnet_classifier, 34),
    "resnet50": partial(resnet_classifier, 50),
    "resnet101": partial(resnet_classifier, 101),
    "resnet152": partial(resnet_classifier, 152),
    "resnet20_cifar": partial(resnet_cifar_classifier, 20),
    "resnet32_cifar": partial(resnet_cifar_classifier, 32),
    "resnet44_cifar": partial(resnet_cifar_classifier, 44),
    "resnet56_cifar": partial(resnet_cifar_classifier, 56),
    "resnet110_cifar": partial(resnet_cifar_classifier, 110),
    "vit_ti4": partial(vit_classifier, "ti", 4),
    "vit_ti16": partial(vit_classifier, "ti", 16),
    "vit_s16": partial(vit_classifier, "s", 16),
    "vit_s32": partial(vit_classifier, "s", 32),
    "vit_b8": partial(vit_classifier, "b", 8),
    "vit_b16": partial(vit_classifier, "b", 16),
    "vit_b32": partial(vit_classifier, "b", 32),
    "vit_l16": partial(vit_classifier, "l", 16),
    "vit_l32": partial(vit_classifier, "l", 32),
    "vit_h14": partial(vit_classifier, "h", 14),
    "vit_g14": partial(vit_classifier, "g", 14),
    "vit_G14": partial(vit_classifier, "G", 14),
    "vit_e14": partial(vit_classifier, "e", 14),
    "vit_b16_in21k": partial(augreg, "b", 16, pre_logits=768),
    "vit_l16_in21k": partial(augreg, "l", 16, pre_logits=1024),
    "vit_s16_reg4_mean": partial(gap, "s", 16, num_registers=4),
    "vit_b16_reg4_mean": partial(gap, "b", 16, num_registers=4),
    "vit_m16_reg4_mean": partial(gap, "m", 16, num_registers=4, layer_scale=1e-5),
    "vit_betwixt16_reg4_mean": partial(gap, "betwixt", 16, num_registers=4, layer_scale=1e-5),
    "vit_m16_mean": partial(vit_classifier, "m", 16, pool="mean", use_qkv_bias=False, layer_scale=1e-6),
    "vit_h14_mean": partial(vit_classifier, "h", 14, pool="mean"),
    "vit_xs4_mae": partial(gap, "xs", 4, class_token=True),  # fine-tuned from mae_vit_xs4
    "vit_b16_mae": partial(gap, "b", 16, class_token=True),
    "vit_l16_mae": partial(gap, "l", 16, class_token=True),
    "vit_h14_mae": partial(gap, "h", 14, class_token=True),
    "deit_ti16": partial(vit_classifier, "ti", 16),
    "deit_s16": partial(vit_classifier, "s", 16),
    "deit_b16": partial(vit_classifier, "b", 16),
    "deit_ti16_distilled": partial(vit_classifier, "ti", 16, distillation_token=True),
    "deit_s16_distilled": partial(vit_classifier, "s", 16, distillation_token=True),
    "deit_b16_distilled": partial(vit_classifier, "b", 16, distillation_token=True),
    "deit3_s16": partial(deit3, "s", 16),
    "deit3_m16": partial(deit3, "m", 16),
    "deit3_b16": partial(deit3, "b", 16),
    "deit3_l16": partial(deit3, "l", 16),
    "deit3_h14": partial(deit3, "h", 14),
    "vit_s14_dinov2": partial(dinov2, "s", 14),
    "vit_b14_dinov2": partial(dinov2, "b", 14),
    "vit_l14_dinov2": partial(dinov2, "l", 14),
    "vit_g14_dinov2": partial(dinov2, "g_dinov2", 14, mlp="swiglu"),
    "vit_s14_reg4_dinov2": partial(dinov2, "s", 14, num_registers=4),
    "vit_b14_reg4_dinov2": partial(dinov2, "b", 14, num_registers=4),
    "vit_l14_reg4_dinov2": partial(dinov2, "l", 14, num_registers=4),
    "vit_g14_reg4_dinov2": partial(dinov2, "g_dinov2", 14, num_registers=4, mlp="swiglu"),
    "vit_ti16_augreg": partial(augreg, "ti", 16),
    "vit_s16_augreg": partial(augreg, "s", 16),
    "vit_s32_augreg": partial(augreg, "s", 32),
    "vit_b8_augreg": partial(augreg, "b", 8),
    "vit_b16_augreg": partial(augreg, "b", 16),
    "vit_b32_augreg": partial(augreg, "b", 32),
    "vit_l16_augreg": partial(augreg, "l", 16),
    "vit_s16_big_vision": partial(big_vision, "s", 16, pool="mean", position="sincos2d_big_vision", pre_logits=384),
    "vit_b16_big_vision": partial(big_vision, "b", 16),
    "vit_l16_big_vision": partial(big_vision, "l", 16),
    "vit_h14_big_vision": partial(big_vision, "h", 14),
    "vit_g14_big_vision": partial(big_vision, "g", 14),
    "vit_G14_big_vision": partial(big_vision, "G", 14),
    "vit_e14_big_vision": partial(big_vision, "e", 14),
    "vit_ti_r_s16": partial(hybrid_classifier, "r_ti16"),
    "vit_s_r26_s32": partial(hybrid_classifier, "r26_s32"),
    "vit_b_r26_s32": partial(hybrid_classifier, "r26_b32"),
    "vit_b_r50_s16": partial(hybrid_classifier, "r50_b16"),
    "vit_b_r50_s16_in21k": partial(hybrid_classifier, "r50_b16", pre_logits=768),
    "vit_l_r50_s32": partial(hybrid_classifier, "r50_l32"),
    "mixer_s16": partial(mixer_classifier, "s", 16),
    "mixer_s32": partial(mixer_classifier, "s", 32),
    "mixer_b16": partial(mixer_classifier, "b", 16),
    "mixer_b32": partial(mixer_classifier, "b", 32),
    "mixer_l16": partial(mixer_classifier, "l", 16),
    "mixer_l32": partial(mixer_classifier, "l", 32),
    "mixer_h14": partial(mixer_classifier, "h", 14),
    "bit_r50x1": partial(bit_classifier, 50, 1),
    "bit_r50x3": partial(bit_classifier, 50, 3),
    "bit_r101x1": partial(bit_classifier, 101, 1),
    "bit_r101x3": partial(bit_classifier, 101, 3),
    "bit_r152x2": partial(bit_classifier, 152, 2),
    "bit_r152x4": partial(bit_classifier, 152, 4),
    "convnext_tiny": partial(convnext_classifier, "tiny"),
    "convnext_small": partial(convnext_classifier, "small"),
    "convnext_base": partial(convnext_classifier, "base"),
    "convnext_large": partial(convnext_classifier, "large"),
    "convnext_xlarge": partial(convnext_classifier, "xlarge"),
    "convnextv2_atto": partial(convnext_classifier, "atto", version=2),
    "convnextv2_femto": partial(convnext_classifier, "femto", version=2),
    "convnextv2_pico": partial(convnext_classifier, "pico", version=2),
    "convnextv2_nano": partial(convnext_classifier, "nano", version=2),
    "convnextv2_tiny": partial(convnext_classifier, "tiny", version=2),
    "convnextv2_base": partial(convnext_classifier, "base", version=2),
    "convnextv2_large": partial(convnext_classifier, "large", version=2),
    "convnextv2_huge": partial(convnext_classifier, "huge", version=2),
    "axial_resnet26": partial(axial_resnet_classifier, 26),
    "axial_resnet50": partial(axial_resnet_classifier, 50),
    "axial_resnet101": partial(axial_resnet_classifier, 101),
    "axial_resnet152": partial(axial_resnet_classifier, 152),
    "swin_t": partial(swin_classifier, "t"),
    "swin_s": partial(swin_classifier, "s"),
    "swin_b": partial(swin_classifier, "b"),
    "swin_l": partial(swin_classifier, "l"),
    "swin_b_window12": partial(swin_classifier, "b", 12),
    "swin_l_window12": partial(swin_classifier, "l", 12),
    "small_cnn": small_cnn_classifier,
    "mlp": mlp_classifier,
}


SMALL_DETR = partial(
    deformable_detr,
    18,
    norm="batch",
    num_queries=50,
    num_levels=3,
    refine=True,
    width=128,
    mlp_dim=256,
    encoder_depth=2,
    decoder_depth=3,
)

CASCADE_RCNN = partial(rcnn_resnet_fpn, 50, cascade=True, num_classes=80)

DETECTORS: dict[str, Callable[..., Model]] = {
    "detr_r50": partial(detr, 50),
    "detr_r50_dc5": partial(detr, 50, dc5=True),
    "detr_r101": partial(detr, 101),
    "detr_r101_dc5": partial(detr, 101, dc5=True),
    # 250: things and stuff of COCO by their ids, as facebookresearch/detr has them
    "detr_r50_panoptic": partial(detr, 50, masks=True, num_classes=250),
    # of our own making, for small images: from scratch, and from a classifier of ImageNet
    "deformable_detr_small": partial(SMALL_DETR, backbone_width=32),
    "deformable_detr_r18": SMALL_DETR,
    "deformable_detr_r50": partial(deformable_detr, 50),
    "deformable_detr_r50_refine": partial(deformable_detr, 50, refine=True),
    "deformable_detr_r50_two_stage": partial(deformable_detr, 50, refine=True, two_stage=True),
    "deformable_detr_r50_single_scale": partial(deformable_detr, 50, num_levels=1),
    "deformable_detr_r50_single_scale_dc5": partial(deformable_detr, 50, num_levels=1, dc5=True),
    # torchvision's rules unless ``dialect`` says otherwise; published weights bring their own
    "faster_rcnn_r50_fpn": partial(rcnn_resnet_fpn, 50),
    "mask_rcnn_r50_fpn": partial(rcnn_resnet_fpn, 50, masks=True),
    "faster_rcnn_r50_fpn_v2": partial(rcnn_resnet_fpn, 50, v2=True, norm="batch"),
    "mask_rcnn_r50_fpn_v2": partial(rcnn_resnet_fpn, 50, masks=True, v2=True, norm="batch"),
    "cascade_rcnn_r50_fpn": partial(CASCADE_RCNN, dialect="mmdet"),
    "cascade_mask_rcnn_r50_fpn": partial(CASCADE_RCNN, masks=True, dialect="detectron2"),
    # made for images of ``image_size``, 1024 as published; other sizes are taken too
    "mask_rcnn_vitdet_b": mask_rcnn_vitdet_b,
    "mask_rcnn_vitdet_l": mask_rcnn_vitdet_l,
    "mask_rcnn_vitdet_h": mask_rcnn_vitdet_h,
    "cascade_mask_rcnn_vitdet_b": cascade_mask_rcnn_vitdet_b,
    "cascade_mask_rcnn_vitdet_l": cascade_mask_rcnn_vitdet_l,
    "cascade_mask_rcnn_vitdet_h": cascade_mask_rcnn_vitdet_h,
    "mask_rcnn_small": mask_rcnn_small,
    "centernet_r18_dcn": centernet_r18_dcn,
    "centernet_r101_dcn": partial(centernet_resnet, 101),
    "centernet_dla34": centernet_dla34,
    "centernet_hourglass104": centernet_hourglass104,
}

SEGMENTERS: dict[str, Callable[..., Model]] = {
    # milesial/Pytorch-UNet's
    "unet": unet,
    # Ronneberger et al. 2015, figure 1; reflects images of any size as in figure 2
    "unet_paper": partial(unet, norm="none", border="valid"),
    # for processors, of our own making: 6.5 G multiply-adds for 352x480 pixels, where unet has 124 G
    "unet_small": partial(unet, width=32, stem_stride=2, up="bilinear"),
    "unet_tiny": partial(unet, width=16, stem_stride=2, up="bilinear"),
    # torchvision's
    "fcn_r50": partial(fcn_resnet, 50),
    "fcn_r101": partial(fcn_resnet, 101),
    "deeplabv3_r50": partial(deeplabv3_resnet, 50),
    "deeplabv3_r101": partial(deeplabv3_resnet, 101),
    "deeplabv3plus_r50": partial(deeplabv3plus_resnet, 50),
    "deeplabv3plus_r101": partial(deeplabv3plus_resnet, 101),
    "segmenter_vit_ti16_linear": partial(vit_segmenter, "ti", 16, decoder="linear"),
    "segmenter_vit_ti16_mask": partial(vit_segmenter, "ti", 16, decoder="mask"),
    "segmenter_vit_s16_linear": partial(vit_segmenter, "s", 16, decoder="linear"),
    "segmenter_vit_s16_mask": partial(vit_segmenter, "s", 16, decoder="mask"),
    "segmenter_vit_b16_linear": partial(vit_segmenter, "b", 16, decoder="linear"),
    "segmenter_vit_b16_mask": partial(vit_segmenter, "b", 16, decoder="mask"),
    "segmenter_vit_l16_linear": partial(vit_segmenter, "l", 16, decoder="linear"),
    "segmenter_vit_l16_mask": partial(vit_segmenter, "l", 16, decoder="mask"),
    "setr_naive_vit_b16": partial(setr_naive, "b", 16),
    "setr_naive_vit_l16": partial(setr_naive, "l", 16),
    "upernet_r50": partial(upernet_resnet, 50),
    "upernet_r101": partial(upernet_resnet, 101),
    "upernet_swin_t": partial(upernet_swin, "t"),
    "upernet_swin_s": partial(upernet_swin, "s"),
    "upernet_swin_b": partial(upernet_swin, "b"),
    "upernet_convnext_tiny": partial(upernet_convnext, "tiny"),
    "upernet_convnext_small": partial(upernet_convnext, "small"),
    "upernet_convnext_base": partial(upernet_convnext, "base"),
}

PROMPTED: dict[str, Callable[..., Model]] = {
    # Segment Anything; classes are the masks of a prompt. Made for images of 1024 pixels, which ``image_size`` says
    "sam_vit_b": partial(prompted_sam, "b"),
    "sam_vit_l": partial(prompted_sam, "l"),
    "sam_vit_h": partial(prompted_sam, "h"),
    # Of our own making: for images of 96 pixels, trained from scratch on a CPU.
    "sam_small": partial(sam_small),
}

Kind = Literal["classifier", "detector", "segmenter", "prompted", "language", "masked"]

TABLES: dict[str, dict[str, Callable[..., Any]]] = {
    "classifier": MODELS,
    "detector": DETECTORS,
    "segmenter": SEGMENTERS,
    "prompted": PROMPTED,
    "language": LANGUAGE,
    "masked": MAES,
}


def list_models(pattern: str = "*", *, pretrained: bool = False, kind: Kind = "classifier") -> list[str]:
    """Names that match a shell pattern such as ``vit*``; ``pretrained``: those with published weights.

    Raises ValueError for a ``kind`` of model that there is none of.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind {kind!r} of model is unknown; choose from {get_args(Kind)}")
    names = sorted(fnmatch.filter(TABLES[kind], pattern))
    if not pretrained:
        return names
    from eqvision.pretrained.cards import cards  # which comes after the zoo

    known = {card.name for card in cards()}
    return [name for name in names if name in known]


def create(
    name: str,
    *,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    in_channels: int | None = None,
    dropout: float | None = None,
    drop_path: float | None = None,
    remat: Remat | None = None,
    unroll: int | None = None,
    attention: Implementation | None = None,
    key: PRNGKeyArray,
) -> tuple[Any, eqx.nn.State]:
    """A freshly initialised model of the zoo and its state (running statistics; empty for models without).

    It is a ``Classifier``, a detector such as ``DETR``, a segmenter such as ``UNet``, ``SAM``, or a model of text or of
    text and images. ``num_classes`` None: the 1000 of ImageNet for a classifier, the row's for the others, such as the
    91 ids of COCO for a detector (a class for no object comes on top of them). ``image_size`` None: 224, of models with
    text their own; it matters to models with learned positions, and networks of convolutions take any size.
    ``in_channels`` None: 3. The options from ``dropout`` on are passed to models that have them.

    Raises UnknownNameError with the nearest names, ValueError for an option that the model does not have.
    """
    options = {"dropout": dropout, "drop_path": drop_path, "remat": remat, "unroll": unroll, "attention": attention}
    build = builder(name, {option: value for option, value in options.items() if value is not None})
    return eqx.nn.make_with_state(build)(
        num_classes=num_classes, image_size=image_size, in_channels=in_channels, key=key
    )


def row_of(name: str) -> Callable[..., Any]:
    """The builder behind a name, called with key and the sizes that it has. Raises UnknownNameError."""
    for table in TABLES.values():
        if name in table:
            return table[name]
    raise nearest(name, [name for table in TABLES.values() for name in table], "model")


def default_classes(name: str) -> int:
    """How many classes ``create`` gives where none are asked for. Raises UnknownNameError."""
    return 1000 if name in MODELS else inspect.signature(row_of(name)).parameters["num_classes"].default


def require_classifier(name: str) -> None:
    """Raise ValueError for other models, where only classifiers are of use; unknown names are for ``builder``."""
    if name in DETECTORS:
        raise ValueError(
            f"model {name!r} is a detector, and this takes image classifiers (eqvision list); "
            "docs/detection.md says what there is for detectors"
        )
    if name in SEGMENTERS:
        raise ValueError(f"model {name!r} is a segmenter, and this takes image classifiers (eqvision list)")
    if name in PROMPTED:
        raise ValueError(
            f"model {name!r} gives masks for prompts, and this takes image classifiers (eqvision list); "
            "docs/segmentation.md says what there is for it"
        )
    if name in LANGUAGE:
        raise ValueError(f"model {name!r} works with text, and this takes image classifiers (eqvision list)")
    if name in MAES:
        raise ValueError(
            f"model {name!r} is a masked autoencoder, and this takes image classifiers; docs/pretraining.md says how "
            "one becomes the other"
        )


def builder(name: str, options: Mapping[str, Any]) -> Callable[..., Any]:
    """The builder of a zoo name with other ``options`` than its row's, called as ``build`` below.

    Raises UnknownNameError with the nearest names, ValueError for an option that the model does not have.
    """
    if name in LANGUAGE:
        return language_builder(name, options)
    if name in MAES:
        return sized_builder(name, MAES[name], options)
    row = row_of(name)
    accepted = inspect.signature(row).parameters
    for option in options:
        if option not in accepted:
            offered = [o for o in accepted if o not in ("num_classes", "image_size", "in_channels", "key")]
            raise ValueError(f"model {name!r} has no option {option!r}; it has: {', '.join(offered) or 'none of them'}")

    default = default_classes(name)

    def build(
        *,
        num_classes: int | None = None,
        image_size: int | tuple[int, int] | None = None,
        in_channels: int | None = None,
        key: PRNGKeyArray,
    ) -> Model:
        size = {"image_size": 224 if image_size is None else image_size} if "image_size" in accepted else {}
        classes = default if num_classes is None else num_classes
        return row(num_classes=classes, in_channels=in_channels or 3, key=key, **size, **options)

    return build
