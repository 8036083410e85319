"""The set-prediction loss of DETR and Deformable DETR: one query for each object, by bipartite matching.

DETR: Carion et al. 2020; Deformable DETR: Zhu et al. 2021; the sums and weights are those of their published code.

Normalisers are global. ``target_counts`` gives the sums of one device, the caller adds them up over devices (and over
the parts of an accumulated batch) and hands the result to ``detr_loss``, whose value is then this device's share: the
sum of the shares is the loss of the whole batch, so one device and eight train alike. That differs on purpose from
the published code, whose cross entropy divides by the weights on each card. On one card the values are equal.

Rows of weight 0 and invalid targets may hold anything, NaN included, and change neither loss nor gradients. Without a
single object the loss is finite: all queries learn to be empty. What must not pass in silence makes the loss NaN: a
valid object that the matcher gives no query, or whose label is no class.

Who compares with transformers (5.23) should know: its ``auxiliary_loss=True`` changes the forward pass of DETR (the
decoder's norm is applied inside the loop), so the auxiliary outputs have to be built from a model without it; its
criterion of two-stage models has no term for the proposals (the published one has, here ``*_encoder``); and its
Deformable configuration has 1 for the class's cost and weight, where the published training has 2.
"""

from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from eqvision.losses.boxes import box_giou, box_l1
from eqvision.losses.classification import sigmoid_focal
from eqvision.losses.masks import matched_mask_losses
from eqvision.losses.matching_cost import box_cost, focal_cost, query_labels, softmax_cost
from eqvision.losses.reduce import mask_rows
from eqvision.names import nearest
from eqvision.ops.assignment import Matcher, hungarian
from eqvision.ops.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from eqvision.types import DetectionTargets, SetPredictions, SetProposals

OUTSIDE = 1e4  # cost of a proposal outside the image: above every other, and small enough to add in float32


@dataclass(frozen=True)
class SetPredictionConfig:
    """Weights of the loss and of the matching; the defaults are DETR's.

    Raises ValueError for a negative number, for costs that are all 0, and for an unknown classification.
    """

    classification: Literal["softmax", "sigmoid"] = "softmax"
    """softmax: cross entropy over the classes and, last, no object (DETR). sigmoid: focal loss (Deformable DETR)."""
    class_weight: float = 1.0
    """Factor of the classification loss."""
    l1_weight: float = 5.0
    """Factor of the L1 distance of boxes cxcywh in [0, 1]."""
    giou_weight: float = 2.0
    """Factor of 1 - GIoU."""
    mask_weight: float = 1.0
    """Factor of the focal loss of masks, where the model predicts masks."""
    dice_weight: float = 1.0
    """Factor of the dice loss of masks, where the model predicts masks."""
    class_cost: float = 1.0
    """Factor of the class in the cost of a match."""
    l1_cost: float = 5.0
    """Factor of the L1 distance in the cost of a match."""
    giou_cost: float = 2.0
    """Factor of -GIoU in the cost of a match."""
    no_object_weight: float = 0.1
    """Weight of queries without an object in the cross entropy (softmax only)."""
    focal_alpha: float = 0.25
    """Weight of positives in the focal loss and its cost, in [0, 1]; negatives have the rest (sigmoid only)."""
    focal_gamma: float = 2.0
    """Exponent that spares the queries that are right already (sigmoid only)."""
    auxiliary: bool = True
    """Apply the loss after every decoder layer, each with its own matching, and not only after the last."""

    def __post_init__(self) -> None:
        if self.classification not in CLASSIFICATIONS:
            raise nearest(self.classification, list(CLASSIFICATIONS), "classification")
        numbers = {field.name: getattr(self, field.name) for field in fields(self) if field.type is float}
        for name, value in numbers.items():
            if not value >= 0:
                raise ValueError(f"{name} is {value}; expected 0 or more.")
        if self.focal_alpha > 1:
            raise ValueError(f"focal_alpha is {self.focal_alpha}; expected a value in [0, 1], commonly 0.25.")
        if self.class_cost == self.l1_cost == self.giou_cost == 0:
            raise ValueError("class_cost, l1_cost and giou_cost are all 0; every match would cost the same. Set one.")


CLASSIFICATIONS = ("softmax", "sigmoid")
DETR_LOSS = SetPredictionConfig()
DEFORMABLE_DETR_LOSS = SetPredictionConfig(classification="sigmoid", class_weight=2.0, class_cost=2.0)


class Counts(NamedTuple):
    """What the loss is divided by: images and objects, those of weight 0 and the invalid ones left out."""

    images: Float[Array, ""]
    objects: Float[Array, ""]


def target_counts(targets: DetectionTargets, weights: Float[Array, " b"]) -> Counts:
    """Counts of the rows given. Sum them over devices, as by ``jax.tree.map(global_sum, counts)``."""
    weights = weights.astype(jnp.float32)
    return Counts(weights.sum(), jnp.where(targets.valid, weights[:, None], 0.0).sum())


def detr_loss(
    predictions: SetPredictions,
    targets: DetectionTargets,
    size: Int[Array, "b 2"],
    weights: Float[Array, " b"],
    counts: Counts,
    config: SetPredictionConfig = DETR_LOSS,
    *,
    matcher: Matcher = hungarian,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """This device's share of the loss, and of its terms by name, before their factors.

    ``size`` is height and width of the images without padding, ``weights`` 0 for images that only pad the batch,
    ``counts`` the global sums of ``target_counts``. The terms are ``class``, ``l1``, ``giou`` and, only to be logged,
    ``cardinality_error`` (by how many objects the number of queries that see one is wrong, on average), for the last
    layer; with ``_0``, ``_1``, ... for the layers before, and with ``_encoder`` for the proposals of a two-stage model,
    where every object has class 0. ``mask`` and ``dice`` are there if the model predicts masks. Raises ValueError
    where predictions and targets do not fit together.
    """
    _check(predictions, targets, config)
    objects = _objects(targets, size, weights)
    layers = slice(None) if config.auxiliary else slice(-1, None)
    each = jnp.broadcast_to(weights.astype(jnp.float32)[:, None], predictions.logits.shape[1:3])
    queries = _queries(predictions.logits[layers], predictions.boxes_cxcywh[layers], each)
    matches = _match(queries, objects, config, matcher)
    terms = _terms(queries, objects, matches, counts, config)
    logged = {"cardinality_error": _cardinality_error(queries, objects, weights, counts, config)}
    named = _named(terms) | _named(logged)
    if predictions.masks is not None:
        named |= _mask_terms(predictions.masks, matches[-1], targets, objects, counts)
    if predictions.proposals is not None:
        named |= _proposal_terms(predictions.proposals, objects, weights, counts, config, matcher)
    return _total(named, config), named


class _Objects(NamedTuple):
    """Targets of which every row is harmless: what is not used has weight 0, label 0 and an empty box."""

    boxes_cxcywh: Float[Array, "b g 4"]
    labels: Int[Array, "b g"]
    weights: Float[Array, "b g"]

    @property
    def valid(self) -> Bool[Array, "b g"]:
        return self.weights != 0


class _Queries(NamedTuple):
    """Predictions of which every row is harmless: what has weight 0 is 0."""

    logits: Float[Array, "l b q k"]
    boxes_cxcywh: Float[Array, "l b q 4"]
    weights: Float[Array, "b q"]


def _objects(targets: DetectionTargets, size: Int[Array, "b 2"], weights: Float[Array, " b"]) -> _Objects:
    each = jnp.where(targets.valid, weights.astype(jnp.float32)[:, None], 0.0)
    scale = jnp.where(weights[:, None] != 0, size[:, ::-1], 1).astype(jnp.float32)  # width, height
    boxes = mask_rows(targets.boxes.astype(jnp.float32), each) / jnp.tile(scale, 2)[:, None]
    return _Objects(xyxy_to_cxcywh(boxes), mask_rows(targets.labels, each), each)


def _queries(
    logits: Float[Array, "l b q k"], boxes_cxcywh: Float[Array, "l b q 4"], weights: Float[Array, "b q"]
) -> _Queries:
    used = (weights != 0)[..., None]
    logits, boxes = (jnp.where(used, x.astype(jnp.float32), 0.0) for x in (logits, boxes_cxcywh))
    return _Queries(logits, boxes, weights)


def _match(queries: _Queries, objects: _Objects, config: SetPredictionConfig, matcher: Matcher) -> Int[Array, "l b g"]:
    """Query of each object, -1 where there is none: all layers and images in one call of the matcher."""
    logits, boxes = lax.stop_gradient((queries.logits, queries.boxes_cxcywh))
    labels = jnp.clip(objects.labels, 0, logits.shape[-1] - 1)  # others make the loss NaN, but no NaN may be matched
    cost = config.class_cost * _class_cost(logits, labels, config)
    cost += box_cost(boxes, objects.boxes_cxcywh, l1_weight=config.l1_cost, giou_weight=config.giou_cost)
    cost = jnp.where((queries.weights == 0)[..., None], OUTSIDE, cost)
    valid = jnp.broadcast_to(objects.valid, (*cost.shape[:2], cost.shape[3]))
    return jnp.where(valid, matcher(lax.stop_gradient(cost), valid), -1)


def _class_cost(
    logits: Float[Array, "l b q k"], labels: Int[Array, "b g"], config: SetPredictionConfig
) -> Float[Array, "l b q g"]:
    if config.classification == "softmax":
        return softmax_cost(logits, labels)
    return focal_cost(logits, labels, alpha=config.focal_alpha, gamma=config.focal_gamma)


def _terms(
    queries: _Queries, objects: _Objects, matches: Int[Array, "l b g"], counts: Counts, config: SetPredictionConfig
) -> dict[str, Float[Array, " l"]]:
    """Class, L1 and GIoU loss of each layer."""
    classes = _class_loss(queries, objects, matches, counts, config)
    places = jnp.maximum(matches, 0)
    # an object beyond the number of proposals may have been given one outside the image, which predicts nothing
    inside = jnp.take_along_axis(queries.weights[None], places, axis=2) != 0
    used = jnp.where((matches >= 0) & inside, objects.weights, 0.0)
    boxes = mask_rows(jnp.take_along_axis(queries.boxes_cxcywh, places[..., None], axis=2), used)
    targets = jnp.broadcast_to(objects.boxes_cxcywh, boxes.shape)
    l1 = box_l1(boxes, targets)
    giou = box_giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(targets))
    return {"class": classes, "l1": _per_object(l1 * used, counts), "giou": _per_object(giou * used, counts)}


def _class_loss(
    queries: _Queries, objects: _Objects, matches: Int[Array, "l b g"], counts: Counts, config: SetPredictionConfig
) -> Float[Array, " l"]:
    *_, num_queries, k = queries.logits.shape
    num_classes = k - 1 if config.classification == "softmax" else k
    labels = query_labels(matches, objects.labels, num_queries=num_queries, unmatched=num_classes)
    loss = (_cross_entropy if config.classification == "softmax" else _focal)(queries, labels, counts, config)
    unknown = (objects.labels < 0) | (objects.labels >= num_classes)
    wrong = objects.valid & (unknown | (matches < 0))
    return jnp.where(wrong.any(axis=(1, 2)), jnp.nan, loss)


def _cross_entropy(
    queries: _Queries, labels: Int[Array, "l b q"], counts: Counts, config: SetPredictionConfig
) -> Float[Array, " l"]:
    """Mean by weight over all queries. Every object has one query, so the counts tell the sum of the weights."""
    *_, num_queries, k = queries.logits.shape
    log_p = jax.nn.log_softmax(queries.logits, axis=-1)
    chosen = jnp.take_along_axis(log_p, jnp.clip(labels, 0, k - 1)[..., None], axis=-1)[..., 0]
    weights = queries.weights * jnp.where(labels == k - 1, config.no_object_weight, 1.0)
    empty = counts.images * num_queries - counts.objects
    whole = counts.objects + config.no_object_weight * empty
    return -(chosen * weights).sum(axis=(1, 2)) / jnp.where(whole == 0, 1.0, whole)


def _focal(
    queries: _Queries, labels: Int[Array, "l b q"], counts: Counts, config: SetPredictionConfig
) -> Float[Array, " l"]:
    """Sum over queries and classes, per object."""
    k = queries.logits.shape[-1]
    rows = jax.nn.one_hot(labels, k).reshape(-1, k)  # the label of no object is k: no class at all
    values = sigmoid_focal(queries.logits.reshape(-1, k), rows, alpha=config.focal_alpha, gamma=config.focal_gamma)
    return _per_object(values.reshape(labels.shape) * queries.weights, counts)


def _cardinality_error(
    queries: _Queries,
    objects: _Objects,
    weights: Float[Array, " b"],
    counts: Counts,
    config: SetPredictionConfig,
) -> Float[Array, " l"]:
    """Absolute difference of the numbers of objects predicted and given, on average over images. Not differentiable."""
    logits = lax.stop_gradient(queries.logits)
    if config.classification == "softmax":
        found = logits.argmax(axis=-1) != logits.shape[-1] - 1
    else:
        found = logits.max(axis=-1) > 0  # a probability above one half
    error = jnp.abs(found.sum(axis=-1) - objects.valid.sum(axis=-1))
    return (error * weights).sum(axis=1) / jnp.where(counts.images == 0, 1.0, counts.images)


def _mask_terms(
    masks: Float[Array, "b q h w"],
    matches: Int[Array, "b g"],
    targets: DetectionTargets,
    objects: _Objects,
    counts: Counts,
) -> dict[str, Float[Array, ""]]:
    assert targets.masks is not None
    focal, dice = matched_mask_losses(masks, matches, targets.masks, objects.valid & (matches >= 0))
    values = {"mask": focal, "dice": dice}
    return {name: _per_object((value * objects.weights)[None], counts)[0] for name, value in values.items()}


def _proposal_terms(
    proposals: SetProposals,
    objects: _Objects,
    weights: Float[Array, " b"],
    counts: Counts,
    config: SetPredictionConfig,
    matcher: Matcher,
) -> dict[str, Float[Array, ""]]:
    """Every object has class 0, and every place of the image is a query.

    Places outside the image are none; the published code counts them as queries without an object, which makes the
    loss depend on the padding.
    """
    each = jnp.where(proposals.valid, weights.astype(jnp.float32)[:, None], 0.0)
    queries = _queries(proposals.logits[None], proposals.boxes_cxcywh[None], each)
    objects = objects._replace(labels=jnp.zeros_like(objects.labels))
    matches = _match(queries, objects, config, matcher)
    terms = _terms(queries, objects, matches, counts, config)
    return {f"{name}_encoder": value[0] for name, value in terms.items()}


def _per_object(values: Float[Array, "l b n"], counts: Counts) -> Float[Array, " l"]:
    return values.sum(axis=(1, 2)) / jnp.maximum(counts.objects, 1.0)


def _named(terms: dict[str, Float[Array, " l"]]) -> dict[str, Float[Array, ""]]:
    """The last layer by the bare name, the others with their number."""
    last = {name: values[-1] for name, values in terms.items()}
    return last | {f"{name}_{i}": value for name, values in terms.items() for i, value in enumerate(values[:-1])}


def _total(named: dict[str, Float[Array, ""]], config: SetPredictionConfig) -> Float[Array, ""]:
    factors = {
        "class": config.class_weight,
        "l1": config.l1_weight,
        "giou": config.giou_weight,
        "mask": config.mask_weight,
        "dice": config.dice_weight,
    }
    weighted = [factors[name.split("_")[0]] * value for name, value in named.items() if name.split("_")[0] in factors]
    return jnp.stack(weighted).sum()


def _check(predictions: SetPredictions, targets: DetectionTargets, config: SetPredictionConfig) -> None:
    images, rows = predictions.logits.shape[1], targets.boxes.shape[0]
    if images != rows:
        raise ValueError(f"predictions are of {images} images and targets of {rows}; expected the same batch.")
    if predictions.masks is not None and targets.masks is None:
        raise ValueError(
            "the model predicts masks, but the targets have none (targets.masks is None). Load masks with the data, "
            "or drop those of the predictions: predictions._replace(masks=None)."
        )
    if predictions.proposals is not None and config.classification == "softmax":
        raise ValueError(
            "the model is two-stage and gives proposals, whose loss is defined for classification 'sigmoid' only, but "
            "the configuration says 'softmax'. Use 'sigmoid', or predictions._replace(proposals=None)."
        )
