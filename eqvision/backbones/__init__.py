"""From images to features, one file per family."""

from eqvision.backbones.axial_resnet import AxialResNet, axial_resnet
from eqvision.backbones.bert import BERT_SIZES, BertEncoder, BertSize, bert_encoder, mimetic_bert
from eqvision.backbones.bit import BiT, bit
from eqvision.backbones.checks import check_images, check_layer, legal_size
from eqvision.backbones.clip_resnet import ClipResNet
from eqvision.backbones.clip_text import ClipText, TextSize, pool_end
from eqvision.backbones.convnext import CONVNEXT_SIZES, ConvNeXt, ConvNeXtSize, convnext
from eqvision.backbones.dla import DLA, DLA_SIZES, DLASize, dla
from eqvision.backbones.hourglass import HOURGLASS_104, HourglassSize, StackedHourglass, hourglass_104
from eqvision.backbones.hybrid import HybridViT, hybrid_vit
from eqvision.backbones.mixer import MIXER_SIZES, Mixer, MixerSize, mixer
from eqvision.backbones.resnet import ResNet, resnet, resnet_cifar
from eqvision.backbones.small import MLPBackbone, SmallCNN, mlp, small_cnn
from eqvision.backbones.swin import SWIN_SIZES, SwinSize, SwinTransformer, swin
from eqvision.backbones.t5 import T5_V1_0, T5_V1_1, T5Encoder, T5Size
from eqvision.backbones.unet import DoubleConv, UNetEncoder, legal_side, lost_pixels
from eqvision.backbones.vit import SIZES, VisionTransformer, ViTSize, vit
from eqvision.backbones.vitdet import VitDet, position_grid, vitdet, vitdet_b, vitdet_h, vitdet_l

__all__ = [
    "BERT_SIZES",
    "CONVNEXT_SIZES",
    "DLA",
    "DLA_SIZES",
    "HOURGLASS_104",
    "MIXER_SIZES",
    "SIZES",
    "SWIN_SIZES",
    "T5_V1_0",
    "T5_V1_1",
    "AxialResNet",
    "BertEncoder",
    "BertSize",
    "BiT",
    "ClipResNet",
    "ClipText",
    "ConvNeXt",
    "ConvNeXtSize",
    "DLASize",
    "DoubleConv",
    "HourglassSize",
    "HybridViT",
    "MLPBackbone",
    "Mixer",
    "MixerSize",
    "ResNet",
    "SmallCNN",
    "StackedHourglass",
    "SwinSize",
    "SwinTransformer",
    "T5Encoder",
    "T5Size",
    "TextSize",
    "UNetEncoder",
    "ViTSize",
    "VisionTransformer",
    "VitDet",
    "axial_resnet",
    "bert_encoder",
    "bit",
    "check_images",
    "check_layer",
    "convnext",
    "dla",
    "hourglass_104",
    "hybrid_vit",
    "legal_side",
    "legal_size",
    "lost_pixels",
    "mimetic_bert",
    "mixer",
    "mlp",
    "pool_end",
    "position_grid",
    "resnet",
    "resnet_cifar",
    "small_cnn",
    "swin",
    "vit",
    "vitdet",
    "vitdet_b",
    "vitdet_h",
    "vitdet_l",
]
