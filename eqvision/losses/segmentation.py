"""Losses of semantic segmentation: a class for each pixel, some of them void.

Normalisers are global, as in ``set_prediction.py``: ``segmentation_counts`` gives the sums of one device, the caller
adds them up over devices (and over the parts of an accumulated batch) and hands the result to ``segmentation_loss``,
whose value is then this device's share. Cross entropy and focal loss are means over all labelled pixels of the batch,
by the weights of their classes, as ``torch.nn.functional.cross_entropy`` has it. Dice and Lovasz loss are no sums over
pixels: they are taken image by image, over the classes that the image's labels have, and averaged over images, so that
no value depends on which images share a batch.

Void pixels (``IGNORE_LABEL``), padding and rows of weight 0 may hold anything, NaN included, and change neither loss
nor gradients. A label that is no class makes the loss NaN.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from eqvision.losses.classification import softmax_cross_entropy, softmax_focal
from eqvision.types import IGNORE_LABEL


@dataclass(frozen=True)
class SegmentationLossConfig:
    """Factors of the losses that are added up, and their options; the default is plain cross entropy.

    Raises ValueError for a negative number, for factors that are all 0 and for a class weight that is not positive.
    """

    cross_entropy: float = 1.0
    """Factor of the cross entropy over pixels."""
    focal: float = 0.0
    """Factor of the softmax focal loss (Lin et al. 2017), which spares pixels that are right already."""
    dice: float = 0.0
    """Factor of the dice loss of each image (Milletari et al. 2016), which counts small classes like large ones."""
    lovasz: float = 0.0
    """Factor of the Lovasz-softmax loss of each image (Berman et al. 2018), which stands in for IoU."""
    focal_gamma: float = 2.0
    """Exponent of the focal loss; 0 makes it the cross entropy."""
    class_weights: tuple[float, ...] = ()
    """Weight of each class in cross entropy and focal loss, as `rebalanced_weights` gives them; none: all 1."""

    def __post_init__(self) -> None:
        for name in (*TERMS, "focal_gamma"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 or more.")
        if not any(getattr(self, name) for name in TERMS):
            raise ValueError(f"{', '.join(TERMS)} are all 0; there is nothing to learn. Set one.")
        if any(not weight > 0 for weight in self.class_weights):
            raise ValueError(f"class_weights are {self.class_weights}; expected a positive number for each class.")


TERMS = ("cross_entropy", "focal", "dice", "lovasz")
CROSS_ENTROPY = SegmentationLossConfig()


class SegmentationCounts(NamedTuple):
    """What the losses are divided by: weights of labelled pixels, and images that have such pixels."""

    pixels: Float[Array, ""]
    images: Float[Array, ""]


def segmentation_counts(
    labels: Int[Array, "b h w"], weights: Float[Array, " b"], config: SegmentationLossConfig = CROSS_ENTROPY
) -> SegmentationCounts:
    """Counts of the rows given. Sum them over devices, as by ``jax.tree.map(global_sum, counts)``.

    Exact below 2**24 pixels on a device, and to float32 rounding above.
    """
    labelled = _labelled(labels, weights)
    return SegmentationCounts(
        pixels=_pixel_weights(labels, labelled, weights, config).sum(),
        images=_image_weights(labelled, weights).sum(),
    )


def segmentation_loss(
    logits: Float[Array, "b h w k"],
    labels: Int[Array, "b h w"],
    weights: Float[Array, " b"],
    counts: SegmentationCounts,
    config: SegmentationLossConfig = CROSS_ENTROPY,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """This device's share of the loss, and of its terms by name, before their factors.

    ``weights`` are 0 for images that only pad the batch, ``counts`` the global sums of ``segmentation_counts`` with the
    same configuration. Terms of factor 0 are not computed. Raises ValueError where the class weights are not one for
    each class.
    """
    if config.class_weights and len(config.class_weights) != logits.shape[-1]:
        raise ValueError(
            f"class_weights has {len(config.class_weights)} entries, but the logits have {logits.shape[-1]} classes."
        )
    labelled = _labelled(labels, weights)
    each, per_image = _pixel_weights(labels, labelled, weights, config), _image_weights(labelled, weights)
    logits = jnp.where(labelled[..., None], logits.astype(jnp.float32), 0.0)
    usable = jnp.where(labelled, labels, IGNORE_LABEL)
    terms = {}
    if config.cross_entropy:
        terms["cross_entropy"] = _over_pixels(softmax_cross_entropy(*_flat(logits, usable)), each, counts)
    if config.focal:
        values = softmax_focal(*_flat(logits, usable), gamma=config.focal_gamma)
        terms["focal"] = _over_pixels(values, each, counts)
    if config.dice:
        terms["dice"] = _over_images(dice_loss(logits, usable), per_image, counts)
    if config.lovasz:
        terms["lovasz"] = _over_images(lovasz_softmax(logits, usable), per_image, counts)
    total = jnp.stack([getattr(config, name) * value for name, value in terms.items()]).sum()
    wrong = labelled & ((labels < 0) | (labels >= logits.shape[-1]))
    return jnp.where(wrong.any(), jnp.nan, total), terms


def dice_loss(logits: Float[Array, "b h w k"], labels: Int[Array, "b h w"]) -> Float[Array, " b"]:
    """``1 - (2 sum p t + 1) / (sum p + sum t + 1)`` over the labelled pixels, the mean over the classes that are there.

    ``p`` is the softmax, ``t`` 0 or 1. An image without labelled pixels has the loss 0.
    """
    p, t = _probabilities(logits, labels), _one_hot(labels, logits.shape[-1])
    both, either = (p * t).sum(axis=(1, 2)), (p + t).sum(axis=(1, 2))
    return _over_present(1 - (2 * both + 1) / (either + 1), labels)


def lovasz_softmax(logits: Float[Array, "b h w k"], labels: Int[Array, "b h w"]) -> Float[Array, " b"]:
    """Lovasz-softmax over the labelled pixels of each image, the mean over the classes that are there.

    Berman et al. 2018, algorithm 1, with ``classes="present"`` and ``per_image=True`` of the published code. An image
    without labelled pixels has the loss 0.
    """
    b, h, w, k = logits.shape
    p, t = (x.reshape(b, h * w, k) for x in (_probabilities(logits, labels), _one_hot(labels, k)))
    labelled = (labels != IGNORE_LABEL).reshape(b, h * w, 1)
    errors = jnp.where(labelled, jnp.abs(t - p), -1.0)  # void pixels come last, where they change nothing before them
    order = jnp.argsort(-jax.lax.stop_gradient(errors), axis=1)
    ranked = jnp.take_along_axis(jnp.maximum(errors, 0.0), order, axis=1)
    steps = _jaccard_steps(jnp.take_along_axis(t, order, axis=1))
    return _over_present((ranked * steps).sum(axis=1), labels)


def rebalanced_weights(
    pixels: Int[np.ndarray, " k"] | Float[np.ndarray, " k"], factor: float | int = 1.0
) -> tuple[float, ...]:
    """Class weights from how many pixels each class has (``data.segmentation.pixel_counts``).

    Weights in inverse proportion to the counts, mixed with equal ones, ``factor`` being the share of the former; their
    sum is the number of classes. Classes without pixels get the weight of the rarest one. Raises ValueError for a
    factor outside 0..1 and where no class has pixels.
    """
    counts = np.asarray(pixels, np.float64)
    if not 0 <= factor <= 1:
        raise ValueError(f"factor is {factor}; expected 0 (equal weights) to 1 (in inverse proportion).")
    if counts.ndim != 1 or not (counts > 0).any():
        raise ValueError(f"pixels are {pixels!r}; expected a count for each class, one of them above 0.")
    inverse = 1 / np.where(counts > 0, counts, counts[counts > 0].min())
    mixed = (1 - factor) / len(counts) + factor * inverse / inverse.sum()
    return tuple((mixed * len(counts)).tolist())


def _labelled(labels: Int[Array, "b h w"], weights: Float[Array, " b"]) -> Bool[Array, "b h w"]:
    return (labels != IGNORE_LABEL) & (weights != 0)[:, None, None]


def _pixel_weights(
    labels: Int[Array, "b h w"],
    labelled: Bool[Array, "b h w"],
    weights: Float[Array, " b"],
    config: SegmentationLossConfig,
) -> Float[Array, "b h w"]:
    each = jnp.where(labelled, weights.astype(jnp.float32)[:, None, None], 0.0)
    if not config.class_weights:
        return each
    table = jnp.array(config.class_weights, jnp.float32)
    return each * table[jnp.clip(jnp.where(labelled, labels, 0), 0, len(config.class_weights) - 1)]


def _image_weights(labelled: Bool[Array, "b h w"], weights: Float[Array, " b"]) -> Float[Array, " b"]:
    return jnp.where(labelled.any(axis=(1, 2)), weights.astype(jnp.float32), 0.0)


def _flat(logits: Float[Array, "b h w k"], labels: Int[Array, "b h w"]) -> tuple[Float[Array, "n k"], Int[Array, " n"]]:
    """Pixels as rows; void ones have class 0, and no weight."""
    rows = jnp.where(labels == IGNORE_LABEL, 0, labels)
    return logits.reshape(-1, logits.shape[-1]), rows.reshape(-1)


def _over_pixels(
    values: Float[Array, " n"], each: Float[Array, "b h w"], counts: SegmentationCounts
) -> Float[Array, ""]:
    return (values * each.reshape(-1)).sum() / jnp.where(counts.pixels == 0, 1.0, counts.pixels)


def _over_images(
    values: Float[Array, " b"], per_image: Float[Array, " b"], counts: SegmentationCounts
) -> Float[Array, ""]:
    return (values * per_image).sum() / jnp.where(counts.images == 0, 1.0, counts.images)


def _probabilities(logits: Float[Array, "b h w k"], labels: Int[Array, "b h w"]) -> Float[Array, "b h w k"]:
    """Softmax where there is a label, else 0."""
    labelled = (labels != IGNORE_LABEL)[..., None]
    return jnp.where(labelled, jax.nn.softmax(jnp.where(labelled, logits.astype(jnp.float32), 0.0), axis=-1), 0.0)


def _one_hot(labels: Int[Array, "b h w"], num_classes: int) -> Float[Array, "b h w k"]:
    return (labels[..., None] == jnp.arange(num_classes)).astype(jnp.float32)


def _over_present(values: Float[Array, "b k"], labels: Int[Array, "b h w"]) -> Float[Array, " b"]:
    present = _one_hot(labels, values.shape[1]).max(axis=(1, 2))
    return (values * present).sum(axis=1) / jnp.maximum(present.sum(axis=1), 1.0)


def _jaccard_steps(ranked: Float[Array, "b n k"]) -> Float[Array, "b n k"]:
    """By how much the Jaccard loss rises with each further pixel taken for wrong; ``ranked`` is 1 in the class."""
    total = ranked.sum(axis=1, keepdims=True)
    both = total - jnp.cumsum(ranked, axis=1)
    either = total + jnp.cumsum(1 - ranked, axis=1)
    jaccard = 1 - both / jnp.maximum(either, 1.0)
    return jnp.diff(jaccard, axis=1, prepend=0.0)
