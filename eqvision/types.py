"""Batches and shape aliases that rooms share. Everything here is a NamedTuple of arrays, so it is a pytree."""

from typing import NamedTuple

from jaxtyping import Array, Float, Int, Num, UInt8

Images = Float[Array, "b h w c"]
Tokens = Float[Array, "b n d"]
Features = tuple[Float[Array, "b _ _ _"], ...]  # a pyramid: channels last, fine to coarse
Labels = Num[Array, "b ..."]  # what shape fits is for losses and metrics to say, in words


class ClassificationBatch(NamedTuple):
    """One batch (numpy on the host, jax on the device) of images with what is to be predicted from each.

    ``images`` stay uint8 until the device. ``labels`` are class indices (single label), 0/1 or soft
    rows (multi-label, mixup) or real values (regression). ``weights`` is 0 on rows that only pad the
    batch and 1 elsewhere. ``indices`` are positions in the data source, so that errors can name the
    example; -1 on padding.
    """

    images: UInt8[Array, "b h w c"]
    labels: Labels
    weights: Float[Array, " b"]
    indices: Int[Array, " b"]


class WeightedValues(NamedTuple):
    """Per-example values and their weights; the task divides the sums globally."""

    values: Float[Array, " b"]
    weights: Float[Array, " b"]


class TokenFeatures(NamedTuple):
    """What a transformer backbone gives: ``prefix`` holds the class token, a distillation token and the
    registers (0 of each is legal), ``patches`` the grid of patch tokens, which is also a feature map of one level.
    """

    prefix: Float[Array, "b p d"]
    patches: Float[Array, "b h w d"]
