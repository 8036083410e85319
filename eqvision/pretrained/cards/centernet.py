"""CenterNet on COCO: the authors' files, which only browsers get. AP is that of val2017 without flipping."""

from eqvision.pretrained.cards.card import Card, Preprocessing
from eqvision.pretrained.cards.rcnn import coco_ap

MODEL_ZOO = "https://github.com/xingyizhou/CenterNet/blob/master/readme/MODEL_ZOO.md"
# As large as fits into 512 x 512 pixels; red, green, blue.
IMAGES = Preprocessing(
    512,
    (0.47026115, 0.44719302, 0.40789654),
    (0.27809835, 0.27408164, 0.28863828),
    "bilinear",
    0.0,
    longest=512,
)
NOTE = (
    "the figure was measured on images of their own size, as --keep_res of the authors' program does; the first "
    "convolution reads BGR and is turned round when it is loaded, so that images here are RGB"
)

# Model, tag, layout, file and its number on Google Drive, box AP.
FILES = (
    (
        "centernet_r18_dcn",
        "xingyizhou",
        "centernet_resnet",
        "ctdet_coco_resdcn18.pth",
        "1RtFps3kQAyLjQyzCao7pPDclOBQ64Vyp",
        28.1,
    ),
    (
        "centernet_r101_dcn",
        "xingyizhou",
        "centernet_resnet",
        "ctdet_coco_resdcn101.pth",
        "1tKkSyzC3iWmM6XTYNJrC4XLCIToDmnHz",
        34.6,
    ),
    (
        "centernet_dla34",
        "xingyizhou_2x",
        "centernet_dla",
        "ctdet_coco_dla_2x.pth",
        "18Q3fzzAsha_3Qid6mn4jcIFPeOGUaj1d",
        37.4,
    ),
    (
        "centernet_dla34",
        "xingyizhou_1x",
        "centernet_dla",
        "ctdet_coco_dla_1x.pth",
        "1xqFsdA3DANMq1MfnXG8n7nQPe4AfXTHv",
        36.3,
    ),
    (
        "centernet_hourglass104",
        "xingyizhou",
        "centernet_hourglass",
        "ctdet_coco_hg.pth",
        "13F904yXltGIqa_K3g3-FLleaNX0n7c9O",
        40.3,
    ),
)


def centernet_card(name: str, tag: str, layout: str, file: str, number: str, percent: float) -> Card:
    location = f"https://drive.google.com/file/d/{number}/view#{file}"
    return Card(name, tag, layout, location, None, "MIT", IMAGES, coco_ap((percent,)), MODEL_ZOO, NOTE)


CARDS: tuple[Card, ...] = tuple(centernet_card(*row) for row in FILES)
