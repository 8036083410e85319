"""From features to raw predictions."""

from eqvision.heads.classification import AttentionPool, DistilledHead, MapHead, TokenHead, TokenPool, zeros
from eqvision.heads.norm_pool import NormPoolHead
from eqvision.heads.normed_map import NormedMapHead

__all__ = [
    "AttentionPool",
    "DistilledHead",
    "MapHead",
    "NormPoolHead",
    "NormedMapHead",
    "TokenHead",
    "TokenPool",
    "zeros",
]
