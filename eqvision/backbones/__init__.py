"""From images to features, one file per family."""

from eqvision.backbones.axial_resnet import AxialResNet, axial_resnet
from eqvision.backbones.bit import BiT, bit
from eqvision.backbones.checks import check_images, check_layer, legal_size
from eqvision.backbones.convnext import CONVNEXT_SIZES, ConvNeXt, ConvNeXtSize, convnext
from eqvision.backbones.hybrid import HybridViT, hybrid_vit
from eqvision.backbones.mixer import MIXER_SIZES, Mixer, MixerSize, mixer
from eqvision.backbones.resnet import ResNet, resnet, resnet_cifar
from eqvision.backbones.small import MLPBackbone, SmallCNN, mlp, small_cnn
from eqvision.backbones.swin import SWIN_SIZES, SwinSize, SwinTransformer, swin
from eqvision.backbones.vit import SIZES, VisionTransformer, ViTSize, vit

__all__ = [
    "CONVNEXT_SIZES",
    "MIXER_SIZES",
    "SIZES",
    "SWIN_SIZES",
    "AxialResNet",
    "BiT",
    "ConvNeXt",
    "ConvNeXtSize",
    "HybridViT",
    "MLPBackbone",
    "Mixer",
    "MixerSize",
    "ResNet",
    "SmallCNN",
    "SwinSize",
    "SwinTransformer",
    "ViTSize",
    "VisionTransformer",
    "axial_resnet",
    "bit",
    "check_images",
    "check_layer",
    "convnext",
    "hybrid_vit",
    "legal_size",
    "mixer",
    "mlp",
    "resnet",
    "resnet_cifar",
    "small_cnn",
    "swin",
    "vit",
]
