"""The loss of Segment Anything (Kirillov et al. 2023, appendix A): focal, dice and IoU of the best of several masks."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num

from eqvision.losses.masks import mask_dice, mask_focal
from eqvision.types import MaskPredictions


class PromptedMaskConfig(NamedTuple):
    """Weights of the terms; ``alpha`` and ``gamma`` are those of the focal loss (the paper has RetinaNet's)."""

    focal: float = 20.0
    dice: float = 1.0
    iou: float = 1.0
    alpha: float = 0.25
    gamma: float = 2.0


SAM_LOSS = PromptedMaskConfig()


class PromptedMaskLosses(NamedTuple):
    """One value of each term for each prompt, of its best mask; ``total`` is weighted. 0 where not valid.

    ``best`` is the number of that mask, ``actual_iou`` its IoU with the target.
    """

    total: Float[Array, "b p"]
    focal: Float[Array, "b p"]
    dice: Float[Array, "b p"]
    iou: Float[Array, "b p"]
    actual_iou: Float[Array, "b p"]
    best: Int[Array, "b p"]


def prompted_mask_loss(
    predictions: MaskPredictions,
    masks: Num[Array, "b p h w"],
    valid: Bool[Array, "b p"],
    *,
    config: PromptedMaskConfig = SAM_LOSS,
) -> PromptedMaskLosses:
    """Every mask of a prompt is compared with the target, and the one with the least focal and dice loss counts.

    ``masks`` are 0 or 1 at the size of the logits. The expected IoU of that mask is drawn to its actual one, at
    threshold zero, by their squared difference; the actual one has no gradient. Rows that are not ``valid`` may hold
    anything. Raises ValueError for masks of another size.
    """
    b, p, m, h, w = predictions.logits.shape
    if masks.shape != (b, p, h, w):
        raise ValueError(
            f"prompted_mask_loss: masks {masks.shape} do not fit logits {predictions.logits.shape}; "
            f"expected {(b, p, h, w)} (resize the masks, or the logits)"
        )
    inside = valid[:, :, None]
    logits = jnp.where(inside[..., None, None], predictions.logits.astype(jnp.float32), 0.0)
    targets = jnp.where(inside[..., None], masks, 0).astype(jnp.float32)
    every = jnp.broadcast_to(targets[:, :, None], logits.shape).reshape(-1, h, w)
    rows = logits.reshape(-1, h, w)
    focal = mask_focal(rows, every, alpha=config.alpha, gamma=config.gamma).reshape(b, p, m)
    dice = mask_dice(rows, every).reshape(b, p, m)
    actual = lax.stop_gradient(mask_iou(rows, every).reshape(b, p, m))
    expected = jnp.where(inside, predictions.iou.astype(jnp.float32), 0.0)
    best = jnp.argmin(lax.stop_gradient(config.focal * focal + config.dice * dice), axis=-1)
    parts = (focal, dice, jnp.square(expected - actual), actual)
    focal, dice, iou, actual = (jnp.where(valid, _at(x, best), 0.0) for x in parts)
    total = config.focal * focal + config.dice * dice + config.iou * iou
    return PromptedMaskLosses(total, focal, dice, iou, actual, best)


def mask_iou(logits: Float[Array, "n h w"], masks: Num[Array, "n h w"]) -> Float[Array, " n"]:
    """IoU of ``logits`` above zero with masks of 0 and 1; 1 where both are empty."""
    found, wanted = logits > 0, masks > 0.5
    both = jnp.sum(found & wanted, axis=(1, 2), dtype=jnp.float32)
    either = jnp.sum(found | wanted, axis=(1, 2), dtype=jnp.float32)
    return jnp.where(either > 0, both / jnp.maximum(either, 1.0), 1.0)


def _at(values: Float[Array, "b p m"], place: Int[Array, "b p"]) -> Float[Array, "b p"]:
    return jnp.take_along_axis(values, place[..., None], axis=-1)[..., 0]
