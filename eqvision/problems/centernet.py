"""CenterNets: an object is the cell of its centre."""

from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from eqvision.detectors import decode_centers
from eqvision.keys import StepKeys
from eqvision.losses import CenterCounts, CenterNetConfig, center_counts, center_loss
from eqvision.metrics import Mean
from eqvision.ops.collectives import global_sum
from eqvision.problems.family import Loss
from eqvision.types import CenterPredictions, DetectionBatch, Detections, PaddedImages


@dataclass(frozen=True)
class CenterNetFamily:
    """A ``Family``."""

    task: CenterNetConfig
    masks: bool = False
    paste: None = None

    def counts(self, batch: DetectionBatch) -> CenterCounts:
        return center_counts(batch.targets, batch.size, batch.weights, self.task)

    def loss(
        self,
        model: Any,
        stats: eqx.nn.State,
        inputs: PaddedImages,
        batch: DetectionBatch,
        keys: StepKeys,
        counts: CenterCounts,
    ) -> Loss:
        predictions, new = model(inputs, stats, train=True, key=keys.own)
        return *center_loss(predictions, batch.targets, batch.size, batch.weights, counts, self.task), new

    def evaluate(
        self, model: Any, stats: eqx.nn.State, inputs: PaddedImages, batch: DetectionBatch, key: Key[Array, ""]
    ) -> tuple[dict[str, Mean], Detections]:
        predictions, _ = model(inputs, stats)
        mine = self.counts(batch)
        counts = jax.tree.map(global_sum, mine)
        _, terms = center_loss(predictions, batch.targets, batch.size, batch.weights, counts, self.task)
        centers, objects = jnp.maximum(counts.centers, 1.0), jnp.maximum(counts.objects, 1.0)
        rest = self.task.size_weight * terms["size"] + self.task.offset_weight * terms["offset"]
        heat = self.task.heatmap_weight * terms["heatmap"]
        sums = {"heatmap": Mean(heat * centers, mine.centers), "rest": Mean(rest * objects, mine.objects)}
        return sums, self._decode(predictions, batch.size, batch.original_size)

    def _decode(self, predictions: CenterPredictions, inside: Int[Array, "b 2"], size: Int[Array, "b 2"]) -> Detections:
        return decode_centers(predictions, inside, size, stride=self.task.stride)
