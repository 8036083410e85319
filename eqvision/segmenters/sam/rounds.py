"""Training as if a person clicked (Kirillov et al. 2023, appendix A): each round's prompt corrects the last mask.

The first prompt is a point inside the object or its box, with noise. Each further point is drawn from where the last
mask was wrong, and that mask's logits go along. In two rounds, one among them and the last, there is no new point.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num, PRNGKeyArray

from eqvision.layers.prompts import ABSENT, BOTTOM_RIGHT, INSIDE, NO_POINT, OUTSIDE, TOP_LEFT
from eqvision.losses.prompted_masks import SAM_LOSS, PromptedMaskConfig, PromptedMaskLosses, prompted_mask_loss
from eqvision.ops.collectives import vary_like
from eqvision.segmenters.sam.model import SAM, choose_masks
from eqvision.types import MaskPredictions, MaskPrompts

POINTS = 8  # rounds with a new point, behind the first prompt
BOX_NOISE, MOST_NOISE = 0.1, 20.0  # standard deviation as a share of the side, and its limit in pixels

Masks = Num[Array, "b p h w"]
Point = tuple[Float[Array, "b p 2"], Int[Array, "b p"]]


class Rounds(NamedTuple):
    """The losses of all rounds, one after the other along the first axis, and the prompts of the last."""

    losses: PromptedMaskLosses
    prompts: MaskPrompts


def train_rounds(
    model: SAM,
    features: Float[Array, "b gh gw d"],
    masks: Masks,
    valid: Bool[Array, "b p"],
    *,
    key: PRNGKeyArray,
    points: int = POINTS,
    config: PromptedMaskConfig = SAM_LOSS,
) -> Rounds:
    """``points`` + 3 rounds with the same features: the first asks for three masks, the others for one.

    ``masks`` are 0 or 1 at the size of the model's logits, a quarter of the image's. What follows from an earlier mask
    (points, logits) has no gradient. The decoder is recomputed in the backward pass, so that memory is that of one
    round.
    """
    stride = model.backbone.strides[-1] // 4  # pixels of the image in a cell of a mask
    keys = jax.random.split(key, 3)
    prompts = first_prompts(masks, valid, stride=stride, slots=2 + points, key=keys[0])
    quiet = jax.random.randint(keys[1], (), 0, points + 1)  # after so many new points there is a round without one
    decode = jax.checkpoint(functools.partial(_round, config=config), static_argnums=(5,))
    prediction, losses = decode(model, features, prompts, masks, valid, True)

    def more(carry, round_key):
        prompts, logits, number, used = carry
        fresh = (number != quiet) & (used < points)
        place, label = error_points(logits, masks, valid, stride=stride, key=round_key)
        prompts = put_point(prompts, place, jnp.where(fresh, label, ABSENT), 2 + used)
        prompts = prompts._replace(masks=logits, has_mask=valid)
        prediction, losses = decode(model, features, prompts, masks, valid, False)
        return (prompts, likeliest(prediction), number + 1, used + fresh), losses

    started = prompts._replace(masks=jnp.zeros(masks.shape, jnp.float32), has_mask=jnp.zeros_like(valid))
    logits = likeliest(prediction)
    # Over devices the carry must be as varied as what the scan's body gives back.
    begin = vary_like((started, logits, jnp.int32(0), jnp.int32(0)), logits)
    (last, *_), others = lax.scan(more, begin, jax.random.split(keys[2], points + 2))
    return Rounds(jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), losses, others), last)


def _round(
    model: SAM,
    features: Float[Array, "b gh gw d"],
    prompts: MaskPrompts,
    masks: Masks,
    valid: Bool[Array, "b p"],
    multimask: bool,
    *,
    config: PromptedMaskConfig,
) -> tuple[MaskPredictions, PromptedMaskLosses]:
    prediction = choose_masks(model.decode(features, prompts), multimask=multimask)
    return prediction, prompted_mask_loss(prediction, masks, valid, config=config)


def first_prompts(
    masks: Masks, valid: Bool[Array, "b p"], *, stride: int, slots: int, key: PRNGKeyArray
) -> MaskPrompts:
    """A point inside each mask, or with equal chance its box; the box's sides move by a tenth of its size.

    ``stride`` is how many pixels of the image a cell of the masks has. Two slots are taken, the others absent.
    """
    keys, shape = jax.random.split(key, 3), valid.shape
    inside = _drawn(masks > 0.5, stride, keys[0])
    click = jnp.stack([inside, jnp.zeros_like(inside)], axis=2)
    corners = _noisy_boxes(masks > 0.5, stride, keys[1]).reshape(*shape, 2, 2)
    by_box = jax.random.bernoulli(keys[2], 0.5, shape)[..., None]
    kinds = jnp.where(by_box, jnp.array([TOP_LEFT, BOTTOM_RIGHT]), jnp.array([INSIDE, NO_POINT]))
    usable = (valid & jnp.any(masks > 0.5, axis=(2, 3)))[..., None]
    points = jnp.zeros((*shape, slots, 2)).at[:, :, :2].set(jnp.where(by_box[..., None], corners, click))
    labels = jnp.full((*shape, slots), ABSENT).at[:, :, :2].set(jnp.where(usable, kinds, ABSENT))
    return MaskPrompts(points, labels.astype(jnp.int32))


def error_points(
    logits: Float[Array, "b p h w"], masks: Masks, valid: Bool[Array, "b p"], *, stride: int, key: PRNGKeyArray
) -> Point:
    """A point where logits above zero and mask differ, all places alike: inside where the mask was missed, else
    outside. Absent where nothing is wrong.
    """
    wanted = masks > 0.5
    wrong = (wanted != (logits > 0)) & valid[:, :, None, None]
    place = _drawn(wrong, stride, key)
    cells = jnp.floor(place / stride).astype(jnp.int32)
    flat = (cells[..., 1] * wanted.shape[3] + cells[..., 0])[..., None]
    missed = jnp.take_along_axis(wanted.reshape(*valid.shape, -1), flat, axis=2)[..., 0]
    label = jnp.where(missed, INSIDE, OUTSIDE)
    return place, jnp.where(jnp.any(wrong, axis=(2, 3)), label, ABSENT)


def _drawn(where: Bool[Array, "b p h w"], stride: int, key: PRNGKeyArray) -> Float[Array, "b p 2"]:
    """The centre x, y of one cell, drawn from those that are True, in pixels of the image; of any where none is."""
    b, p, h, w = where.shape
    flat = where.reshape(b, p, h * w)
    chosen = jnp.argmax(jnp.where(flat, jax.random.uniform(key, flat.shape, minval=0.5), 0.0), axis=-1)
    centre = (stride - 1) / 2  # pixels have their centres at whole numbers
    return jnp.stack([chosen % w, chosen // w], axis=-1) * float(stride) + centre


def mask_boxes(where: Bool[Array, "b p h w"], stride: int) -> Float[Array, "b p 4"]:
    """Boxes (xyxy) around what is True, in pixels of the image."""
    columns, rows = jnp.any(where, axis=2), jnp.any(where, axis=3)
    low = [jnp.argmax(x, axis=-1) for x in (columns, rows)]
    high = [x.shape[-1] - jnp.argmax(x[..., ::-1], axis=-1) for x in (columns, rows)]
    return jnp.stack([*low, *high], axis=-1) * float(stride)


def _noisy_boxes(where: Bool[Array, "b p h w"], stride: int, key: PRNGKeyArray) -> Float[Array, "b p 4"]:
    """``mask_boxes`` inside the image, each coordinate with noise."""
    sides = np.array([where.shape[3], where.shape[2]] * 2, np.float32) * stride
    box = mask_boxes(where, stride)
    size = jnp.tile(box[..., 2:] - box[..., :2], 2)
    noise = jax.random.normal(key, box.shape) * (BOX_NOISE * size)
    return jnp.clip(box + jnp.clip(noise, -MOST_NOISE, MOST_NOISE), 0.0, sides - 1)


def put_point(
    prompts: MaskPrompts, place: Float[Array, "b p 2"], label: Int[Array, "b p"], slot: int | Int[Array, ""]
) -> MaskPrompts:
    """The point in a slot that is still absent; nothing changes where there is none left."""
    points = prompts.points.at[:, :, slot].set(place, mode="drop")
    return prompts._replace(points=points, labels=prompts.labels.at[:, :, slot].set(label, mode="drop"))


def likeliest(predictions: MaskPredictions) -> Float[Array, "b p h w"]:
    """Logits of the mask of which the model expects most."""
    best = jnp.argmax(predictions.iou, axis=-1)[..., None, None, None]
    return lax.stop_gradient(jnp.take_along_axis(predictions.logits, best, axis=2)[:, :, 0])
