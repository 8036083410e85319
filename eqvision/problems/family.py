"""What kinds of detectors differ in: what their losses are divided by, their losses, and what they find."""

from typing import Any, Protocol, runtime_checkable

import equinox as eqx
from jaxtyping import Array, Float, Key

from eqvision.keys import StepKeys
from eqvision.metrics import Mean
from eqvision.ops import PasteRule
from eqvision.problems.problem import Counts
from eqvision.types import DetectionBatch, Detections, PaddedImages

Loss = tuple[Float[Array, ""], dict[str, Float[Array, ""]], eqx.nn.State]


@runtime_checkable
class Family(Protocol):
    """Of a detector; ``inputs`` are a batch's images as the model takes them."""

    @property
    def masks(self) -> bool:
        """Whether objects have masks, in training and in what is found."""
        ...

    @property
    def paste(self) -> PasteRule | None:
        """How masks in boxes are put into images; None where there are none."""
        ...

    def counts(self, batch: DetectionBatch) -> Counts:
        """As ``Problem.counts``."""
        ...

    def loss(
        self,
        model: Any,
        stats: eqx.nn.State,
        inputs: PaddedImages,
        batch: DetectionBatch,
        keys: StepKeys,
        counts: Counts,
    ) -> Loss:
        """As ``Problem.loss``."""
        ...

    def evaluate(
        self, model: Any, stats: eqx.nn.State, inputs: PaddedImages, batch: DetectionBatch, key: Key[Array, ""]
    ) -> tuple[dict[str, Mean], Detections]:
        """Parts of the loss of the whole batch as (total, what it is divided by), so that batches add up to the loss
        of the split; and what is found in these rows, in pixels of the original images.

        ``key`` is the same for every evaluation of a run.
        """
        ...
