"""R-CNNs on COCO: torchvision's, detectron2's and mmdet's files. AP is that of val2017 as their authors print it."""

from eqvision.pretrained.cards.card import IMAGENET_MEAN, Card, Preprocessing
from eqvision.pretrained.cards.resnet import digest_in

TORCHVISION_DOCS = "https://docs.pytorch.org/vision/stable/models.html"
DETECTRON2_ZOO = "https://github.com/facebookresearch/detectron2/blob/main/MODEL_ZOO.md"
MMDET_CONFIGS = "https://github.com/open-mmlab/mmdetection/tree/main/configs"
MMDET = "https://download.openmmlab.com/mmdetection/v2.0"

# The shorter side to 800 pixels, the longer to at most 1333.
IMAGES = Preprocessing(800, interpolation="bilinear", crop_fraction=0.0, longest=1333)
# Of 0..255 the mean is subtracted, and nothing divided.
CAFFE_IMAGES = Preprocessing(800, IMAGENET_MEAN, (1 / 255,) * 3, "bilinear", 0.0, longest=1333)
CAFFE_NOTE = (
    "MSRA's ResNet, which reads BGR of 0..255 less the mean 103.53 116.28 123.675: its first convolution is turned "
    "round when it is loaded, so that images here are RGB"
)

# Model, tag, file at download.pytorch.org, figures.
TORCHVISION = (
    ("faster_rcnn_r50_fpn", "torchvision_v1", "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth", (37.0,)),
    ("mask_rcnn_r50_fpn", "torchvision_v1", "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth", (37.9, 34.6)),
    ("faster_rcnn_r50_fpn_v2", "torchvision_v2", "fasterrcnn_resnet50_fpn_v2_coco-dd69338a.pth", (46.7,)),
    ("mask_rcnn_r50_fpn_v2", "torchvision_v2", "maskrcnn_resnet50_fpn_v2_coco-73cbd019.pth", (47.4, 41.8)),
)
# Model, what follows detectron2 in the tag, folder and file at dl.fbaipublicfiles.com/detectron2, figures.
DETECTRON2 = (
    (
        "faster_rcnn_r50_fpn",
        "3x",
        "COCO-Detection/faster_rcnn_R_50_FPN_3x/137849458/model_final_280758.pkl",
        (40.2,),
    ),
    (
        "faster_rcnn_r50_fpn",
        "1x",
        "COCO-Detection/faster_rcnn_R_50_FPN_1x/137257794/model_final_b275ba.pkl",
        (37.9,),
    ),
    (
        "mask_rcnn_r50_fpn",
        "3x",
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x/137849600/model_final_f10217.pkl",
        (41.0, 37.2),
    ),
    (
        "mask_rcnn_r50_fpn",
        "1x",
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x/137260431/model_final_a54504.pkl",
        (38.6, 35.2),
    ),
    (
        "cascade_mask_rcnn_r50_fpn",
        "3x",
        "Misc/cascade_mask_rcnn_R_50_FPN_3x/144998488/model_final_480dd8.pkl",
        (44.3, 38.5),
    ),
    (
        "cascade_mask_rcnn_r50_fpn",
        "1x",
        "Misc/cascade_mask_rcnn_R_50_FPN_1x/138602847/model_final_e9d89b.pkl",
        (42.1, 36.4),
    ),
)
# Model, folder of configurations, file at download.openmmlab.com, figures; all of the 1x schedule.
MMDET_FILES = (
    (
        "faster_rcnn_r50_fpn",
        "faster_rcnn",
        "faster_rcnn_r50_fpn_1x_coco/faster_rcnn_r50_fpn_1x_coco_20200130-047c8118.pth",
        (37.4,),
    ),
    (
        "mask_rcnn_r50_fpn",
        "mask_rcnn",
        "mask_rcnn_r50_fpn_1x_coco/mask_rcnn_r50_fpn_1x_coco_20200205-d4b0c5d6.pth",
        (38.2, 34.7),
    ),
    (
        "cascade_rcnn_r50_fpn",
        "cascade_rcnn",
        "cascade_rcnn_r50_fpn_1x_coco/cascade_rcnn_r50_fpn_1x_coco_20200316-3dc56deb.pth",
        (40.3,),
    ),
)

VITDET_README = "https://github.com/facebookresearch/detectron2/blob/main/projects/ViTDet/README.md"
VITDET_IMAGES = Preprocessing(1024, interpolation="bilinear", crop_fraction=0.0, longest=1024)
VITDET_NOTE = "the figure was measured on squares of 1024 pixels, padded on the right and below"
# Model, folder and file at dl.fbaipublicfiles.com/detectron2/ViTDet/COCO, figures; 100 epochs, of size h 75.
VITDET = (
    ("mask_rcnn_vitdet_b", "mask_rcnn_vitdet_b/f325346929/model_final_61ccd1.pkl", (51.6, 45.9)),
    ("mask_rcnn_vitdet_l", "mask_rcnn_vitdet_l/f325599698/model_final_6146ed.pkl", (55.5, 49.2)),
    ("mask_rcnn_vitdet_h", "mask_rcnn_vitdet_h/f329145471/model_final_7224f1.pkl", (56.7, 50.2)),
    ("cascade_mask_rcnn_vitdet_b", "cascade_mask_rcnn_vitdet_b/f325358525/model_final_435fa9.pkl", (54.0, 46.7)),
    ("cascade_mask_rcnn_vitdet_l", "cascade_mask_rcnn_vitdet_l/f328021305/model_final_1a9f28.pkl", (57.6, 50.0)),
    ("cascade_mask_rcnn_vitdet_h", "cascade_mask_rcnn_vitdet_h/f328730692/model_final_f05665.pkl", (58.7, 51.0)),
)


def coco_ap(figures: tuple[float, ...]) -> str:
    """Of boxes, and of masks where there are two."""
    text = f"COCO val2017 box AP {figures[0]:g}"
    return text if len(figures) == 1 else f"{text}, mask AP {figures[1]:g}"


def torchvision_card(name: str, tag: str, file: str, figures: tuple[float, ...]) -> Card:
    location = f"https://download.pytorch.org/models/{file}"
    layout, licence = "torchvision_rcnn", "BSD-3-Clause"
    return Card(name, tag, layout, location, digest_in(file), licence, IMAGES, coco_ap(figures), TORCHVISION_DOCS)


def detectron2_card(name: str, schedule: str, file: str, figures: tuple[float, ...]) -> Card:
    """The digits in the file's name are of MD5, so no digest is checked."""
    return Card(
        name,
        f"detectron2_{schedule}",
        "detectron2_rcnn",
        f"https://dl.fbaipublicfiles.com/detectron2/{file}",
        None,
        "CC-BY-SA-3.0",
        CAFFE_IMAGES,
        coco_ap(figures),
        DETECTRON2_ZOO,
        CAFFE_NOTE,
    )


def mmdet_card(name: str, folder: str, file: str, figures: tuple[float, ...]) -> Card:
    return Card(
        name,
        "mmdet_1x",
        "mmdet_rcnn",
        f"{MMDET}/{folder}/{file}",
        digest_in(file),
        "Apache-2.0",
        IMAGES,
        coco_ap(figures),
        f"{MMDET_CONFIGS}/{folder}",
    )


def vitdet_card(name: str, file: str, figures: tuple[float, ...]) -> Card:
    location = f"https://dl.fbaipublicfiles.com/detectron2/ViTDet/COCO/{file}"
    licence, layout, tag = "Apache-2.0", "detectron2_vitdet", "detectron2"
    metric = coco_ap(figures)
    return Card(name, tag, layout, location, None, licence, VITDET_IMAGES, metric, VITDET_README, VITDET_NOTE)


CARDS: tuple[Card, ...] = (
    *(torchvision_card(*row) for row in TORCHVISION),
    *(detectron2_card(*row) for row in DETECTRON2),
    *(mmdet_card(*row) for row in MMDET_FILES),
    *(vitdet_card(*row) for row in VITDET),
)
