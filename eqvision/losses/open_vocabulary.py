"""The loss of OWL-ViT: at each place a box and its likeness to each query of the image, by bipartite matching.

Minderer et al. 2022, section 3.3 and appendix; sums and weights are those of scenic/projects/owl_vit (losses.py,
matching_base_models.py). An object may answer several queries. Every image counts alike, however many objects it has:
its terms are divided by its own objects (classes: by its own answers), and the sum over images by their number, which
the caller adds up over devices. Rows of weight 0, invalid objects and queries that ask for nothing may hold anything,
NaN included, and change neither loss nor gradients. A valid object that the matcher gives no place makes the loss NaN.
"""

from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from eqvision.losses.boxes import box_giou, box_l1
from eqvision.losses.classification import sigmoid_focal
from eqvision.losses.matching_cost import box_cost
from eqvision.losses.reduce import mask_rows
from eqvision.ops.assignment import Matcher, hungarian
from eqvision.ops.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from eqvision.types import QueriedPredictions, QueriedTargets


@dataclass(frozen=True)
class OpenVocabularyLossConfig:
    """Weights of the loss, which are those of the costs of a match too; the defaults are OWL-ViT's.

    Raises ValueError for a negative number and for an alpha above 1.
    """

    class_weight: float = 1.0
    """Factor of the focal loss of each place and query."""
    l1_weight: float = 1.0
    """Factor of the L1 distance of boxes in [0, 1]: of corners in the loss, of centre and size in the cost."""
    giou_weight: float = 1.0
    """Factor of 1 - GIoU."""
    focal_alpha: float = 0.3
    """Weight of positives in the focal loss, in [0, 1]; negatives have the rest."""
    focal_gamma: float = 2.0
    """Exponent that spares what is right already."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) >= 0:
                raise ValueError(f"{field.name} is {getattr(self, field.name)}; expected 0 or more.")
        if self.focal_alpha > 1:
            raise ValueError(f"focal_alpha is {self.focal_alpha}; expected a value in [0, 1], commonly 0.3.")


def open_vocabulary_loss(
    predictions: QueriedPredictions,
    targets: QueriedTargets,
    asked: Bool[Array, "b q"],
    size: Int[Array, "b 2"],
    weights: Float[Array, " b"],
    images: Float[Array, ""],
    config: OpenVocabularyLossConfig,
    *,
    matcher: Matcher = hungarian,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """This device's share of the loss, and of its terms (``class``, ``l1``, ``giou``) before their factors.

    ``size`` is height and width of what the boxes of ``predictions`` are relative to, in pixels of ``targets``: of the
    whole image of the batch. ``images`` is the sum of ``weights`` over all devices. An object that answers no query is
    not looked for. Raises ValueError where predictions and targets do not fit together.
    """
    _check(predictions, targets)
    weights = weights.astype(jnp.float32)
    answers = targets.answers & asked[:, None] & targets.valid[..., None] & (weights != 0)[:, None, None]
    valid = answers.any(axis=-1)
    logits, boxes = (mask_rows(x.astype(jnp.float32), weights) for x in predictions[:2])
    wanted = mask_rows(xyxy_to_cxcywh(_relative(targets.boxes, size, valid)), valid.astype(jnp.float32))
    match = _match(logits, boxes, answers, wanted, valid, config, matcher)
    terms = {"class": _class_loss(logits, answers, match, config), **_box_losses(boxes, wanted, match, valid)}
    lost = (valid & (match < 0)).any(axis=1)
    share = weights / jnp.maximum(images, 1.0)
    means = {name: jnp.sum(jnp.where(lost, jnp.nan, values) * share) for name, values in terms.items()}
    factors = (config.class_weight, config.l1_weight, config.giou_weight)
    return sum((f * mean for f, mean in zip(factors, means.values(), strict=True)), start=jnp.zeros(())), means


def _relative(boxes: Float[Array, "b g 4"], size: Int[Array, "b 2"], valid: Bool[Array, "b g"]):
    """In [0, 1]; zeros where there is no object."""
    extent = jnp.tile(jnp.maximum(size, 1)[:, ::-1], 2).astype(jnp.float32)
    return jnp.where(valid[..., None], boxes.astype(jnp.float32), 0.0) / extent[:, None]


def _match(
    logits: Float[Array, "b n q"],
    boxes: Float[Array, "b n 4"],
    answers: Bool[Array, "b g q"],
    wanted: Float[Array, "b g 4"],
    valid: Bool[Array, "b g"],
    config: OpenVocabularyLossConfig,
    matcher: Matcher,
) -> Int[Array, "b g"]:
    """The place of each object, -1 where there is none."""
    logits, boxes = lax.stop_gradient((logits, boxes))
    cost = config.class_weight * answer_cost(logits, answers, alpha=config.focal_alpha, gamma=config.focal_gamma)
    cost += box_cost(boxes, wanted, l1_weight=config.l1_weight, giou_weight=config.giou_weight)
    return jnp.where(valid, matcher(cost, valid), -1)


def answer_cost(
    logits: Float[Array, "b n q"], answers: Bool[Array, "b g q"], *, alpha: float, gamma: float
) -> Float[Array, "b n g"]:
    """The focal loss of the object's queries as positives, less that as negatives, summed over them."""
    p, log_p, log_not_p = jax.nn.sigmoid(logits), jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    cost = (1 - alpha) * p**gamma * log_not_p - alpha * (1 - p) ** gamma * log_p
    # A query that asks for nothing has a cost of millions, and an answer of 0.
    cost = jnp.where(answers.any(axis=1)[:, None], cost, 0.0)
    return jnp.einsum("bnq,bgq->bng", cost, answers.astype(cost.dtype), precision=lax.Precision.HIGHEST)


def _class_loss(
    logits: Float[Array, "b n q"],
    answers: Bool[Array, "b g q"],
    match: Int[Array, "b g"],
    config: OpenVocabularyLossConfig,
) -> Float[Array, " b"]:
    """Of all places and queries, over the answers that are wanted."""
    b, n, q = logits.shape
    places = jnp.where(match < 0, n, match)  # past the end is dropped, a negative number would count from there

    def scatter(places: Int[Array, " g"], rows: Float[Array, "g q"]) -> Float[Array, "n q"]:
        return jnp.zeros((n, q)).at[places].set(rows, mode="drop")

    labels = jax.vmap(scatter)(places, answers.astype(jnp.float32))
    values = sigmoid_focal(
        logits.reshape(b * n, q), labels.reshape(b * n, q), alpha=config.focal_alpha, gamma=config.focal_gamma
    )
    return values.reshape(b, n).sum(axis=1) / jnp.maximum(answers.sum(axis=(1, 2)), 1)


def _box_losses(
    boxes: Float[Array, "b n 4"], wanted: Float[Array, "b g 4"], match: Int[Array, "b g"], valid: Bool[Array, "b g"]
) -> dict[str, Float[Array, " b"]]:
    used = valid & (match >= 0)
    found = jnp.take_along_axis(boxes, jnp.maximum(match, 0)[..., None], axis=1)
    found = cxcywh_to_xyxy(mask_rows(found, used.astype(jnp.float32)))
    corners, count = cxcywh_to_xyxy(wanted), jnp.maximum(valid.sum(axis=1), 1)
    losses = {"l1": box_l1(found, corners), "giou": box_giou(found, corners)}
    return {name: jnp.where(used, values, 0.0).sum(axis=1) / count for name, values in losses.items()}


def _check(predictions: QueriedPredictions, targets: QueriedTargets) -> None:
    found, wanted = predictions.logits.shape, targets.answers.shape
    if (found[0], found[2]) != (wanted[0], wanted[2]):
        raise ValueError(
            f"predictions are of {found[0]} images and {found[2]} queries, and targets of {wanted[0]} and {wanted[2]}; "
            "expected the same."
        )
