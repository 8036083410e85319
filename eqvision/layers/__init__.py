"""Parameterised building blocks: batched, channels last, array-only pytrees."""

from eqvision.layers.attention import Attention, Implementation, attention
from eqvision.layers.batch_norm import BatchNorm, FrozenBatchNorm, batch_norm
from eqvision.layers.conv import Conv, EpsOn, Padding, StandardizedConv, average_pool, convolve, max_pool
from eqvision.layers.conv_transpose import ConvTranspose, bilinear_upsampling
from eqvision.layers.decoder import DecoderBlock, DecoderStack, TextMLP, TextNorm
from eqvision.layers.deform_conv import DeformConv
from eqvision.layers.deformable_attention import DeformableAttention
from eqvision.layers.deformable_transformer import DeformableDecoder, DeformableEncoder
from eqvision.layers.detr_transformer import DETRDecoder, DETRDecoderLayer, DETREncoder, DETREncoderLayer
from eqvision.layers.drop import LayerScale, MissingKeyError, drop_path, dropout, fold, require_key
from eqvision.layers.fourier_position import FourierPosition
from eqvision.layers.init import he_normal_fan_out, lecun_normal, normal, truncated_normal, uniform, xavier_uniform
from eqvision.layers.kv_cache import KVCache, Memory
from eqvision.layers.linear import Initializer, Linear
from eqvision.layers.mimetic import mimetic_attention, near_bias, sine_positions
from eqvision.layers.mlp import MLP, Activation, GatedMLP, activate
from eqvision.layers.norm import GroupNorm, LayerNorm, RMSNorm, layer_norm
from eqvision.layers.normed_conv import NormedConv, NormKind, build_norm
from eqvision.layers.patch import PatchEmbed, PatchEmbed3D
from eqvision.layers.position import (
    PositionEmbedding1D,
    PositionEmbedding2D,
    SinCos2D,
    resample_grid,
    sincos_1d,
    sincos_2d,
    sincos_3d,
)
from eqvision.layers.prompts import (
    ABSENT,
    BOTTOM_RIGHT,
    INSIDE,
    NO_POINT,
    OUTSIDE,
    TOP_LEFT,
    MaskEncoder,
    PromptEncoder,
    mask_prompts,
)
from eqvision.layers.relative_attention import RelativeAttention
from eqvision.layers.relative_buckets import RelativeBias, relative_buckets
from eqvision.layers.sine_position import sine_position, size_mask
from eqvision.layers.token_embedding import TokenEmbedding
from eqvision.layers.torch_init import torch_conv, torch_linear
from eqvision.layers.transformer import MLPKind, Remat, TransformerBlock, TransformerStack, rematerialised
from eqvision.layers.two_way import NarrowAttention, TwoWayBlock, TwoWayTransformer

__all__ = [
    "ABSENT",
    "BOTTOM_RIGHT",
    "INSIDE",
    "MLP",
    "NO_POINT",
    "OUTSIDE",
    "TOP_LEFT",
    "Activation",
    "Attention",
    "BatchNorm",
    "Conv",
    "ConvTranspose",
    "DETRDecoder",
    "DETRDecoderLayer",
    "DETREncoder",
    "DETREncoderLayer",
    "DecoderBlock",
    "DecoderStack",
    "DeformConv",
    "DeformableAttention",
    "DeformableDecoder",
    "DeformableEncoder",
    "EpsOn",
    "FourierPosition",
    "FrozenBatchNorm",
    "GatedMLP",
    "GroupNorm",
    "Implementation",
    "Initializer",
    "KVCache",
    "LayerNorm",
    "LayerScale",
    "Linear",
    "MLPKind",
    "MaskEncoder",
    "Memory",
    "MissingKeyError",
    "NarrowAttention",
    "NormKind",
    "NormedConv",
    "Padding",
    "PatchEmbed",
    "PatchEmbed3D",
    "PositionEmbedding1D",
    "PositionEmbedding2D",
    "PromptEncoder",
    "RMSNorm",
    "RelativeAttention",
    "RelativeBias",
    "Remat",
    "SinCos2D",
    "StandardizedConv",
    "TextMLP",
    "TextNorm",
    "TokenEmbedding",
    "TransformerBlock",
    "TransformerStack",
    "TwoWayBlock",
    "TwoWayTransformer",
    "activate",
    "attention",
    "average_pool",
    "batch_norm",
    "bilinear_upsampling",
    "build_norm",
    "convolve",
    "drop_path",
    "dropout",
    "fold",
    "he_normal_fan_out",
    "layer_norm",
    "lecun_normal",
    "mask_prompts",
    "max_pool",
    "mimetic_attention",
    "near_bias",
    "normal",
    "relative_buckets",
    "rematerialised",
    "require_key",
    "resample_grid",
    "sincos_1d",
    "sincos_2d",
    "sincos_3d",
    "sine_position",
    "sine_positions",
    "size_mask",
    "torch_conv",
    "torch_linear",
    "truncated_normal",
    "uniform",
    "xavier_uniform",
]
