"""DETR and Deformable DETR on COCO: the authors' files, their conversions on huggingface.co, and Scenic's DETR.

Boxes are evaluated on val2017. DC5 models lose AP where images are padded, which they never saw in training: their
figures are those of one image per batch.
"""

from eqvision.pretrained.cards.card import Card, Preprocessing
from eqvision.pretrained.cards.resnet import digest_in

DETR_README = "https://github.com/facebookresearch/detr"
DEFORMABLE_README = "https://github.com/fundamentalvision/Deformable-DETR"
SCENIC_README = "https://github.com/google-research/scenic/tree/main/scenic/projects/baselines/detr"

# The shorter side to 800 pixels, the longer to at most 1333.
DETR_IMAGES = Preprocessing(800, interpolation="bilinear", crop_fraction=0.0, longest=1333)
# Scenic's mean of red is 0.48: input_pipeline_detection.py. Its evaluation pads every image to 1333 x 1333.
SCENIC_IMAGES = Preprocessing(800, mean=(0.48, 0.456, 0.406), interpolation="bilinear", crop_fraction=0.0, longest=1333)

# Model, published file, repository of the conversion, box AP.
DETR = (
    ("detr_r50", "detr-r50-e632da11.pth", "facebook/detr-resnet-50", 42.0),
    ("detr_r50_dc5", "detr-r50-dc5-f0fb7ef5.pth", "facebook/detr-resnet-50-dc5", 43.3),
    ("detr_r101", "detr-r101-2c7b67e5.pth", "facebook/detr-resnet-101", 43.5),
    ("detr_r101_dc5", "detr-r101-dc5-a2e86def.pth", "facebook/detr-resnet-101-dc5", 44.9),
)
PANOPTIC = ("detr_r50_panoptic", "detr-r50-panoptic-b423a359.pth", "facebook/detr-resnet-50-panoptic")
# Model, what follows in the names of the file and of the repository, number of the file on Google Drive, box AP.
DEFORMABLE = (
    ("deformable_detr_r50", "", "", "1nDWZWHuRwtwGden77NLM9JoWe-YisJnA", 44.5),
    (
        "deformable_detr_r50_refine",
        "_plus_iterative_bbox_refinement",
        "-with-box-refine",
        "1JYKyRYzUH7uo9eVfDaVCiaIGZb5YTCuI",
        46.2,
    ),
    (
        "deformable_detr_r50_two_stage",
        "_plus_iterative_bbox_refinement_plus_plus_two_stage",
        "-with-box-refine-two-stage",
        "15I03A7hNTpwuLNdfuEmW9_taZMNVssEp",
        46.9,
    ),
    (
        "deformable_detr_r50_single_scale",
        "_single_scale",
        "-single-scale",
        "1WEjQ9_FgfI5sw5OZZ4ix-OKk-IJ_-SDU",
        39.4,
    ),
    (
        "deformable_detr_r50_single_scale_dc5",
        "_single_scale_dc5",
        "-single-scale-dc5",
        "1m_TgMjzH7D44fbA-c_jiBZ-xf-odxGdk",
        41.5,
    ),
)


def box_ap(percent: float) -> str:
    return f"COCO val2017 box AP {percent:g}"


def card(
    name: str,
    tag: str,
    layout: str,
    location: str,
    metric: str,
    source: str,
    *,
    sha256: str | None = None,
    preprocessing: Preprocessing = DETR_IMAGES,
) -> Card:
    return Card(name, tag, layout, location, sha256, "Apache-2.0", preprocessing, metric, source)


def facebook_cards(name: str, file: str, repository: str, metric: str, kind: str = "") -> tuple[Card, Card]:
    """The authors' file and its conversion; ``kind`` is what the layouts' names end in."""
    location = f"https://dl.fbaipublicfiles.com/detr/{file}"
    own = card(name, "facebook", f"facebook_detr{kind}", location, metric, DETR_README, sha256=digest_in(file))
    return own, card(name, "hf", f"hf_detr{kind}", f"hf:{repository}", metric, DETR_README)


def deformable_cards(name: str, suffix: str, repository: str, number: str, percent: float) -> tuple[Card, Card]:
    """The conversion, which can be downloaded by a program, and the authors' file, which a browser has to."""
    file = f"r50_deformable_detr{suffix}-checkpoint.pth"
    drive = f"https://drive.google.com/file/d/{number}/view#{file}"
    layout, hub = "fundamentalvision_deformable_detr", f"hf:SenseTime/deformable-detr{repository}"
    return (
        card(name, "hf", "hf_deformable_detr", hub, box_ap(percent), DEFORMABLE_README),
        card(name, "fundamentalvision", layout, drive, box_ap(percent), DEFORMABLE_README),
    )


SCENIC = card(
    "detr_r50",
    "scenic",
    "scenic_detr",
    "https://storage.googleapis.com/scenic-bucket/baselines/DETR_COCO_detection",
    box_ap(40.38),
    SCENIC_README,
    preprocessing=SCENIC_IMAGES,
)
CARDS: tuple[Card, ...] = (
    *(each for name, file, hub, percent in DETR for each in facebook_cards(name, file, hub, box_ap(percent))),
    *facebook_cards(*PANOPTIC, "COCO val2017 PQ 43.4, box AP 38.8", "_panoptic"),
    SCENIC,
    *(each for row in DEFORMABLE for each in deformable_cards(*row)),
)
