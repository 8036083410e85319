"""Mask losses of DETR's panoptic head: sigmoid focal and dice, one value per object."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num, UInt8

from eqvision.losses.classification import sigmoid_focal
from eqvision.ops.collectives import vary_like
from eqvision.ops.resize import resize_images


def mask_focal(
    logits: Float[Array, "n h w"], masks: Num[Array, "n h w"], *, alpha: float = 0.25, gamma: float = 2.0
) -> Float[Array, " n"]:
    """Sigmoid focal loss (Lin et al. 2017), averaged over all pixels, those of the padding included, as published."""
    area = logits.shape[1] * logits.shape[2]
    rows = (x.reshape(-1, area) for x in (logits, masks))
    return sigmoid_focal(*rows, alpha=alpha, gamma=gamma) / area


def mask_dice(logits: Float[Array, "n h w"], masks: Num[Array, "n h w"]) -> Float[Array, " n"]:
    """Dice loss with 1 added above and below, in [0, 1) (Milletari et al. 2016, without their squares)."""
    p, t = jax.nn.sigmoid(logits.astype(jnp.float32)), masks.astype(jnp.float32)
    both, either = (p * t).sum(axis=(1, 2)), (p + t).sum(axis=(1, 2))
    return 1 - (2 * both + 1) / (either + 1)


def matched_mask_losses(
    logits: Float[Array, "b q h w"],
    query_of_target: Int[Array, "b g"],
    masks: UInt8[Array, "b g h2 w2"],
    valid: Bool[Array, "b g"],
) -> tuple[Float[Array, "b g"], Float[Array, "b g"]]:
    """Focal and dice loss of each valid target against its query's logits, enlarged to the size of the targets.

    One target of every image at a time, recomputed in the backward pass: the memory is that of one map of full size
    for each image. Rows that no image uses cost nothing.
    """
    matched = jnp.take_along_axis(logits, jnp.maximum(query_of_target, 0)[:, :, None, None], axis=1)

    @jax.checkpoint
    def row(given: tuple[Float[Array, "b h w"], Bool[Array, " b"], Int[Array, ""]]) -> tuple[Array, Array]:
        # the masks are not split up front as the logits are: that would copy them, and they are the largest array
        logits, used, place = given
        nothing = vary_like(jnp.zeros(len(used)), logits)
        return lax.cond(used.any(), lambda: _losses(logits, masks[:, place], used), lambda: (nothing, nothing))

    focal, dice = lax.map(row, (jnp.moveaxis(matched, 1, 0), valid.T, jnp.arange(valid.shape[1])))
    return focal.T, dice.T


def _losses(
    logits: Float[Array, "b h w"], masks: UInt8[Array, "b h2 w2"], used: Bool[Array, " b"]
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    logits = jnp.where(used[:, None, None], logits.astype(jnp.float32), 0.0)
    masks = jnp.where(used[:, None, None], masks, 0)
    size = (masks.shape[1], masks.shape[2])
    full = resize_images(logits[..., None], size, method="linear", antialias=False)[..., 0]
    focal, dice = mask_focal(full, masks), mask_dice(full, masks)
    return jnp.where(used, focal, 0.0), jnp.where(used, dice, 0.0)
