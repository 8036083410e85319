"""Segmenters: from images to a class for each pixel, and (``sam``) from prompts to masks."""

from eqvision.segmenters.convolutional import deeplabv3_resnet, deeplabv3plus_resnet, fcn_resnet
from eqvision.segmenters.segmenter import SegmentationHead, Segmenter, bare_images, filled_up, resized_logits
from eqvision.segmenters.tokens import setr_naive, vit_segmenter
from eqvision.segmenters.unet import UNet, mirrored, unet
from eqvision.segmenters.upernet import upernet_convnext, upernet_resnet, upernet_swin

__all__ = [
    "SegmentationHead",
    "Segmenter",
    "UNet",
    "bare_images",
    "deeplabv3_resnet",
    "deeplabv3plus_resnet",
    "fcn_resnet",
    "filled_up",
    "mirrored",
    "resized_logits",
    "setr_naive",
    "unet",
    "upernet_convnext",
    "upernet_resnet",
    "upernet_swin",
    "vit_segmenter",
]
