"""Detectors that predict a set, such as DETR: one query for each object."""

from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from eqvision.detectors import decode_sigmoid, decode_softmax
from eqvision.keys import StepKeys
from eqvision.losses import detr_loss, target_counts
from eqvision.losses.set_prediction import Counts, SetPredictionConfig
from eqvision.metrics import Mean
from eqvision.ops.collectives import global_sum
from eqvision.problems.family import Loss
from eqvision.types import DetectionBatch, Detections, PaddedImages, SetPredictions

LOGGED = ("class", "l1", "giou", "mask", "dice", "cardinality_error")  # terms of the last decoder layer


@dataclass(frozen=True)
class SetPredictionFamily:
    """A ``Family``."""

    task: SetPredictionConfig
    masks: bool = False
    paste: None = None

    def counts(self, batch: DetectionBatch) -> Counts:
        return target_counts(batch.targets, batch.weights)

    def loss(
        self,
        model: Any,
        stats: eqx.nn.State,
        inputs: PaddedImages,
        batch: DetectionBatch,
        keys: StepKeys,
        counts: Counts,
    ) -> Loss:
        predictions, new = model(inputs, stats, train=True, key=keys.own)
        loss, terms = detr_loss(predictions, batch.targets, batch.size, batch.weights, counts, self.task)
        return loss, {name: terms[name] for name in LOGGED if name in terms}, new

    def evaluate(
        self, model: Any, stats: eqx.nn.State, inputs: PaddedImages, batch: DetectionBatch, key: Key[Array, ""]
    ) -> tuple[dict[str, Mean], Detections]:
        predictions, _ = model(inputs, stats)
        mine = self.counts(batch)
        counts = jax.tree.map(global_sum, mine)
        shares = detr_loss(predictions, batch.targets, batch.size, batch.weights, counts, self.task)
        sums = _loss_sums(*shares, mine, counts, predictions.logits.shape[2], self.task)
        return sums, self._decode(predictions, batch.original_size)

    def _decode(self, predictions: SetPredictions, size: Int[Array, "b 2"]) -> Detections:
        decode = decode_softmax if self.task.classification == "softmax" else decode_sigmoid
        return decode(predictions, size)


def _loss_sums(
    loss: Float[Array, ""],
    terms: dict[str, Float[Array, ""]],
    mine: Counts,
    counts: Counts,
    num_queries: int,
    task: SetPredictionConfig,
) -> dict[str, Mean]:
    """``loss`` and ``terms`` are this device's share of a batch of ``counts``, of which it holds ``mine``."""
    classes = task.class_weight * jnp.stack([terms[name] for name in terms if name.startswith("class")]).sum()
    rest = (loss - classes) * _divisor(counts)
    if task.classification == "sigmoid":
        return {"classes": Mean(classes * _divisor(counts), mine.objects), "rest": Mean(rest, mine.objects)}

    def queries(of: Counts) -> Float[Array, ""]:
        return of.objects + task.no_object_weight * (of.images * num_queries - of.objects)

    return {"classes": Mean(classes * queries(counts), queries(mine)), "rest": Mean(rest, mine.objects)}


def _divisor(counts: Counts) -> Float[Array, ""]:
    return jnp.maximum(counts.objects, 1.0)
