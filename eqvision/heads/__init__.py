"""From features to raw predictions."""

from eqvision.heads.centernet import PRIOR_BIAS, CenterHead, MapBranch
from eqvision.heads.centernet2 import CenterOutputs, CenterProposalHead
from eqvision.heads.classification import AttentionPool, DistilledHead, MapHead, TokenHead, TokenPool, zeros
from eqvision.heads.deeplab import ASPP, DeepLabV3Head, DeepLabV3PlusHead
from eqvision.heads.embedding import (
    AttentionMapPool,
    AttentionPoolEmbedding,
    ClassTokenProjection,
    EndTokenProjection,
    LastTokenProjection,
)
from eqvision.heads.mask_transformer import MaskTransformerHead, PatchLinearHead
from eqvision.heads.norm_pool import NormPoolHead
from eqvision.heads.normed_map import NormedMapHead
from eqvision.heads.open_vocabulary import GeluMLP, OpenVocabularyHead, QueryClassHead, box_bias
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
    "AttentionMapPool",
    "AttentionPool",
    "AttentionPoolEmbedding",
    "BoxMLP",
    "CenterHead",
    "CenterOutputs",
    "CenterProposalHead",
    "ClassTokenProjection",
    "ConvHead",
    "DeepLabV3Head",
    "DeepLabV3PlusHead",
    "DistilledHead",
    "EndTokenProjection",
    "GeluMLP",
    "LastTokenProjection",
    "MapBranch",
    "MapHead",
    "MaskInputs",
    "MaskTransformerHead",
    "NormPoolHead",
    "NormedMapHead",
    "OpenVocabularyHead",
    "PanopticMaskHead",
    "PatchLinearHead",
    "PerLayerHead",
    "PixelHead",
    "PromptedMaskHead",
    "PyramidPooling",
    "QueryClassHead",
    "RPNHead",
    "RPNOutputs",
    "ReluMLP",
    "RoIBoxHead",
    "RoIMaskHead",
    "SetPredictionHead",
    "TokenHead",
    "TokenPool",
    "UPerNetHead",
    "box_bias",
    "zeros",
]
