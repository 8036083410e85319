"""From the maps of a backbone to those that a detector reads. Each neck is built from ``channels`` and ``strides``."""

from eqvision.necks.checks import check_features, check_levels
from eqvision.necks.conv_block import ConvBlock, Convolution
from eqvision.necks.deconv_up import DeconvUp
from eqvision.necks.dla_up import DLAUp
from eqvision.necks.fpn import FPN, Dialect, Extra, caffe2_xavier, upsample_to
from eqvision.necks.map_norms import NormedMaps
from eqvision.necks.map_of_patches import MapNorms, PatchMap
from eqvision.necks.simple_pyramid import SimplePyramid
from eqvision.necks.unet import UNetDecoder, Upsampling

__all__ = [
    "FPN",
    "ConvBlock",
    "Convolution",
    "DLAUp",
    "DeconvUp",
    "Dialect",
    "Extra",
    "MapNorms",
    "NormedMaps",
    "PatchMap",
    "SimplePyramid",
    "UNetDecoder",
    "Upsampling",
    "caffe2_xavier",
    "check_features",
    "check_levels",
    "upsample_to",
]
