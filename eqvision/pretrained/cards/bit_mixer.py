"""BiT and MLP-Mixer: google's files and timm's conversions."""

from eqvision.pretrained.cards.card import HALF, TIMM_RESULTS, Card, Preprocessing, top1

BIT_BUCKET = "https://storage.googleapis.com/bit_models"
BIT_README = "https://github.com/google-research/big_transfer"
MIXER_BUCKET = "https://storage.googleapis.com/mixer_models"
MIXER_README = "https://github.com/google-research/vision_transformer"

# BiT-M (Kolesnikov et al. 2020): pre-trained on ImageNet-21k, fine-tuned on ImageNet-1k; size and top-1 as timm
# evaluates the same numbers.
BIT = (
    ("bit_r50x1", "BiT-M-R50x1", 448, 80.386),
    ("bit_r50x3", "BiT-M-R50x3", 448, 83.982),
    ("bit_r101x1", "BiT-M-R101x1", 448, 82.332),
    ("bit_r101x3", "BiT-M-R101x3", 448, 84.430),
    ("bit_r152x2", "BiT-M-R152x2", 448, 84.468),
    ("bit_r152x4", "BiT-M-R152x4", 480, 84.936),
)
TIMM_BIT = (
    ("bit_r50x1", "resnetv2_50x1_bit.goog_in21k_ft_in1k", 448, 80.386),
    ("bit_r50x3", "resnetv2_50x3_bit.goog_in21k_ft_in1k", 448, 83.982),
    ("bit_r101x1", "resnetv2_101x1_bit.goog_in21k_ft_in1k", 448, 82.332),
    ("bit_r101x3", "resnetv2_101x3_bit.goog_in21k_ft_in1k", 448, 84.430),
    ("bit_r152x2", "resnetv2_152x2_bit.goog_in21k_ft_in1k", 448, 84.468),
    ("bit_r152x4", "resnetv2_152x4_bit.goog_in21k_ft_in1k", 480, 84.936),
)

# big_vision/models/mlp_mixer.py names the files. Figures are timm's for its conversions of those of ImageNet-1k.
MIXER = (("mixer_b16", "Mixer-B_16", 76.616), ("mixer_l16", "Mixer-L_16", 72.084))
TIMM_MIXER = (
    ("mixer_b16", "mixer_b16_224.goog_in21k_ft_in1k", 76.616),
    ("mixer_l16", "mixer_l16_224.goog_in21k_ft_in1k", 72.084),
)


def google_card(
    name: str, tag: str, layout: str, location: str, preprocessing: Preprocessing, metric: str, source: str
) -> Card:
    return Card(
        name,
        tag,
        layout=layout,
        location=location,
        sha256=None,
        licence="Apache-2.0",
        preprocessing=preprocessing,
        metric=metric,
        source=source,
    )


def bit_card(name: str, file: str, size: int, percent: float) -> Card:
    location = f"{BIT_BUCKET}/{file}-ILSVRC2012.npz"
    return google_card(name, "bit_m", "google_bit", location, bit_prepared(size), top1(percent), TIMM_RESULTS)


def bit_in21k_card(name: str, file: str, size: int, percent: float) -> Card:
    """The same before fine-tuning; ``size`` and ``percent`` are those after it."""
    return google_card(
        name,
        "bit_m_in21k",
        "google_bit",
        f"{BIT_BUCKET}/{file}.npz",
        Preprocessing(224, HALF, HALF, "bilinear"),
        f"for fine-tuning: ImageNet-21k, 21843 classes; at {size} {top1(percent)}",
        TIMM_RESULTS,
    )


def timm_bit_card(name: str, repository: str, size: int, percent: float) -> Card:
    location = f"hf:timm/{repository}"
    return google_card(name, "timm_bit_m", "timm_bit", location, bit_prepared(size), top1(percent), TIMM_RESULTS)


def bit_prepared(size: int) -> Preprocessing:
    return Preprocessing(size, HALF, HALF, "bilinear", crop_fraction=1.0)


def mixer_card(name: str, file: str, percent: float) -> Card:
    location, prepared = f"{MIXER_BUCKET}/imagenet1k/{file}.npz", Preprocessing(224, HALF, HALF)
    return google_card(name, "imagenet1k", "google_mixer", location, prepared, top1(percent), TIMM_RESULTS)


def mixer_in21k_card(name: str, file: str, percent: float) -> Card:
    location, prepared = f"{MIXER_BUCKET}/imagenet21k/{file}.npz", Preprocessing(224, HALF, HALF)
    return google_card(
        name, "imagenet21k", "google_mixer", location, prepared, "for fine-tuning: ImageNet-21k", MIXER_README
    )


def timm_mixer_card(name: str, repository: str, percent: float) -> Card:
    location, prepared = f"hf:timm/{repository}", Preprocessing(224, HALF, HALF)
    return google_card(name, "timm_imagenet1k", "timm_mixer", location, prepared, top1(percent), TIMM_RESULTS)


# BiT-R50x1 distilled from R152x2 (Beyer et al. 2022), by the README of big_transfer.
DISTILLED = google_card(
    "bit_r50x1",
    "distilled",
    "google_bit",
    f"{BIT_BUCKET}/distill/R50x1_224.npz",
    Preprocessing(224, HALF, HALF),
    top1(82.8),
    BIT_README,
)

CARDS: tuple[Card, ...] = (
    *(bit_card(*row) for row in BIT),
    DISTILLED,
    *(timm_bit_card(*row) for row in TIMM_BIT),
    *(bit_in21k_card(*row) for row in BIT),
    *(mixer_card(*row) for row in MIXER),
    *(timm_mixer_card(*row) for row in TIMM_MIXER),
    *(mixer_in21k_card(*row) for row in MIXER),
)
