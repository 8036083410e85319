"""The set-prediction loss against that of transformers: every term and every gradient.

The reference gets plain dictionaries of tensors, so its models and their traps (see eqvision/losses/set_prediction.py)
stay out of it: the auxiliary outputs are given, and the term of the proposals is its criterion with all classes 0.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvision.losses import (
    DEFORMABLE_DETR_LOSS,
    DETR_LOSS,
    box_cost,
    detr_loss,
    focal_cost,
    softmax_cost,
    target_counts,
)
from eqvision.types import DetectionTargets, SetPredictions, SetProposals

pytestmark = pytest.mark.parity

CLASSES, ROWS, QUERIES, LAYERS, PLACES = 5, 4, 7, 3, 40
KINDS = {"softmax": DETR_LOSS, "sigmoid": DEFORMABLE_DETR_LOSS}
COUNTS = {"usual": (2, 4, 1), "one_empty_image": (3, 0, 1), "one_object": (0, 0, 1), "no_object": (0, 0, 0)}
HF_NAMES = {"class": "loss_ce", "l1": "loss_bbox", "giou": "loss_giou", "mask": "loss_mask", "dice": "loss_dice"}
MASK_SIZE = (25, 31)
every_kind = pytest.mark.parametrize("kind", KINDS)


def draw(kind, counts, seed=0):
    """Predictions of numpy, and the objects of each image: classes, boxes cxcywh in [0, 1] and masks."""
    rng = np.random.default_rng(seed)
    batch, k = len(counts), CLASSES + (kind == "softmax")
    outputs = {
        "logits": rng.normal(size=(LAYERS, batch, QUERIES, k)),
        "boxes": 1 / (1 + np.exp(-rng.normal(size=(LAYERS, batch, QUERIES, 4)))),
        "masks": rng.normal(size=(batch, QUERIES, 9, 8)),
        "proposal_logits": rng.normal(size=(batch, PLACES, k)),
        "proposal_boxes": 1 / (1 + np.exp(-rng.normal(size=(batch, PLACES, 4)))),
    }
    objects = [draw_objects(rng, count) for count in counts]
    return {name: value.astype(np.float32) for name, value in outputs.items()}, objects


def draw_objects(rng, count):
    boxes = np.concatenate([rng.uniform(0.3, 0.7, (count, 2)), rng.uniform(0.1, 0.5, (count, 2))], axis=1)
    masks = rng.integers(0, 2, (count, *MASK_SIZE)).astype(np.uint8)
    return rng.integers(0, CLASSES, count), boxes.astype(np.float32), masks


def targets_of(objects):
    """Padded targets with the objects in the last rows, in pixels of images of 2^k so that no rounding enters."""
    size = np.array([[256, 512], [512, 256], [256, 256]], np.int32)[: len(objects)]
    boxes, labels = np.full((len(objects), ROWS, 4), np.nan, np.float32), np.full((len(objects), ROWS), -5, np.int32)
    masks, valid = np.full((len(objects), ROWS, *MASK_SIZE), 7, np.uint8), np.zeros((len(objects), ROWS), bool)
    for i, (classes, box, mask) in enumerate(objects):
        rows = slice(ROWS - len(classes), ROWS)
        corners = np.concatenate([box[:, :2] - box[:, 2:] / 2, box[:, :2] + box[:, 2:] / 2], axis=1)
        boxes[i, rows], labels[i, rows] = corners * np.tile(size[i, ::-1], 2), classes
        masks[i, rows], valid[i, rows] = mask, True
    return DetectionTargets(*map(jnp.asarray, (boxes, labels, valid, masks))), jnp.asarray(size)


def ours(kind, outputs, objects, *, masks, proposals):
    targets, size = targets_of(objects)
    counts = target_counts(targets, jnp.ones(len(objects)))
    (value, terms), gradients = compiled(kind, masks, proposals)(outputs, targets, size, counts)
    return value, terms, gradients


@functools.cache
def compiled(kind, masks, proposals):
    def loss(outputs, targets, size, counts):
        places = jnp.ones((len(size), PLACES), bool)
        places = SetProposals(outputs["proposal_logits"], outputs["proposal_boxes"], places) if proposals else None
        predictions = SetPredictions(outputs["logits"], outputs["boxes"], places, outputs["masks"] if masks else None)
        return detr_loss(predictions, targets, size, jnp.ones(len(size)), counts, KINDS[kind])

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def theirs(kind, outputs, objects, *, masks, proposals):
    import torch

    given = {name: torch.tensor(value, requires_grad=True) for name, value in outputs.items()}
    labels = [dict(zip(("class_labels", "boxes", "masks"), map(torch.tensor, each), strict=True)) for each in objects]
    layers = [{"logits": given["logits"][i], "pred_boxes": given["boxes"][i]} for i in range(LAYERS)]
    whole = layers[-1] | {"auxiliary_outputs": layers[:-1]} | ({"pred_masks": given["masks"]} if masks else {})
    terms = criterion(kind, masks)(whole, labels)
    if proposals:
        binary = [each | {"class_labels": torch.zeros_like(each["class_labels"])} for each in labels]
        places = {"logits": given["proposal_logits"], "pred_boxes": given["proposal_boxes"]}
        terms |= {f"{name}_encoder": value for name, value in criterion(kind, False)(places, binary).items()}
    config = KINDS[kind]
    factors = {"ce": config.class_weight, "bbox": 5, "giou": 2, "mask": 1, "dice": 1}
    total = sum(factors[name.split("_")[1]] * value for name, value in terms.items() if name.startswith("loss"))
    total.backward()
    gradients = {name: np.zeros(x.shape) if x.grad is None else x.grad.numpy() for name, x in given.items()}
    return total.detach().numpy(), {name: value.detach().numpy() for name, value in terms.items()}, gradients


def criterion(kind, masks):
    from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss
    from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss

    losses = ["labels", "boxes", "cardinality"] + ["masks"] * masks
    if kind == "softmax":
        return ImageLoss(HungarianMatcher(1, 5, 2), CLASSES, eos_coef=0.1, losses=losses)
    return DeformableDetrImageLoss(DeformableDetrHungarianMatcher(2, 5, 2), CLASSES, focal_alpha=0.25, losses=losses)


def their_name(name):
    term, *layer = name.split("_")
    return name if term == "cardinality" else "_".join([HF_NAMES[term], *layer])


@every_kind
@pytest.mark.parametrize("images", COUNTS)
def test_terms_and_gradients_equal_transformers(kind, images, assert_close):
    outputs, objects = draw(kind, COUNTS[images])
    options = {"masks": images != "no_object", "proposals": kind == "sigmoid"}  # it cannot enlarge no masks at all
    value, terms, gradients = ours(kind, outputs, objects, **options)
    total, expected, slopes = theirs(kind, outputs, objects, **options)
    assert_close(value, total, 1e-5)
    assert {their_name(name) for name in terms} == set(expected) - {"cardinality_error_encoder"}
    for name, term in terms.items():
        assert_close({name: term}, {name: expected[their_name(name)]}, 1e-5)
    assert_close(gradients, slopes, 1e-5)


@every_kind
def test_costs_equal_transformers(kind, assert_close, monkeypatch):
    """The matrix that the reference hands to scipy, entry by entry."""
    import torch
    from transformers.loss import loss_deformable_detr, loss_for_object_detection

    outputs, objects = draw(kind, (ROWS,))
    matrices = []
    for module in (loss_deformable_detr, loss_for_object_detection):
        solve = module.linear_sum_assignment
        monkeypatch.setattr(module, "linear_sum_assignment", lambda x, solve=solve: matrices.append(x) or solve(x))
    given = {"logits": torch.tensor(outputs["logits"][0]), "pred_boxes": torch.tensor(outputs["boxes"][0])}
    classes, boxes, _ = objects[0]
    criterion(kind, False).matcher(given, [{"class_labels": torch.tensor(classes), "boxes": torch.tensor(boxes)}])
    logits, labels = jnp.asarray(outputs["logits"][0]), jnp.asarray(classes, jnp.int32)[None]
    class_cost = softmax_cost(logits, labels) if kind == "softmax" else 2 * focal_cost(logits, labels)
    cost = class_cost + box_cost(jnp.asarray(outputs["boxes"][0]), jnp.asarray(boxes)[None])
    assert_close(cost[0], matrices[0].numpy(), 1e-6)


def test_another_weight_of_no_object(assert_close):
    import torch
    from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss

    outputs, objects = draw("softmax", COUNTS["usual"])
    targets, size = targets_of(objects)
    predictions = SetPredictions(jnp.asarray(outputs["logits"][-1:]), jnp.asarray(outputs["boxes"][-1:]))
    config = dataclasses.replace(DETR_LOSS, no_object_weight=0.7)
    weights = jnp.ones(3)
    _, terms = jax.jit(lambda p: detr_loss(p, targets, size, weights, target_counts(targets, weights), config))(
        predictions
    )
    labels = [dict(zip(("class_labels", "boxes"), map(torch.tensor, each[:2]), strict=True)) for each in objects]
    whole = {"logits": torch.tensor(outputs["logits"][-1]), "pred_boxes": torch.tensor(outputs["boxes"][-1])}
    expected = ImageLoss(HungarianMatcher(1, 5, 2), CLASSES, 0.7, ["labels"])(whole, labels)
    assert_close(terms["class"], expected["loss_ce"].numpy(), 1e-5)
