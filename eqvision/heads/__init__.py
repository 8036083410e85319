"""From features to raw predictions."""

from eqvision.heads.centernet import PRIOR_BIAS, CenterHead, MapBranch
from eqvision.heads.centernet2 import CenterOutputs, CenterProposalHead
from eqvision.heads.classification import AttentionPool, DistilledHead, MapHead, TokenHead, TokenPool, zeros
from eqvision.heads.norm_pool import NormPoolHead
from eqvision.heads.normed_map import NormedMapHead
from eqvision.heads.per_layer import PerLayerHead
from eqvision.heads.roi_box import RoIBoxHead
from eqvision.heads.roi_mask import RoIMaskHead
from eqvision.heads.rpn import RPNHead, RPNOutputs
from eqvision.heads.segmentation import PixelHead
from eqvision.heads.set_prediction import BoxMLP, MaskInputs, PanopticMaskHead, SetPredictionHead

__all__ = [
    "PRIOR_BIAS",
    "AttentionPool",
    "BoxMLP",
    "CenterHead",
    "CenterOutputs",
    "CenterProposalHead",
    "DistilledHead",
    "MapBranch",
    "MapHead",
    "MaskInputs",
    "NormPoolHead",
    "NormedMapHead",
    "PanopticMaskHead",
    "PixelHead",
    "PerLayerHead",
    "RPNHead",
    "RPNOutputs",
    "RoIBoxHead",
    "RoIMaskHead",
    "SetPredictionHead",
    "TokenHead",
    "TokenPool",
    "zeros",
]
