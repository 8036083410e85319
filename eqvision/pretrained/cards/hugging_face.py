"""Repositories of huggingface.co that transformers' documentation names: conversions of the authors' files."""

from eqvision.pretrained.cards.card import HALF, Card, Preprocessing, top1

SQUEEZED = 0.0  # both sides resized to the size
VIT = "https://github.com/google-research/vision_transformer"
CONVNEXT = "https://github.com/facebookresearch/ConvNeXt"
CONVNEXTV2 = "https://github.com/facebookresearch/ConvNeXt-V2"
SWIN = "https://github.com/microsoft/Swin-Transformer"
DEIT = "https://github.com/facebookresearch/deit/blob/main/README_deit.md"
DINOV2 = "https://github.com/facebookresearch/dinov2"

GOOGLE = Preprocessing(224, HALF, HALF, "bilinear", SQUEEZED)
SQUARE = Preprocessing(224, crop_fraction=SQUEEZED)
USUAL = Preprocessing(224)

# Figures are those of the files that were converted.
ROWS = (
    ("vit_b16", "hf_vit", "google/vit-base-patch16-224", "Apache-2.0", GOOGLE, top1(81.2), VIT),
    ("vit_l16", "hf_vit", "google/vit-large-patch16-224", "Apache-2.0", GOOGLE, top1(82.7), VIT),
    ("convnext_tiny", "hf_convnext", "facebook/convnext-tiny-224", "Apache-2.0", USUAL, top1(82.1), CONVNEXT),
    (
        "convnextv2_tiny",
        "hf_convnextv2",
        "facebook/convnextv2-tiny-1k-224",
        "Apache-2.0",
        USUAL,
        top1(83.0),
        CONVNEXTV2,
    ),
    ("swin_t", "hf_swin", "microsoft/swin-tiny-patch4-window7-224", "Apache-2.0", SQUARE, top1(81.2), SWIN),
    (
        "deit_b16_distilled",
        "hf_deit_distilled",
        "facebook/deit-base-distilled-patch16-224",
        "Apache-2.0",
        USUAL,
        top1(83.4),
        DEIT,
    ),
)


def hugging_face_card(
    name: str, layout: str, repository: str, licence: str, prepared: Preprocessing, metric: str, source: str
) -> Card:
    return Card(
        name,
        "hf",
        layout=layout,
        location=f"hf:{repository}",
        sha256=None,
        licence=licence,
        preprocessing=prepared,
        metric=metric,
        source=source,
    )


CARDS: tuple[Card, ...] = tuple(hugging_face_card(*row) for row in ROWS)
