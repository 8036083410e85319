"""Vision transformers and hybrids of google: AugReg's files, the first paper's, big_vision's, and timm's weights."""

from eqvision.pretrained.cards.card import HALF, TIMM_RESULTS, Card, Preprocessing, top1

BUCKET = "https://storage.googleapis.com/vit_models"
GOOGLE = "https://github.com/google-research/vision_transformer"
IN21K = "for fine-tuning: ImageNet-21k, 21843 classes"

# AugReg (Steiner et al. 2021): files before fine-tuning, by their names in the bucket.
TI16 = "Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0"
S16 = "S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0"
S32 = "S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0"
B8 = "B_8-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0"
B16 = "B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0"
B32 = "B_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.03-do_0.0-sd_0.0"
B32_LIGHT = "B_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0"
L16 = "L_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1"
R_TI16 = "R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0"
R26_S32 = "R26_S_32-i21k-300ep-lr_0.001-aug_medium2-wd_0.03-do_0.0-sd_0.0"
R26_S32_LIGHT = "R26_S_32-i21k-300ep-lr_0.001-aug_light0-wd_0.03-do_0.1-sd_0.1"
R50_L32 = "R50_L_32-i21k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0"
R50_L32_DROP = "R50_L_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1"

# The file before fine-tuning, the size, the learning rate and the top-1 of the fine-tuned file.
AUGREG = (
    ("vit_ti16_augreg", TI16, 224, "0.03", 75.452),
    ("vit_ti16_augreg", TI16, 384, "0.03", 78.438),
    ("vit_s16_augreg", S16, 224, "0.03", 81.402),
    ("vit_s16_augreg", S16, 384, "0.03", 83.814),
    ("vit_s32_augreg", S32, 224, "0.03", 76.010),
    ("vit_s32_augreg", S32, 384, "0.03", 80.476),
    ("vit_b8_augreg", B8, 224, "0.01", 85.838),
    ("vit_b16_augreg", B16, 224, "0.01", 84.534),
    ("vit_b16_augreg", B16, 384, "0.01", 86.010),
    ("vit_b32_augreg", B32, 224, "0.03", 80.732),
    ("vit_b32_augreg", B32_LIGHT, 384, "0.03", 83.358),
    ("vit_l16_augreg", L16, 224, "0.01", 85.856),
    ("vit_l16_augreg", L16, 384, "0.01", 87.096),
    ("vit_ti_r_s16", R_TI16, 224, "0.03", 71.800),
    ("vit_ti_r_s16", R_TI16, 384, "0.03", 75.962),
    ("vit_s_r26_s32", R26_S32_LIGHT, 224, "0.03", 81.856),
    ("vit_s_r26_s32", R26_S32, 384, "0.03", 84.066),
    ("vit_l_r50_s32", R50_L32_DROP, 224, "0.01", 84.434),
    ("vit_l_r50_s32", R50_L32, 384, "0.01", 86.188),
)
AUGREG_IN21K = (
    ("vit_ti16_augreg", TI16),
    ("vit_s16_augreg", S16),
    ("vit_s32_augreg", S32),
    ("vit_b8_augreg", B8),
    ("vit_b16_augreg", B16),
    ("vit_b32_augreg", B32),
    ("vit_l16_augreg", L16),
    ("vit_ti_r_s16", R_TI16),
    ("vit_s_r26_s32", R26_S32),
    ("vit_l_r50_s32", R50_L32),
)

# Files of Dosovitskiy et al. 2021; figures by the README's update of 29 October 2020. Those of ImageNet-21k keep the
# hidden layer before the last one, and their last layer is zero.
FIRST = (("vit_b16_augreg", "ViT-B_16-224", 81.2), ("vit_l16_augreg", "ViT-L_16-224", 82.7))
FIRST_IN21K = (("vit_b16_in21k", "ViT-B_16"), ("vit_l16_in21k", "ViT-L_16"))

# Repositories of timm on the hub: size, share of the crop, top-1. Its GELU is exact, although google trained with the
# tanh form.
TIMM = (
    ("vit_ti16", "vit_tiny_patch16_224.augreg_in21k_ft_in1k", 224, 0.9, 75.452),
    ("vit_s16", "vit_small_patch16_224.augreg_in21k_ft_in1k", 224, 0.9, 81.402),
    ("vit_s32", "vit_small_patch32_224.augreg_in21k_ft_in1k", 224, 0.9, 76.010),
    ("vit_b8", "vit_base_patch8_224.augreg2_in21k_ft_in1k", 224, 0.9, 86.252),
    ("vit_b16", "vit_base_patch16_224.augreg2_in21k_ft_in1k", 224, 0.9, 85.108),
    ("vit_b32", "vit_base_patch32_224.augreg_in21k_ft_in1k", 224, 0.9, 80.732),
    ("vit_l16", "vit_large_patch16_224.augreg_in21k_ft_in1k", 224, 0.9, 85.856),
    ("vit_l32", "vit_large_patch32_384.orig_in21k_ft_in1k", 384, 1.0, 81.508),
    ("vit_m16_mean", "vit_medium_patch16_gap_256.sw_in12k_ft_in1k", 256, 0.95, 84.442),
    ("vit_m16_reg4_mean", "vit_medium_patch16_reg4_gap_256.sbb_in12k_ft_in1k", 256, 0.95, 84.956),
    ("vit_betwixt16_reg4_mean", "vit_betwixt_patch16_reg4_gap_256.sbb2_e200_in12k_ft_in1k", 256, 0.95, 85.734),
    ("vit_b_r50_s16", "vit_base_r50_s16_384.orig_in21k_ft_in1k", 384, 1.0, 84.988),
)


def google_layout(name: str) -> str:
    return "google_hybrid" if "_r" in name else "google_vit"


def prepared(size: int) -> Preprocessing:
    """timm's evaluation of google's files."""
    return Preprocessing(size, HALF, HALF, crop_fraction=0.9 if size < 384 else 1.0)


def augreg_card(name: str, upstream: str, size: int, rate: str, percent: float) -> Card:
    return Card(
        name,
        f"augreg_{size}",
        layout=google_layout(name),
        location=f"{BUCKET}/augreg/{upstream}--imagenet2012-steps_20k-lr_{rate}-res_{size}.npz",
        sha256=None,
        licence="Apache-2.0",
        preprocessing=prepared(size),
        metric=top1(percent),
        source=TIMM_RESULTS,
    )


def augreg_in21k_card(name: str, upstream: str) -> Card:
    return _for_tuning(name, "augreg_in21k", google_layout(name), f"{BUCKET}/augreg/{upstream}.npz", IN21K)


def first_in21k_card(name: str, file: str) -> Card:
    metric = "for fine-tuning: ImageNet-21k, 21843 classes, whose layer is zero"
    return _for_tuning(name, "in21k", "google_vit", f"{BUCKET}/imagenet21k/{file}.npz", metric)


def _for_tuning(name: str, tag: str, layout: str, location: str, metric: str) -> Card:
    return Card(
        name,
        tag,
        layout=layout,
        location=location,
        sha256=None,
        licence="Apache-2.0",
        preprocessing=prepared(224),
        metric=metric,
        source=GOOGLE,
    )


def first_card(name: str, file: str, percent: float) -> Card:
    return Card(
        name,
        "vit_2020",
        layout="google_vit",
        location=f"{BUCKET}/imagenet21k%2Bimagenet2012/{file}.npz",
        sha256=None,
        licence="Apache-2.0",
        preprocessing=prepared(224),
        metric=top1(percent),
        source=GOOGLE,
    )


def timm_card(name: str, repository: str, size: int, crop_fraction: float, percent: float) -> Card:
    return Card(
        name,
        f"timm_{repository.partition('.')[2].partition('_')[0]}",
        layout="timm_hybrid" if "_r50" in name else "timm_vit_reg" if "_reg" in name else "timm_vit",
        location=f"hf:timm/{repository}",
        sha256=None,
        licence="Apache-2.0",
        preprocessing=Preprocessing(size, HALF, HALF, crop_fraction=crop_fraction),
        metric=top1(percent),
        source=TIMM_RESULTS,
    )


# Beyer et al. 2022, 90 epochs; the file is named in big_vision/models/vit.py, the figure is of its configuration.
BIG_VISION = Card(
    "vit_s16_big_vision",
    "i1k_90ep",
    layout="big_vision_vit",
    location="https://storage.googleapis.com/big_vision/vit_s16_i1k_90ep.npz",
    sha256=None,
    licence="Apache-2.0",
    preprocessing=Preprocessing(224, HALF, HALF, "bilinear"),
    metric=top1(76.5),
    source="https://github.com/google-research/big_vision/blob/main/big_vision/configs/vit_s16_i1k.py",
)

CARDS: tuple[Card, ...] = (
    *(augreg_card(*row) for row in AUGREG),
    *(timm_card(*row) for row in TIMM),
    *(first_card(*row) for row in FIRST),
    *(augreg_in21k_card(*row) for row in AUGREG_IN21K),
    *(first_in21k_card(*row) for row in FIRST_IN21K),
    BIG_VISION,
)
