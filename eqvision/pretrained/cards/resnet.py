"""ResNet: torchvision's files, timm's A1 recipe, and the CIFAR-10 networks of akamaster/pytorch_resnet_cifar10."""

from eqvision.pretrained.cards.card import TIMM_RESULTS, Card, Preprocessing, top1

# torchvision 0.28, torchvision/models/resnet.py: file, top-1, shorter side before the crop of 224. File names hold the
# first digits of the SHA-256. V2 is the recipe of 2021, V1 that of the original paper.
TORCHVISION = (
    ("resnet18", "torchvision_v1", "resnet18-f37072fd.pth", 69.758, 256),
    ("resnet34", "torchvision_v1", "resnet34-b627a593.pth", 73.314, 256),
    ("resnet50", "torchvision_v2", "resnet50-11ad3fa6.pth", 80.858, 232),
    ("resnet50", "torchvision_v1", "resnet50-0676ba61.pth", 76.130, 256),
    ("resnet101", "torchvision_v2", "resnet101-cd907fc2.pth", 81.886, 232),
    ("resnet101", "torchvision_v1", "resnet101-63fe2227.pth", 77.374, 256),
    ("resnet152", "torchvision_v2", "resnet152-f82ba261.pth", 82.284, 232),
    ("resnet152", "torchvision_v1", "resnet152-394f9c45.pth", 78.312, 256),
)

# timm's "ResNet strikes back" A1 (Wightman et al. 2021), evaluated at 224.
TIMM_A1 = (
    ("resnet18", 71.504),
    ("resnet34", 76.420),
    ("resnet50", 80.382),
    ("resnet101", 81.494),
    ("resnet152", 81.998),
)

# README of akamaster/pytorch_resnet_cifar10: test error; digests of the files, and for resnet110 the digits of
# its name.
CIFAR = (
    (
        "resnet20_cifar",
        "resnet20-12fca82f.th",
        8.27,
        "12fca82f0bebc4135bf1f32f6e3710e61d5108578464b84fd6d7f5c1b04036c8",
    ),
    (
        "resnet32_cifar",
        "resnet32-d509ac18.th",
        7.37,
        "d509ac1820d7f25398913559d7e81a13229b1e7adc5648e3bfa5e22dc137f850",
    ),
    (
        "resnet44_cifar",
        "resnet44-014dd654.th",
        6.90,
        "014dd6541728a1c700b1642ab640e211dc6eb8ed507d70697458dc8f8a0ae2e4",
    ),
    (
        "resnet56_cifar",
        "resnet56-4bfd9763.th",
        6.61,
        "4bfd97631478d6b638d2764fd2baff3edb1d7d82252d54439343b6596b9b5367",
    ),
    ("resnet110_cifar", "resnet110-1d1ed7c2.th", 6.32, "1d1ed7c2"),
)


def torchvision_card(name: str, tag: str, file: str, percent: float, resized: int) -> Card:
    return Card(
        name,
        tag,
        layout="torchvision_resnet",
        location=f"https://download.pytorch.org/models/{file}",
        sha256=digest_in(file),
        licence="BSD-3-Clause",
        preprocessing=Preprocessing(224, interpolation="bilinear", crop_fraction=224 / resized),
        metric=top1(percent),
        source="https://docs.pytorch.org/vision/stable/models.html",
    )


def digest_in(file: str) -> str:
    """The digits of torch.hub's file names: NAME-DIGITS.pth."""
    return file.rpartition("-")[2].partition(".")[0]


def timm_card(name: str, percent: float) -> Card:
    return Card(
        name,
        "timm_a1",
        layout="torchvision_resnet",
        location=f"hf:timm/{name}.a1_in1k",
        sha256=None,
        licence="Apache-2.0",
        preprocessing=Preprocessing(224, crop_fraction=0.95),
        metric=top1(percent),
        source=TIMM_RESULTS,
    )


def cifar_card(name: str, file: str, error: float, sha256: str) -> Card:
    repository = "https://github.com/akamaster/pytorch_resnet_cifar10"
    return Card(
        name,
        "cifar10",
        layout="akamaster_resnet_cifar",
        location=f"{repository}/raw/master/pretrained_models/{file}",
        sha256=sha256,
        licence="BSD-2-Clause",
        preprocessing=Preprocessing(32, crop_fraction=1.0),
        metric=f"CIFAR-10 test error {error:g} %",
        source=repository,
    )


CARDS: tuple[Card, ...] = (
    *(torchvision_card(*row) for row in TORCHVISION),
    *(timm_card(*row) for row in TIMM_A1),
    *(cifar_card(*row) for row in CIFAR),
)
