"""Segmenters: from images to a class for each pixel, and (``sam``) from prompts to masks."""

from eqvision.segmenters.segmenter import SegmentationHead, Segmenter, bare_images, resized_logits
from eqvision.segmenters.unet import UNet, mirrored, unet

__all__ = [
    "SegmentationHead",
    "Segmenter",
    "UNet",
    "bare_images",
    "mirrored",
    "resized_logits",
    "unet",
]
