"""The table behind the generic tests: one row for each name of the zoo, and the small models that those tests run.

A model that joins the zoo needs a row in ``CASES``, and a toy of its family in ``TOYS`` if the family is new.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax

from eqvision.backbones import (
    SIZES,
    AxialResNet,
    BiT,
    ConvNeXt,
    ConvNeXtSize,
    HybridViT,
    Mixer,
    MixerSize,
    SwinSize,
    SwinTransformer,
    VisionTransformer,
    ViTSize,
)
from eqvision.backbones.hybrid import HybridStem
from eqvision.backbones.resnet import ConvNorm, ResidualBlock, ResNet
from eqvision.classifiers import Classifier
from eqvision.heads import AttentionPool, DistilledHead, MapHead, NormedMapHead, NormPoolHead, TokenHead, zeros
from eqvision.zoo import MODELS


class Case(NamedTuple):
    """A zoo entry and what is published of it.

    ``params`` (1e6) and ``gmacs`` (1e9, one image of ``image_size``) are as printed by ``source``, None where
    nothing is published. ``extra`` is the number of parameters that the entry has and the published model has
    not, ``additions`` the work that the source counts and eqvision.counting does not. ``features`` are the
    shapes of the backbone's output without the batch axis: maps, fine to coarse, or the prefix and the grid of
    a transformer. ``resizes`` is False for models of one image size.
    """

    name: str
    image_size: int
    params: float | None
    gmacs: float | None
    features: tuple[tuple[int, ...], ...]
    source: str
    num_classes: int = 1000
    extra: int = 0
    additions: int = 0
    resizes: bool = True


def maps(side: int, channels: int, levels: int = 4) -> tuple[tuple[int, ...], ...]:
    """A pyramid whose sides halve and whose channels double."""
    return tuple((side >> i, side >> i, channels << i) for i in range(levels))


def tokens(prefix: int, side: int, width: int) -> tuple[tuple[int, ...], ...]:
    return (prefix, width), (side, side, width)


def tanh_layer(width: int) -> int:
    """Parameters of the pre-logits of ImageNet-21k, which timm has dropped."""
    return width * width + width


def attention_pool(size: str) -> int:
    """Parameters of attention pooling: query, four projections, norm and MLP."""
    width, _, _, mlp_dim = SIZES[size]
    return width + 4 * (width * width + width) + 2 * width + 2 * width * mlp_dim + mlp_dim + width


def pool_for_token(size: str) -> int:
    """What attention pooling adds to a model that loses the class token and its position."""
    return attention_pool(size) - 2 * SIZES[size].width


def stem_additions(*blocks: int) -> int:
    """What fvcore adds to a hybrid's stem at 224 px: 5 per normalised element and 4 per standardised weight."""
    normalised, standardised, channels, side = 64 * 112**2, 7 * 7 * 3 * 64, 64, 56
    for stage, depth in enumerate(blocks):
        inner, outer = 64 << stage, 256 << stage
        for block in range(depth):
            after = side // 2 if stage and not block else side
            projected = 0 if block else outer
            normalised += inner * side**2 + (inner + outer + projected) * after**2
            standardised += channels * (inner + projected) + 9 * inner**2 + inner * outer
            channels, side = outer, after
    return 5 * normalised + 4 * standardised


# "timm" is results/benchmark-infer-amp-nchw-pt240-cu124-rtx4090.csv of huggingface/pytorch-image-models,
# "torchvision" the weight enums. Where a size has several entries, AugReg's and big_vision's are of the same
# architecture as timm's.
TORCHVISION = "torchvision"
TIMM = "timm"
HE = "He et al. 2016, table 6; multiply-adds of chenyaofo/pytorch-cifar-models"  # of which 0.6 % are projections
# Chen et al. 2022 (PaLI), table 8: 3926 M and 1980 GFLOPs. Its parameters include attention pooling and the
# head for JFT-3B, of about 30 000 classes.
PALI = "Chen et al. 2022, table 8"
CONVNEXT_V2 = "README of facebookresearch/ConvNeXt-V2"

CASES = (
    Case("resnet18", 224, 11.689512, 1.814, maps(56, 64), TORCHVISION),
    Case("resnet34", 224, 21.797672, 3.664, maps(56, 64), TORCHVISION),
    Case("resnet50", 224, 25.557032, 4.089, maps(56, 256), TORCHVISION),
    Case("resnet101", 224, 44.549160, 7.801, maps(56, 256), TORCHVISION),
    Case("resnet152", 224, 60.192808, 11.514, maps(56, 256), TORCHVISION),
    Case("resnet20_cifar", 32, 0.27, 0.04081, maps(32, 16, 3), HE, num_classes=10),
    Case("resnet32_cifar", 32, 0.46, 0.06912, maps(32, 16, 3), HE, num_classes=10),
    Case("resnet44_cifar", 32, 0.66, 0.09744, maps(32, 16, 3), HE, num_classes=10),
    Case("resnet56_cifar", 32, 0.85, 0.12575, maps(32, 16, 3), HE, num_classes=10),
    Case("resnet110_cifar", 32, 1.7, 0.25289, maps(32, 16, 3), "He et al. 2016, table 6; Lin et al. 2020", 10),
    # Of our own making, for images of 32 pixels.
    Case("vit_xs4_mae", 32, None, None, tokens(1, 8, 128), "nothing published", num_classes=10),
    Case("vit_ti4", 32, None, None, tokens(1, 8, 192), "nothing published", num_classes=10),
    Case("vit_ti16", 224, 5.72, 1.26, tokens(1, 14, 192), TIMM),
    Case("vit_s16", 224, 22.05, 4.61, tokens(1, 14, 384), TIMM),
    Case("vit_s32", 224, 22.88, 1.15, tokens(1, 7, 384), TIMM),
    Case("vit_b8", 224, 86.58, 78.22, tokens(1, 28, 768), TIMM),
    Case("vit_b16", 224, 86.567656, 17.58, tokens(1, 14, 768), "torchvision, timm"),
    Case("vit_b32", 224, 88.224232, 4.41, tokens(1, 7, 768), "torchvision, timm"),
    Case("vit_l16", 224, 304.326632, 61.6, tokens(1, 14, 1024), "torchvision, timm"),
    Case("vit_l32", 224, 306.535400, 15.39, tokens(1, 7, 1024), "torchvision, timm"),
    Case("vit_h14", 224, 632.045800, 167.4, tokens(1, 16, 1280), "torchvision, timm"),
    Case("vit_g14", 224, 1012.61, 267.18, tokens(1, 16, 1408), TIMM),
    Case("vit_G14", 224, 1844.44, 483.95, tokens(1, 16, 1664), TIMM),
    Case("vit_e14", 224, 3926, 990, tokens(1, 16, 1792), PALI, 30_000, extra=-pool_for_token("e")),
    Case("vit_b16_in21k", 224, 86.567656, 17.58, tokens(1, 14, 768), "torchvision, timm", extra=tanh_layer(768)),
    Case("vit_l16_in21k", 224, 304.326632, 61.6, tokens(1, 14, 1024), "torchvision, timm", extra=tanh_layer(1024)),
    # timm has its small models with registers in other widths, so no multiply-adds of this one.
    Case("vit_s16_reg4_mean", 224, 22.05, None, tokens(4, 14, 384), TIMM, extra=2 * 384),
    Case("vit_b16_reg4_mean", 256, 86.62, 23.5, tokens(4, 16, 768), "timm vit_base_patch16_reg4_gap_256"),
    Case("vit_m16_reg4_mean", 256, 38.88, 10.76, tokens(4, 16, 512), TIMM),
    Case("vit_betwixt16_reg4_mean", 256, 60.4, 16.52, tokens(4, 16, 640), TIMM),
    Case("vit_m16_mean", 256, 38.86, 10.59, tokens(0, 16, 512), TIMM),
    # timm has this one without a head.
    Case("vit_h14_mean", 224, 630.76, 166.73, tokens(0, 16, 1280), TIMM, 0),
    Case("vit_b16_mae", 224, 86.567656, 17.58, tokens(1, 14, 768), "torchvision, timm"),
    Case("vit_l16_mae", 224, 304.326632, 61.6, tokens(1, 14, 1024), "torchvision, timm"),
    Case("vit_h14_mae", 224, 632.045800, 167.4, tokens(1, 16, 1280), "torchvision, timm"),
    Case("deit_ti16", 224, 5.72, 1.26, tokens(1, 14, 192), TIMM),
    Case("deit_s16", 224, 22.05, 4.61, tokens(1, 14, 384), TIMM),
    Case("deit_b16", 224, 86.57, 17.58, tokens(1, 14, 768), TIMM),
    Case("deit_ti16_distilled", 224, 5.91, 1.27, tokens(2, 14, 192), TIMM),
    Case("deit_s16_distilled", 224, 22.44, 4.63, tokens(2, 14, 384), TIMM),
    Case("deit_b16_distilled", 224, 87.34, 17.68, tokens(2, 14, 768), TIMM),
    Case("deit3_s16", 224, 22.06, 4.61, tokens(1, 14, 384), TIMM),
    Case("deit3_m16", 224, 38.85, 8.0, tokens(1, 14, 512), TIMM),
    Case("deit3_b16", 224, 86.59, 17.58, tokens(1, 14, 768), TIMM),
    Case("deit3_l16", 224, 304.37, 61.6, tokens(1, 14, 1024), TIMM),
    Case("deit3_h14", 224, 632.13, 167.4, tokens(1, 16, 1280), TIMM),
    # timm has DINOv2 without a head; with registers its class token has no position.
    Case("vit_s14_dinov2", 518, 22.06, 46.76, tokens(1, 37, 384), TIMM, 0),
    Case("vit_b14_dinov2", 518, 86.58, 151.71, tokens(1, 37, 768), TIMM, 0),
    Case("vit_l14_dinov2", 518, 304.37, 507.15, tokens(1, 37, 1024), TIMM, 0),
    Case("vit_g14_dinov2", 518, 1136.48, 1784.2, tokens(1, 37, 1536), TIMM, 0),
    Case("vit_s14_reg4_dinov2", 518, 22.06, 46.95, tokens(5, 37, 384), TIMM, 0, extra=384),
    Case("vit_b14_reg4_dinov2", 518, 86.58, 152.25, tokens(5, 37, 768), TIMM, 0, extra=768),
    Case("vit_l14_reg4_dinov2", 518, 304.37, 508.9, tokens(5, 37, 1024), TIMM, 0, extra=1024),
    Case("vit_g14_reg4_dinov2", 518, 1136.48, 1790.08, tokens(5, 37, 1536), TIMM, 0, extra=1536),
    Case("vit_ti16_augreg", 224, 5.72, 1.26, tokens(1, 14, 192), TIMM),
    Case("vit_s16_augreg", 224, 22.05, 4.61, tokens(1, 14, 384), TIMM),
    Case("vit_s32_augreg", 224, 22.88, 1.15, tokens(1, 7, 384), TIMM),
    Case("vit_b8_augreg", 224, 86.58, 78.22, tokens(1, 28, 768), TIMM),
    Case("vit_b16_augreg", 224, 86.567656, 17.58, tokens(1, 14, 768), "torchvision, timm"),
    Case("vit_b32_augreg", 224, 88.224232, 4.41, tokens(1, 7, 768), "torchvision, timm"),
    Case("vit_l16_augreg", 224, 304.326632, 61.6, tokens(1, 14, 1024), "torchvision, timm"),
    # A tanh layer, and nothing learned in place of the class token and 1 + 14 * 14 positions.
    Case(
        "vit_s16_big_vision",
        224,
        22.05,
        4.61,
        tokens(0, 14, 384),
        TIMM,
        extra=tanh_layer(384) - 384 * (2 + 14 * 14),
    ),
    Case("vit_b16_big_vision", 224, 92.88, 17.73, tokens(0, 14, 768), "timm vit_base_patch16_siglip_224", 0),
    Case("vit_l16_big_vision", 256, 315.96, 81.34, tokens(0, 16, 1024), "timm vit_large_patch16_siglip_256", 0),
    Case("vit_h14_big_vision", 224, 632.0458, 167.4, tokens(0, 16, 1280), "torchvision", extra=pool_for_token("h")),
    Case("vit_g14_big_vision", 224, 1012.61, 267.18, tokens(0, 16, 1408), TIMM, extra=pool_for_token("g")),
    Case("vit_G14_big_vision", 224, 1844.44, 483.95, tokens(0, 16, 1664), TIMM, extra=pool_for_token("G")),
    Case("vit_e14_big_vision", 224, 3926, 990, tokens(0, 16, 1792), PALI, 30_000),
    Case("vit_ti_r_s16", 224, 6.34, 0.44, tokens(1, 7, 192), TIMM, additions=stem_additions()),
    Case("vit_s_r26_s32", 224, 36.43, 3.56, tokens(1, 7, 384), TIMM, additions=stem_additions(2, 2, 2, 2)),
    Case("vit_b_r26_s32", 224, 101.38, 6.81, tokens(1, 7, 768), TIMM, additions=stem_additions(2, 2, 2, 2)),
    # timm has this one without a head.
    Case("vit_b_r50_s16", 224, 97.89, 21.66, tokens(1, 14, 768), TIMM, 0, additions=stem_additions(3, 4, 9)),
    Case(
        "vit_b_r50_s16_in21k",
        224,
        97.89,
        21.66,
        tokens(1, 14, 768),
        TIMM,
        0,
        extra=tanh_layer(768),
        additions=stem_additions(3, 4, 9),
    ),
    Case("vit_l_r50_s32", 224, 328.99, 19.58, tokens(1, 7, 1024), TIMM, additions=stem_additions(3, 4, 6, 3)),
    Case("mixer_s16", 224, 18.53, 3.79, tokens(0, 14, 512), TIMM, resizes=False),
    Case("mixer_s32", 224, 19.1, 1.0, tokens(0, 7, 512), TIMM, resizes=False),
    Case("mixer_b16", 224, 59.88, 12.62, tokens(0, 14, 768), TIMM, resizes=False),
    Case("mixer_b32", 224, 60.29, 3.24, tokens(0, 7, 768), TIMM, resizes=False),
    Case("mixer_l16", 224, 208.2, 44.6, tokens(0, 14, 1024), TIMM, resizes=False),
    Case("mixer_l32", 224, 206.94, 11.27, tokens(0, 7, 1024), TIMM, resizes=False),
    Case("mixer_h14", 224, 431, None, tokens(0, 16, 1280), "Tolstikhin et al. 2021, table 1", 0, resizes=False),
    # The multiply-adds are those of the ResNets, which have the same convolutions. timm's for the wider ones
    # contain much of normalisation; test_flops.py takes it into account.
    Case("bit_r50x1", 224, 25.55, 4.089, maps(56, 256), "timm, torchvision"),
    Case("bit_r50x3", 224, 217.32, None, maps(56, 768), TIMM),
    Case("bit_r101x1", 224, 44.54, 7.801, maps(56, 256), "timm, torchvision"),
    Case("bit_r101x3", 224, 387.93, None, maps(56, 768), TIMM),
    Case("bit_r152x2", 224, 236.34, None, maps(56, 512), TIMM),
    Case("bit_r152x4", 224, 936.53, None, maps(56, 1024), TIMM),
    # torchvision has no xlarge.
    Case("convnext_tiny", 224, 28.589128, 4.456, maps(56, 96), TORCHVISION),
    Case("convnext_small", 224, 50.223688, 8.684, maps(56, 96), TORCHVISION),
    Case("convnext_base", 224, 88.591464, 15.355, maps(56, 128), TORCHVISION),
    Case("convnext_large", 224, 197.767336, 34.361, maps(56, 192), TORCHVISION),
    Case("convnext_xlarge", 224, 350.2, 60.9, maps(56, 256), "Liu et al. 2022, table 1"),
    Case("convnextv2_atto", 224, 3.7, 0.55, maps(56, 40), CONVNEXT_V2),
    Case("convnextv2_femto", 224, 5.2, 0.78, maps(56, 48), CONVNEXT_V2),
    Case("convnextv2_pico", 224, 9.1, 1.37, maps(56, 64), CONVNEXT_V2),
    Case("convnextv2_nano", 224, 15.6, 2.45, maps(56, 80), CONVNEXT_V2),
    Case("convnextv2_tiny", 224, 28.6, 4.47, maps(56, 96), CONVNEXT_V2),
    Case("convnextv2_base", 224, 89, 15.4, maps(56, 128), CONVNEXT_V2),
    Case("convnextv2_large", 224, 198, 34.4, maps(56, 192), CONVNEXT_V2),
    Case("convnextv2_huge", 224, 660, 115, maps(56, 352), CONVNEXT_V2),
    # Scenic publishes neither; the networks of Wang et al. 2020 have other widths.
    Case("axial_resnet26", 224, None, None, maps(56, 256), "nothing published"),
    Case("axial_resnet50", 224, None, None, maps(56, 256), "nothing published"),
    Case("axial_resnet101", 224, None, None, maps(56, 256), "nothing published"),
    Case("axial_resnet152", 224, None, None, maps(56, 256), "nothing published"),
    # Multiply-adds at 384 and of L: Liu et al. 2021, table 1.
    Case("swin_t", 224, 28.288354, 4.491, maps(56, 96), TORCHVISION),
    Case("swin_s", 224, 49.606258, 8.741, maps(56, 96), TORCHVISION),
    Case("swin_b", 224, 87.768224, 15.431, maps(56, 128), TORCHVISION),
    Case("swin_l", 224, 196.532476, 34.5, maps(56, 192), TIMM),
    Case("swin_b_window12", 384, 87.903584, 47.0, maps(96, 128), TIMM),
    Case("swin_l_window12", 384, 196.735516, 103.9, maps(96, 192), TIMM),
    # Of our own making, for smoke runs.
    Case("small_cnn", 32, None, None, maps(32, 32, 3), "nothing published", num_classes=10),
    Case("mlp", 32, None, None, ((1, 1, 256),), "nothing published", num_classes=10, resizes=False),
)


class DetectorCase(NamedTuple):
    """A DETR of the zoo and what is published of it.

    ``params`` (1e6) are those of transformers' model on the meta device, which are no parameters but buffers where
    norms are frozen: ``extra`` counts these. ``gmacs`` (1e9) is the mean of the first 100 images of COCO val2017, as
    the papers print it. ``outputs`` are the numbers that each query says about classes, ``layers`` those that predict.
    """

    name: str
    params: float | None
    gmacs: float | None
    queries: int
    outputs: int
    source: str
    extra: int = 0
    layers: int = 6
    strides: tuple[int, ...] = (4, 8, 16, 32)
    channels: tuple[int, ...] = (256, 512, 1024, 2048)


class RCNNCase(NamedTuple):
    """An R-CNN of the zoo. ``params`` (1e6) and ``gmacs`` (1e9, one image of 800 x 800) are printed by ``source``.

    ``extra`` as above; ``uncounted`` is work (1e9) that the source leaves out.
    """

    name: str
    params: float | None
    gmacs: float | None
    masks: bool
    classes: int
    source: str
    extra: int = 0
    uncounted: float = 0.0
    strides: tuple[int, ...] = (4, 8, 16, 32)
    channels: tuple[int, ...] = (256, 512, 1024, 2048)


class CenterNetCase(NamedTuple):
    """A CenterNet of the zoo, of which neither parameters nor work are published; ``stacks`` that predict."""

    name: str
    strides: tuple[int, ...]
    channels: tuple[int, ...]
    stacks: int = 1


FROZEN = {50: 4 * 26_560, 101: 4 * 52_672}  # weight, bias, mean and variance of each channel of a ResNet
TIED = 5 * (256 * 91 + 91)  # class heads that a fresh model of transformers has once for all layers
DETR_TABLE = "transformers 5.23; Carion et al. 2020, table 1: 41 M, with ResNet-101 60 M"
DEFORMABLE_TABLE = "transformers 5.23; README of fundamentalvision/Deformable-DETR: 40 M, refined 41 M, one scale 34 M"
DILATED = (4, 8, 16, 16)

DETECTOR_CASES = (
    DetectorCase("detr_r50", 41.524768, 86, 100, 92, DETR_TABLE, FROZEN[50]),
    DetectorCase("detr_r50_dc5", 41.524768, 187, 100, 92, DETR_TABLE, FROZEN[50], strides=DILATED),
    DetectorCase("detr_r101", 60.464672, 152, 100, 92, DETR_TABLE, FROZEN[101]),
    DetectorCase("detr_r101_dc5", 60.464672, 253, 100, 92, DETR_TABLE, FROZEN[101], strides=DILATED),
    DetectorCase("detr_r50_panoptic", 42.899288, None, 100, 251, "transformers 5.23", FROZEN[50]),
    DetectorCase("deformable_detr_r50", 40.069665, 173, 300, 91, DEFORMABLE_TABLE, FROZEN[50]),
    DetectorCase("deformable_detr_r50_refine", 40.732725, 173, 300, 91, DEFORMABLE_TABLE, FROZEN[50] + TIED),
    DetectorCase("deformable_detr_r50_two_stage", 41.181529, 173, 300, 91, DEFORMABLE_TABLE, FROZEN[50]),
    DetectorCase("deformable_detr_r50_single_scale", 34.066593, 78, 300, 91, DEFORMABLE_TABLE, FROZEN[50]),
    DetectorCase(
        "deformable_detr_r50_single_scale_dc5", 34.066593, 128, 300, 91, DEFORMABLE_TABLE, FROZEN[50], strides=DILATED
    ),
    # Of our own making, for small images.
    DetectorCase(
        "deformable_detr_small", None, None, 50, 91, "nothing published", layers=3, channels=(32, 64, 128, 256)
    ),
    DetectorCase(
        "deformable_detr_r18", None, None, 50, 91, "nothing published", layers=3, channels=(64, 128, 256, 512)
    ),
)
MASK_HEAD = 53.2066304  # 1e9: of 100 objects, and the random images that torchvision counted v1 on gave none
RCNN_CASES = (
    RCNNCase("faster_rcnn_r50_fpn", 41.755286, 134.38, False, 90, TORCHVISION, FROZEN[50]),
    RCNNCase("mask_rcnn_r50_fpn", 44.401393, 134.38, True, 90, TORCHVISION, FROZEN[50], MASK_HEAD),
    RCNNCase("faster_rcnn_r50_fpn_v2", 43.712278, 280.371, False, 90, TORCHVISION),
    RCNNCase("mask_rcnn_r50_fpn_v2", 46.359409, 333.577, True, 90, TORCHVISION),
    RCNNCase("cascade_rcnn_r50_fpn", None, None, False, 80, "nothing published"),
    RCNNCase("cascade_mask_rcnn_r50_fpn", None, None, True, 80, "nothing published"),
    *(
        RCNNCase(f"{kind}_vitdet_{size}", None, None, True, 80, "nothing published", strides=(16,), channels=(width,))
        for kind in ("mask_rcnn", "cascade_mask_rcnn")
        for size, width in (("b", 768), ("l", 1024), ("h", 1280))
    ),
    # Of our own making, for small images.
    RCNNCase("mask_rcnn_small", None, None, True, 80, "nothing published", channels=(32, 64, 128, 256)),
)
CENTERNET_CASES = (
    CenterNetCase("centernet_r18_dcn", (4, 8, 16, 32), (64, 128, 256, 512)),
    CenterNetCase("centernet_r101_dcn", (4, 8, 16, 32), (256, 512, 1024, 2048)),
    CenterNetCase("centernet_dla34", (1, 2, 4, 8, 16, 32), (16, 32, 64, 128, 256, 512)),
    CenterNetCase("centernet_hourglass104", (4, 4), (256, 256), stacks=2),
)


class Toy(NamedTuple):
    """A model small enough to be run: ``build(num_classes=, in_channels=, key=)``.

    ``layers`` is the number of its ``intermediates``; ``random`` says that it needs a key in training.
    """

    name: str
    build: Callable[..., Classifier]
    image_size: int
    layers: int
    random: bool = False


TOY_SIZE = ViTSize(width=32, depth=3, num_heads=4, mlp_dim=48)


def bottleneck_resnet(*, num_classes: int, in_channels: int, key: jax.Array) -> Classifier:
    """ResNet-50's blocks, one or two in each of two stages."""
    keys = jax.random.split(key, 5)
    stem = ConvNorm(in_channels, 8, 7, stride=2, key=keys[0])
    block = functools.partial(ResidualBlock, kernels=(1, 3, 1), shortcut="projection", zero_scale=True)
    first = (block(8, (8, 8, 32), strides=(1, 1, 1), key=keys[1]),)
    second = (
        block(32, (16, 16, 64), strides=(1, 2, 1), key=keys[2]),
        block(64, (16, 16, 64), strides=(1, 1, 1), key=keys[3]),
    )
    backbone = ResNet(stem, (first, second), pool_stem=True, in_channels=in_channels)
    return Classifier(backbone, None, MapHead(64, num_classes, key=keys[4]))


def random_vit(*, num_classes: int, in_channels: int, key: jax.Array) -> Classifier:
    """Registers, mean, layer scale, pre-logits, dropout and drop-path."""
    keys = jax.random.split(key)
    backbone = VisionTransformer(
        TOY_SIZE,
        4,
        image_size=8,
        in_channels=in_channels,
        class_token=False,
        num_registers=2,
        layer_scale=0.1,
        dropout=0.1,
        drop_path=0.5,
        key=keys[0],
    )
    return Classifier(backbone, None, TokenHead(32, num_classes, pool="mean", pre_logits=16, key=keys[1]))


def distilled_vit(*, num_classes: int, in_channels: int, key: jax.Array) -> Classifier:
    """DeiT's distillation token and its second linear layer."""
    keys = jax.random.split(key)
    options = {"image_size": 8, "in_channels": in_channels, "distillation_token": True}
    backbone = VisionTransformer(TOY_SIZE, 4, **options, key=keys[0])
    return Classifier(backbone, None, DistilledHead(32, num_classes, key=keys[1]))


def dinov2_vit(*, num_classes: int, in_channels: int, key: jax.Array) -> Classifier:
    """Gated MLP, layer scale, registers; class token and mean; no biases of queries, keys and values."""
    keys = jax.random.split(key)
    options = {"mlp": "swiglu", "layer_scale": 0.1, "num_registers": 2, "use_qkv_bias": False}
    backbone = VisionTransformer(TOY_SIZE, 4, image_size=8, in_channels=in_channels, **options, key=keys[0])
    return Classifier(backbone, None, TokenHead(32, num_classes, pool="token_mean", key=keys[1]))


def big_vision_vit(*, num_classes: int, in_channels: int, key: jax.Array) -> Classifier:
    """Attention pooling, sin-cos positions and a head of zeros."""
    keys = jax.random.split(key, 3)
    backbone = VisionTransformer(
        TOY_SIZE,
        4,
        image_size=8,
        in_channels=in_channels,
        class_token=False,
        position="sincos2d",
        activation="gelu_tanh",
        key=keys[0],
    )
    pool = AttentionPool(32, 4, 48, key=keys[1])
    return Classifier(backbone, None, TokenHead(32, num_classes, pool="map", map_pool=pool, init=zeros, key=keys[2]))


def random_mixer(*, num_classes: int, in_channels: int, key: jax.Array) -> Classifier:
    """Two layers with dropout and drop-path."""
    keys = jax.random.split(key)
    size = MixerSize(width=16, depth=2, token_dim=8, channel_dim=24)
    backbone = Mixer(size, 4, image_size=8, in_channels=in_channels, dropout=0.1, drop_path=0.5, key=keys[0])
    return Classifier(backbone, None, TokenHead(16, num_classes, pool="mean", key=keys[1]))


def bit(*, num_classes: int, in_channels: int, key: jax.Array) -> Classifier:
    """One and two of BiT's bottlenecks."""
    keys = jax.random.split(key)
    backbone = BiT((1, 2), 8, num_groups=4, in_channels=in_channels, key=keys[0])
    return Classifier(backbone, None, MapHead(backbone.channels[-1], num_classes, key=keys[1]))


def axial_resnet(*, num_classes: int, in_channels: int, key: jax.Array) -> Classifier:
    """One axial bottleneck, then two, on 8 and 4 positions."""
    keys = jax.random.split(key)
    heads = {"num_heads": 2, "num_groups": 4}
    backbone = AxialResNet((1, 2), 8, image_size=32, in_channels=in_channels, **heads, key=keys[0])
    return Classifier(backbone, None, MapHead(backbone.channels[-1], num_classes, key=keys[1]))


def hybrid_vit(*, num_classes: int, in_channels: int, key: jax.Array) -> Classifier:
    """One bottleneck below the toy transformer."""
    keys = jax.random.split(key, 3)
    stem = HybridStem((1,), 8, num_groups=4, in_channels=in_channels, key=keys[0])
    vit = VisionTransformer(TOY_SIZE, 1, image_size=4, in_channels=stem.channels, key=keys[1])
    return Classifier(HybridViT(stem, vit), None, TokenHead(32, num_classes, key=keys[2]))


def random_swin(*, num_classes: int, in_channels: int, key: jax.Array) -> Classifier:
    """Two stages with windows that divide neither map, dropout and drop-path."""
    keys = jax.random.split(key)
    size = SwinSize(width=8, depths=(2, 4), num_heads=(2, 4))
    backbone = SwinTransformer(size, 3, in_channels=in_channels, dropout=0.1, drop_path=0.3, key=keys[0])
    return Classifier(backbone, None, NormPoolHead(16, num_classes, key=keys[1]))


def convnext_toy(*, num_classes: int, in_channels: int, key: jax.Array) -> Classifier:
    """ConvNeXt V2's blocks with V1's layer scale beside them, and drop-path."""
    keys = jax.random.split(key)
    size = ConvNeXtSize(depths=(2, 1), widths=(8, 12))
    backbone = ConvNeXt(size, in_channels=in_channels, grn=True, layer_scale=0.5, drop_path=0.5, key=keys[0])
    return Classifier(backbone, None, NormedMapHead(12, num_classes, key=keys[1]))


TOYS = (
    Toy("resnet20_cifar", MODELS["resnet20_cifar"], 16, 3),
    Toy("bottleneck_resnet", bottleneck_resnet, 32, 2),
    Toy("vit_ti16", functools.partial(MODELS["vit_ti16"], image_size=32), 32, 12),
    Toy("random_vit", random_vit, 8, 3, random=True),
    Toy("big_vision_vit", big_vision_vit, 8, 3),
    Toy("distilled_vit", distilled_vit, 8, 3),
    Toy("dinov2_vit", dinov2_vit, 8, 3),
    Toy("small_cnn", MODELS["small_cnn"], 8, 3),
    Toy("mlp", functools.partial(MODELS["mlp"], image_size=8), 8, 2),
    Toy("random_mixer", random_mixer, 8, 2, random=True),
    Toy("hybrid_vit", hybrid_vit, 16, 3),
    Toy("random_swin", random_swin, 28, 2, random=True),
)
SLOW_TOYS = (
    Toy("resnet18", MODELS["resnet18"], 64, 4),
    Toy("bit", bit, 32, 2),
    Toy("axial_resnet", axial_resnet, 32, 2),
    Toy("convnext", convnext_toy, 40, 2, random=True),
)
