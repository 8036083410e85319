"""Vision transformers of facebook: DeiT, DeiT III, MAE and DINOv2."""

from eqvision.pretrained.cards.card import TIMM_RESULTS, Card, Preprocessing, top1
from eqvision.pretrained.cards.resnet import digest_in

FILES = "https://dl.fbaipublicfiles.com"
DEIT_README = "https://github.com/facebookresearch/deit/blob/main/README_deit.md"
MAE_README = "https://github.com/facebookresearch/mae"
DINOV2_README = "https://github.com/facebookresearch/dinov2"

# README_deit.md; the evaluation resizes to size / 0.875.
DEIT = (
    ("deit_ti16", "deit_tiny_patch16_224-a1311bcf.pth", 224, 72.2),
    ("deit_s16", "deit_small_patch16_224-cd65a155.pth", 224, 79.9),
    ("deit_b16", "deit_base_patch16_224-b5f2ef4d.pth", 224, 81.8),
    ("deit_b16", "deit_base_patch16_384-8de9b5d1.pth", 384, 82.9),
    ("deit_ti16_distilled", "deit_tiny_distilled_patch16_224-b40b3cf7.pth", 224, 74.5),
    ("deit_s16_distilled", "deit_small_distilled_patch16_224-649709d9.pth", 224, 81.2),
    ("deit_b16_distilled", "deit_base_distilled_patch16_224-df68dfff.pth", 224, 83.4),
    ("deit_b16_distilled", "deit_base_distilled_patch16_384-d0272ac0.pth", 384, 85.2),
)
# Files of README_revenge.md: trained on ImageNet-1k, or on ImageNet-21k and then fine-tuned; share of the crop and
# top-1 as timm evaluates them.
DEIT3 = (
    ("deit3_s16", "in1k", "deit_3_small_224_1k.pth", 0.9, 81.382),
    ("deit3_m16", "in1k", "deit_3_medium_224_1k.pth", 0.9, 83.090),
    ("deit3_b16", "in1k", "deit_3_base_224_1k.pth", 0.9, 83.800),
    ("deit3_l16", "in1k", "deit_3_large_224_1k.pth", 0.9, 84.772),
    ("deit3_h14", "in1k", "deit_3_huge_224_1k.pth", 0.9, 85.204),
    ("deit3_s16", "in21k_ft_in1k", "deit_3_small_224_21k.pth", 1.0, 83.082),
    ("deit3_m16", "in21k_ft_in1k", "deit_3_medium_224_21k.pth", 1.0, 84.550),
    ("deit3_b16", "in21k_ft_in1k", "deit_3_base_224_21k.pth", 1.0, 85.728),
    ("deit3_l16", "in21k_ft_in1k", "deit_3_large_224_21k.pth", 1.0, 86.990),
    ("deit3_h14", "in21k_ft_in1k", "deit_3_huge_224_21k_v1.pth", 1.0, 87.180),
)
# FINETUNE.md: fine-tuned on ImageNet-1k, with the mean of the patches.
MAE_TUNED = (
    ("vit_b16_mae", "mae_finetuned_vit_base.pth", 83.664),
    ("vit_l16_mae", "mae_finetuned_vit_large.pth", 85.952),
    ("vit_h14_mae", "mae_finetuned_vit_huge.pth", 86.928),
)
# README.md: encoders without a last layer; top-1 after fine-tuning.
MAE = (
    ("vit_b16", "mae_pretrain_vit_base.pth", 83.6),
    ("vit_l16", "mae_pretrain_vit_large.pth", 85.9),
    ("vit_h14", "mae_pretrain_vit_huge.pth", 86.9),
)
# README.md: backbones without a last layer; accuracy of k nearest neighbours and of a linear layer on ImageNet-1k.
DINOV2 = (
    ("vit_s14_dinov2", "dinov2_vits14/dinov2_vits14_pretrain.pth", 79.0, 81.1),
    ("vit_b14_dinov2", "dinov2_vitb14/dinov2_vitb14_pretrain.pth", 82.1, 84.5),
    ("vit_l14_dinov2", "dinov2_vitl14/dinov2_vitl14_pretrain.pth", 83.5, 86.3),
    ("vit_g14_dinov2", "dinov2_vitg14/dinov2_vitg14_pretrain.pth", 83.5, 86.5),
    ("vit_s14_reg4_dinov2", "dinov2_vits14/dinov2_vits14_reg4_pretrain.pth", 79.1, 80.9),
    ("vit_b14_reg4_dinov2", "dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth", 82.0, 84.6),
    ("vit_l14_reg4_dinov2", "dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth", 83.8, 86.7),
    ("vit_g14_reg4_dinov2", "dinov2_vitg14/dinov2_vitg14_reg4_pretrain.pth", 83.7, 87.1),
)


def facebook_card(
    name: str,
    tag: str,
    layout: str,
    path: str,
    prepared: Preprocessing,
    metric: str,
    source: str,
    *,
    sha256: str | None = None,
    licence: str = "Apache-2.0",
) -> Card:
    return Card(
        name,
        tag,
        layout=layout,
        location=f"{FILES}/{path}",
        sha256=sha256,
        licence=licence,
        preprocessing=prepared,
        metric=metric,
        source=source,
    )


def deit_card(name: str, file: str, size: int, percent: float) -> Card:
    prepared, path, digest = Preprocessing(size), f"deit/{file}", digest_in(file)
    return facebook_card(
        name, f"deit_{size}", "facebook_vit", path, prepared, top1(percent), DEIT_README, sha256=digest
    )


def deit3_card(name: str, tag: str, file: str, crop_fraction: float, percent: float) -> Card:
    prepared, path = Preprocessing(224, crop_fraction=crop_fraction), f"deit/{file}"
    return facebook_card(name, tag, "facebook_deit3", path, prepared, top1(percent), TIMM_RESULTS)


def mae_tuned_card(name: str, file: str, percent: float) -> Card:
    path, metric, licence = f"mae/finetune/{file}", top1(percent), "CC-BY-NC-4.0"
    return facebook_card(
        name, "mae_in1k", "facebook_vit", path, Preprocessing(224), metric, MAE_README, licence=licence
    )


def mae_card(name: str, file: str, percent: float) -> Card:
    path, metric, licence = f"mae/pretrain/{file}", f"for fine-tuning, after which {top1(percent)}", "CC-BY-NC-4.0"
    return facebook_card(name, "mae", "facebook_vit", path, Preprocessing(224), metric, MAE_README, licence=licence)


def dinov2_card(name: str, file: str, knn: float, linear: float) -> Card:
    layout = "dinov2_vit_reg" if "_reg" in name else "dinov2_vit"
    metric = f"frozen features, ImageNet-1k: k-NN {knn:g} %, linear {linear:g} %"
    return facebook_card(name, "dinov2", layout, f"dinov2/{file}", Preprocessing(224), metric, DINOV2_README)


CARDS: tuple[Card, ...] = (
    *(deit_card(*row) for row in DEIT),
    *(deit3_card(*row) for row in DEIT3),
    *(mae_tuned_card(*row) for row in MAE_TUNED),
    *(mae_card(*row) for row in MAE),
    *(dinov2_card(*row) for row in DINOV2),
)
