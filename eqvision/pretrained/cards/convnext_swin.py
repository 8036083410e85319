"""ConvNeXt v1 and v2, and Swin: the authors' files and torchvision's."""

from eqvision.pretrained.cards.card import TIMM_RESULTS, Card, Preprocessing, top1
from eqvision.pretrained.cards.resnet import digest_in

CONVNEXT_FILES = "https://dl.fbaipublicfiles.com/convnext"
CONVNEXT_README = "https://github.com/facebookresearch/ConvNeXt"
CONVNEXTV2_README = "https://github.com/facebookresearch/ConvNeXt-V2"
SWIN_FILES = "https://github.com/SwinTransformer/storage/releases/download"
SWIN_README = "https://github.com/microsoft/Swin-Transformer"
TORCHVISION = "https://docs.pytorch.org/vision/stable/models.html"

# README of ConvNeXt: trained on ImageNet-1k, or on ImageNet-22k and then fine-tuned; top-1.
CONVNEXT = (
    ("convnext_tiny", "in1k", "convnext_tiny_1k_224_ema.pth", 82.1),
    ("convnext_small", "in1k", "convnext_small_1k_224_ema.pth", 83.1),
    ("convnext_base", "in1k", "convnext_base_1k_224_ema.pth", 83.8),
    ("convnext_large", "in1k", "convnext_large_1k_224_ema.pth", 84.3),
    ("convnext_tiny", "in22k_ft_in1k", "convnext_tiny_22k_1k_224.pth", 82.9),
    ("convnext_small", "in22k_ft_in1k", "convnext_small_22k_1k_224.pth", 84.6),
    ("convnext_base", "in22k_ft_in1k", "convnext_base_22k_1k_224.pth", 85.8),
    ("convnext_large", "in22k_ft_in1k", "convnext_large_22k_1k_224.pth", 86.6),
    ("convnext_xlarge", "in22k_ft_in1k", "convnext_xlarge_22k_1k_224_ema.pth", 87.0),
)
# README of ConvNeXt V2: fine-tuned on ImageNet-1k.
CONVNEXTV2 = (
    ("convnextv2_atto", "in1k", "im1k/convnextv2_atto_1k_224_ema.pt", 76.7),
    ("convnextv2_femto", "in1k", "im1k/convnextv2_femto_1k_224_ema.pt", 78.5),
    ("convnextv2_pico", "in1k", "im1k/convnextv2_pico_1k_224_ema.pt", 80.3),
    ("convnextv2_nano", "in1k", "im1k/convnextv2_nano_1k_224_ema.pt", 81.9),
    ("convnextv2_tiny", "in1k", "im1k/convnextv2_tiny_1k_224_ema.pt", 83.0),
    ("convnextv2_base", "in1k", "im1k/convnextv2_base_1k_224_ema.pt", 84.9),
    ("convnextv2_large", "in1k", "im1k/convnextv2_large_1k_224_ema.pt", 85.8),
    ("convnextv2_huge", "in1k", "im1k/convnextv2_huge_1k_224_ema.pt", 86.3),
)
# torchvision 0.28, torchvision/models/convnext.py and swin_transformer.py: top-1, and the shorter side before the crop
# of 224.
TORCHVISION_CONVNEXT = (
    ("convnext_tiny", "convnext_tiny-983f1562.pth", 82.520, 236),
    ("convnext_small", "convnext_small-0c510722.pth", 83.616, 230),
    ("convnext_base", "convnext_base-6075fbad.pth", 84.062, 232),
    ("convnext_large", "convnext_large-ea097f82.pth", 84.414, 232),
)
TORCHVISION_SWIN = (
    ("swin_t", "swin_t-704ceda3.pth", 81.474, 232),
    ("swin_s", "swin_s-5e29d889.pth", 83.196, 246),
    ("swin_b", "swin_b-68c6b09e.pth", 83.582, 238),
)
# README of Swin-Transformer.
SWIN = (
    ("swin_t", "in1k", "v1.0.0/swin_tiny_patch4_window7_224.pth", 81.2),
    ("swin_s", "in1k", "v1.0.0/swin_small_patch4_window7_224.pth", 83.2),
    ("swin_b", "in1k", "v1.0.0/swin_base_patch4_window7_224.pth", 83.5),
    ("swin_b", "in22k_ft_in1k", "v1.0.0/swin_base_patch4_window7_224_22kto1k.pth", 85.2),
    ("swin_l", "in22k_ft_in1k", "v1.0.0/swin_large_patch4_window7_224_22kto1k.pth", 86.3),
)
# The same repository's files for windows of 12; top-1 as timm evaluates them, at 384 without a crop.
SWIN_384 = (
    ("swin_b_window12", "in1k", "v1.0.0/swin_base_patch4_window12_384.pth", 84.478),
    ("swin_b_window12", "in22k_ft_in1k", "v1.0.0/swin_base_patch4_window12_384_22kto1k.pth", 86.442),
    ("swin_l_window12", "in22k_ft_in1k", "v1.0.0/swin_large_patch4_window12_384_22kto1k.pth", 87.142),
)


def convnext_card(name: str, tag: str, file: str, percent: float) -> Card:
    v2 = file.endswith(".pt")
    return Card(
        name,
        tag,
        layout="facebook_convnext",
        location=f"{CONVNEXT_FILES}/convnextv2/{file}" if v2 else f"{CONVNEXT_FILES}/{file}",
        sha256=None,
        licence="CC-BY-NC-4.0" if v2 else "MIT",
        preprocessing=Preprocessing(224),
        metric=top1(percent),
        source=CONVNEXTV2_README if v2 else CONVNEXT_README,
    )


def swin_card(name: str, tag: str, file: str, percent: float) -> Card:
    large = name.endswith("window12")
    return Card(
        name,
        tag,
        layout="microsoft_swin",
        location=f"{SWIN_FILES}/{file}",
        sha256=None,
        licence="MIT",
        preprocessing=Preprocessing(384, crop_fraction=1.0) if large else Preprocessing(224),
        metric=top1(percent),
        source=TIMM_RESULTS if large else SWIN_README,
    )


def torchvision_card(name: str, file: str, percent: float, resized: int) -> Card:
    swin = name.startswith("swin")
    return Card(
        name,
        "torchvision_v1",
        layout="torchvision_swin" if swin else "torchvision_convnext",
        location=f"https://download.pytorch.org/models/{file}",
        sha256=digest_in(file),
        licence="BSD-3-Clause",
        preprocessing=Preprocessing(224, interpolation="bicubic" if swin else "bilinear", crop_fraction=224 / resized),
        metric=top1(percent),
        source=TORCHVISION,
    )


CARDS: tuple[Card, ...] = (
    *(torchvision_card(*row) for row in (*TORCHVISION_CONVNEXT, *TORCHVISION_SWIN)),
    *(convnext_card(*row) for row in (*CONVNEXT, *CONVNEXTV2)),
    *(swin_card(*row) for row in (*SWIN, *SWIN_384)),
)
