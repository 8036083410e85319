"""How well prompts are answered: IoU of the mask for an object's box, and after each of several simulated clicks.

The first click lies inside the object, each further one where the last mask was wrong (Kirillov et al. 2023, 7.1; there
it is the point deepest in the error, here a random one, as in training). A click's mask is, of the three that it may
mean, the one of which the model expects most; from the second on, and for boxes, it is the one for clear prompts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from eqvision.layers.prompts import ABSENT, BOTTOM_RIGHT, NO_POINT, TOP_LEFT
from eqvision.losses.prompted_masks import mask_iou
from eqvision.segmenters.sam.model import SAM, choose_masks
from eqvision.segmenters.sam.rounds import Masks, error_points, likeliest, mask_boxes, put_point
from eqvision.types import MaskPrompts


class ClickScores(NamedTuple):
    """IoU at the size of the logits, for the box and after each click; and what was found for the box, as logits."""

    box: Float[Array, "b p"]
    clicks: Float[Array, "n b p"]
    logits: Float[Array, "b p h w"]


def score_clicks(
    model: SAM,
    features: Float[Array, "b gh gw d"],
    masks: Masks,
    valid: Bool[Array, "b p"],
    *,
    clicks: int,
    key: Key[Array, ""],
) -> ClickScores:
    """``masks`` are 0 or 1 at the size of the model's logits; scores of rows that are not ``valid`` are 0."""
    stride = model.backbone.strides[-1] // 4  # pixels of the image in a cell of a mask
    box = likeliest(choose_masks(model.decode(features, box_prompts(masks, valid, stride=stride)), multimask=False))
    scores, logits = [], jnp.full(masks.shape, -1.0)
    prompts = _nothing(masks, valid, clicks)
    for number in range(clicks):
        place, label = error_points(logits, masks, valid, stride=stride, key=jax.random.fold_in(key, number))
        prompts = put_point(prompts, place, label, number)
        found = choose_masks(model.decode(features, prompts), multimask=number == 0)
        logits = likeliest(found)
        prompts = prompts._replace(masks=logits, has_mask=valid)
        scores.append(_iou(logits, masks, valid))
    return ClickScores(_iou(box, masks, valid), jnp.stack(scores), box)


def box_prompts(masks: Masks, valid: Bool[Array, "b p"], *, stride: int) -> MaskPrompts:
    """The box of each mask, in pixels of the image."""
    corners = mask_boxes(masks > 0.5, stride).reshape(*valid.shape, 2, 2)
    usable = (valid & jnp.any(masks > 0.5, axis=(2, 3)))[..., None]
    labels = jnp.where(usable, jnp.array([TOP_LEFT, BOTTOM_RIGHT]), ABSENT)
    return MaskPrompts(corners, labels.astype(jnp.int32))


def _nothing(masks: Masks, valid: Bool[Array, "b p"], clicks: int) -> MaskPrompts:
    """No point yet and no mask; the last slot says that there is no box, as it does for published weights."""
    b, p, h, w = masks.shape
    labels = jnp.full((b, p, clicks + 1), ABSENT).at[:, :, -1].set(jnp.where(valid, NO_POINT, ABSENT))
    points = jnp.zeros((b, p, clicks + 1, 2))
    return MaskPrompts(points, labels.astype(jnp.int32), jnp.zeros((b, p, h, w)), jnp.zeros((b, p), bool))


def _iou(logits: Float[Array, "b p h w"], masks: Masks, valid: Bool[Array, "b p"]) -> Float[Array, "b p"]:
    b, p, h, w = masks.shape
    targets = jnp.where(valid[..., None, None], masks, 0).reshape(-1, h, w)
    return jnp.where(valid, mask_iou(logits.reshape(-1, h, w), targets).reshape(b, p), 0.0)
