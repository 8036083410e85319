"""From features to raw predictions."""

from eqvision.heads.classification import AttentionPool, MapHead, TokenHead, TokenPool, zeros

__all__ = ["AttentionPool", "MapHead", "TokenHead", "TokenPool", "zeros"]
