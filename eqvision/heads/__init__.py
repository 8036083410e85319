"""From features to raw predictions."""

from eqvision.heads.centernet import PRIOR_BIAS, CenterHead, MapBranch
from eqvision.heads.centernet2 import CenterOutputs, CenterProposalHead
from eqvision.heads.classification import AttentionPool, DistilledHead, MapHead, TokenHead, TokenPool, zeros
from eqvision.heads.deeplab import ASPP, DeepLabV3Head, DeepLabV3PlusHead
from eqvision.heads.mask_transformer import MaskTransformerHead, PatchLinearHead
from eqvision.heads.norm_pool import NormPoolHead
from eqvision.heads.normed_map import NormedMapHead
from eqvision.heads.per_layer import PerLayerHead
from eqvision.heads.prompted_mask import PromptedMaskHead, ReluMLP
from eqvision.heads.roi_box import RoIBoxHead
from eqvision.heads.roi_mask import RoIMaskHead
from eqvision.heads.rpn import RPNHead, RPNOutputs
from eqvision.heads.segmentation import ConvHead, PixelHead
from eqvision.heads.set_prediction import BoxMLP, MaskInputs, PanopticMaskHead, SetPredictionHead
from eqvision.heads.upernet import PyramidPooling, UPerNetHead

__all__ = [
    "ASPP",
    "PRIOR_BIAS",
    "AttentionPool",
    "BoxMLP",
    "CenterHead",
    "CenterOutputs",
    "CenterProposalHead",
    "ConvHead",
    "DeepLabV3Head",
    "DeepLabV3PlusHead",
    "DistilledHead",
    "MapBranch",
    "MapHead",
    "MaskInputs",
    "MaskTransformerHead",
    "NormPoolHead",
    "NormedMapHead",
    "PanopticMaskHead",
    "PatchLinearHead",
    "PerLayerHead",
    "PixelHead",
    "PromptedMaskHead",
    "PyramidPooling",
    "RPNHead",
    "RPNOutputs",
    "ReluMLP",
    "RoIBoxHead",
    "RoIMaskHead",
    "SetPredictionHead",
    "TokenHead",
    "TokenPool",
    "UPerNetHead",
    "zeros",
]
