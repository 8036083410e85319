"""From images to features, one file per family."""

from eqvision.backbones.checks import check_images
from eqvision.backbones.resnet import ResNet, resnet, resnet_cifar
from eqvision.backbones.vit import SIZES, VisionTransformer, ViTSize, vit, vit_augreg, vit_big_vision

__all__ = [
    "SIZES",
    "ResNet",
    "ViTSize",
    "VisionTransformer",
    "check_images",
    "resnet",
    "resnet_cifar",
    "vit",
    "vit_augreg",
    "vit_big_vision",
]
