"""R-CNNs: proposals, and heads that read the maps under them."""

from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from eqvision.detectors import scale_detections
from eqvision.keys import StepKeys, image_keys
from eqvision.losses import RCNNCounts, RCNNLossConfig, rcnn_counts, rcnn_loss, whole_batch
from eqvision.losses.rcnn import divisors, factors
from eqvision.metrics import Mean
from eqvision.ops import PasteRule
from eqvision.ops.collectives import global_sum
from eqvision.problems.family import Loss
from eqvision.types import DetectionBatch, Detections, PaddedImages


@dataclass(frozen=True)
class RCNNFamily:
    """A ``Family``. What is drawn from an image depends on the step and the image, not on the device it is on."""

    task: RCNNLossConfig
    paste: PasteRule | None = None

    @property
    def masks(self) -> bool:
        return self.paste is not None

    def counts(self, batch: DetectionBatch) -> Float[Array, ""]:
        """Images. The other divisors count what the model's proposals give, so ``loss`` sums those itself."""
        return batch.weights.astype(jnp.float32).sum()

    def loss(
        self,
        model: Any,
        stats: eqx.nn.State,
        inputs: PaddedImages,
        batch: DetectionBatch,
        keys: StepKeys,
        counts: Float[Array, ""],
    ) -> Loss:
        drawn = image_keys(keys.common, batch.indices)
        samples, new = model.train_outputs(inputs, batch.targets, stats, keys=drawn, key=keys.own)
        mine = rcnn_counts(samples, batch.weights)
        whole = whole_batch(jax.tree.map(global_sum, mine), counts)
        return *rcnn_loss(samples, batch.weights, whole, self.task), new

    def evaluate(
        self, model: Any, stats: eqx.nn.State, inputs: PaddedImages, batch: DetectionBatch, key: Key[Array, ""]
    ) -> tuple[dict[str, Mean], Detections]:
        features, _ = model.features(inputs, stats)
        found = model.detect(features, inputs, stats)
        drawn = image_keys(key, batch.indices)
        samples, _ = model.samples(features, inputs, batch.targets, stats, keys=drawn, train=False)
        mine = rcnn_counts(samples, batch.weights)
        counts = jax.tree.map(global_sum, mine)
        _, terms = rcnn_loss(samples, batch.weights, counts, self.task)
        return self._sums(terms, mine, counts), scale_detections(found, batch.size, batch.original_size)

    def _sums(self, terms: dict[str, Float[Array, ""]], mine: RCNNCounts, counts: RCNNCounts) -> dict[str, Mean]:
        weight, own, whole = (
            factors(terms, self.task),
            divisors(terms, mine, self.task),
            divisors(terms, counts, self.task),
        )
        return {name: Mean(weight[name] * terms[name] * whole[name], own[name]) for name in terms}
