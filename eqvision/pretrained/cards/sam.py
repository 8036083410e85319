"""Segment Anything: the authors' files, and their conversions on huggingface.co."""

from eqvision.pretrained.cards.card import Card, Preprocessing

README = "https://github.com/facebookresearch/segment-anything"
FILES = "https://dl.fbaipublicfiles.com/segment_anything"
# The longer side to 1024 pixels; the rest of a square of 1024 is padding, zeros after normalisation.
IMAGES = Preprocessing(1024, interpolation="bilinear", crop_fraction=0.0, longest=1024)
PROMPTS = "masks for prompts; the paper's figures are those of sam_vit_h"
BOXES = "COCO val2017 zero-shot mask AP 46.5, prompted by the boxes of ViTDet-H"

# Model, published file, its digest, repository of the conversion, figure. The digits in the names are of an MD5.
ROWS = (
    (
        "sam_vit_b",
        "sam_vit_b_01ec64.pth",
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
        "facebook/sam-vit-base",
        PROMPTS,
    ),
    (
        "sam_vit_l",
        "sam_vit_l_0b3195.pth",
        "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
        "facebook/sam-vit-large",
        PROMPTS,
    ),
    (
        "sam_vit_h",
        "sam_vit_h_4b8939.pth",
        "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
        "facebook/sam-vit-huge",
        BOXES,
    ),
)


def sam_cards(name: str, file: str, sha256: str, repository: str, metric: str) -> tuple[Card, Card]:
    """The authors' file and its conversion."""
    own = Card(name, "facebook", "official_sam", f"{FILES}/{file}", sha256, "Apache-2.0", IMAGES, metric, README)
    return own, Card(name, "hf", "hf_sam", f"hf:{repository}", None, "Apache-2.0", IMAGES, metric, README)


CARDS: tuple[Card, ...] = tuple(card for row in ROWS for card in sam_cards(*row))
