"""Points, boxes and masks that ask for the mask of an object, as vectors (Kirillov et al. 2023, Segment Anything)."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from eqvision.layers.fourier_position import FourierPosition
from eqvision.layers.init import normal
from eqvision.layers.linear import Linear
from eqvision.layers.mlp import activate
from eqvision.layers.norm import LayerNorm
from eqvision.layers.patch import PatchEmbed
from eqvision.layers.torch_init import torch_linear
from eqvision.types import MaskPrompts

# What a point is; the first four are rows of ``PromptEncoder.kinds``.
OUTSIDE, INSIDE, TOP_LEFT, BOTTOM_RIGHT = range(4)
NO_POINT, ABSENT = -1, -2

MASK_STRIDE = 4  # of the features, in cells of a mask that is a prompt


class MaskEncoder(eqx.Module):
    """Two convolutions of window and stride 2, each with layer norm and GELU, then one of window 1."""

    convs: tuple[PatchEmbed, PatchEmbed]
    norms: tuple[LayerNorm, LayerNorm]
    out: Linear

    def __init__(self, width: int, hidden: int, *, key: PRNGKeyArray):
        keys, quarter = jax.random.split(key, 3), hidden // 4
        self.convs = (PatchEmbed(1, quarter, 2, key=keys[0]), PatchEmbed(quarter, hidden, 2, key=keys[1]))
        self.norms = (LayerNorm(quarter), LayerNorm(hidden))
        self.out = torch_linear(hidden, width, key=keys[2])

    def __call__(self, masks: Float[Array, "b h w"]) -> Float[Array, "b h2 w2 d"]:
        x = masks[..., None]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = activate(norm(conv(x)), "gelu")
        return self.out(x)


class PromptEncoder(eqx.Module):
    """Points and boxes as tokens, masks as a map that is added to the features.

    ``position`` is that of the features, too. A point outside, a point inside and the two corners of a box have each
    a vector in ``kinds``; ``no_point`` stands in the place of a box where only points are given, and ``no_mask`` at
    every place where no mask is.
    """

    position: FourierPosition
    kinds: Float[Array, "4 d"]
    no_point: Float[Array, " d"]
    no_mask: Float[Array, " d"]
    masks: MaskEncoder

    def __init__(self, width: int, *, mask_channels: int = 16, key: PRNGKeyArray):
        keys = jax.random.split(key, 5)
        self.position = FourierPosition(width, key=keys[0])
        self.kinds = normal(keys[1], (4, width))
        self.no_point = normal(keys[2], (width,))
        self.no_mask = normal(keys[3], (width,))
        self.masks = MaskEncoder(width, mask_channels, key=keys[4])

    def tokens(
        self, points: Float[Array, "b p n 2"], labels: Int[Array, "b p n"], size: tuple[int, int]
    ) -> Float[Array, "b p n d"]:
        """``size`` is height and width of the model's images; float32, zeros for what is absent."""
        real = (labels >= 0)[..., None]
        places = (jnp.where(real, points.astype(jnp.float32), 0.0) + 0.5) / np.array(size[::-1], np.float32)
        known = self.position(places) + self.kinds[jnp.clip(labels, 0, 3)]
        other = jnp.where((labels == NO_POINT)[..., None], self.no_point, 0.0)
        return jnp.where(real, known, other)

    def map(
        self,
        masks: Float[Array, "b p h w"] | None,
        has_mask: Bool[Array, "b p"] | None,
        grid: tuple[int, int],
        dtype: jnp.dtype,
    ) -> Float[Array, "b p gh gw d"]:
        """What is added to features of ``grid`` places; of one image, prompt and place where there are no masks.

        Raises ValueError for masks that are not four times as large.
        """
        nothing = self.no_mask.astype(dtype)[None, None, None, None]
        if masks is None:
            return nothing
        if masks.shape[2:] != (MASK_STRIDE * grid[0], MASK_STRIDE * grid[1]):
            raise ValueError(
                f"prompt masks of {masks.shape[2]}x{masks.shape[3]} do not fit features of {grid[0]}x{grid[1]}; "
                f"expected {MASK_STRIDE * grid[0]}x{MASK_STRIDE * grid[1]}, as the logits of a prediction are"
            )
        if has_mask is not None:  # what is no mask may be anything, NaN too
            masks = jnp.where(has_mask[:, :, None, None], masks, 0.0)
        encoded = self.masks(masks.reshape(-1, *masks.shape[2:]).astype(dtype))
        encoded = encoded.reshape(*masks.shape[:2], *encoded.shape[1:])
        return encoded if has_mask is None else jnp.where(has_mask[:, :, None, None, None], encoded, nothing)


def mask_prompts(
    points: Float[np.ndarray, "b p n 2"] | None = None,
    labels: Int[np.ndarray, "b p n"] | None = None,
    boxes: Float[np.ndarray, "b p 4"] | None = None,
    masks: Float[np.ndarray, "b p h w"] | None = None,
    *,
    count: tuple[int, int] = (1, 1),
    slots: int | None = None,
) -> MaskPrompts:
    """Prompts put together on the host: points with labels, boxes (xyxy), both or neither; and masks.

    Points without boxes are followed by a token that says that there is none. ``slots`` fills up with absent points,
    which change nothing, so that a program of one shape serves all. ``count`` is the number of images and prompts
    where no argument tells it. Raises ValueError for arguments that do not fit each other, or the slots.
    """
    given = {"points": points, "labels": labels, "boxes": boxes, "masks": masks}
    given = {name: x for name, x in given.items() if x is not None}
    counts = {x.shape[:2] for x in given.values()} or {count}
    if len(counts) > 1 or (points is None) != (labels is None):
        shapes = ", ".join(f"{name} {x.shape}" for name, x in given.items())
        raise ValueError(f"prompts must be of the same images, with a label for each point; got {shapes}")
    parts = [*_of_points(points, labels, boxes), *_of_boxes(boxes)]
    (images, prompts), used = counts.pop(), sum(kinds.shape[2] for _, kinds in parts)
    if slots is not None and used > slots:
        raise ValueError(f"{used} points, corners and signs of no box for each prompt do not fit into {slots} slots")
    rest = (images, prompts, 0 if slots is None else slots - used)
    parts.append((np.zeros((*rest, 2)), np.full(rest, ABSENT)))
    places, kinds = (np.concatenate(each, axis=2) for each in zip(*parts, strict=True))
    return MaskPrompts(
        jnp.asarray(places, jnp.float32), jnp.asarray(kinds, jnp.int32), None if masks is None else jnp.asarray(masks)
    )


def _of_points(points: np.ndarray | None, labels: np.ndarray | None, boxes: np.ndarray | None):
    if points is None or labels is None:
        return
    if points.shape[:3] != labels.shape:
        raise ValueError(f"points {points.shape} need labels {points.shape[:3]}, one for each; got {labels.shape}")
    if not np.isin(labels, (ABSENT, NO_POINT, OUTSIDE, INSIDE)).all():
        raise ValueError(f"labels must be 1 (inside), 0 (outside) or -1 (no point), got {np.unique(labels).tolist()}")
    yield points, labels
    if boxes is None:
        yield np.zeros((*points.shape[:2], 1, 2)), np.full((*points.shape[:2], 1), NO_POINT)


def _of_boxes(boxes: np.ndarray | None):
    if boxes is not None:
        kinds = np.array([TOP_LEFT, BOTTOM_RIGHT])
        yield boxes.reshape(*boxes.shape[:2], 2, 2), np.broadcast_to(kinds, (*boxes.shape[:2], 2))
