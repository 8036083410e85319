"""Evaluation of a detector on a split: COCO's figures, the loss, and samples for pictures."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from eqvision.data import device_feed
from eqvision.data.detection import Annotations
from eqvision.evaluate import StoppedEvaluation, local_rows
from eqvision.mesh import BATCH
from eqvision.metrics import CocoMetric, Mean, merge
from eqvision.ops import PasteRule, pasted_run_lengths
from eqvision.sharding import parameter_specs, sharded_call
from eqvision.types import DetectionBatch, Detections

NUM_SAMPLES = 8


class DetectionSample(NamedTuple):
    """A test image with what is in it and what was found, for a picture."""

    index: int
    found: Detections


class DetectionEvaluation(NamedTuple):
    """The figures by name, all that was found, and samples."""

    metrics: dict[str, float]
    coco: CocoMetric
    samples: tuple[DetectionSample, ...]


@runtime_checkable
class Evaluated(Protocol):
    """What the evaluator needs of a problem."""

    @property
    def test_source(self) -> Any: ...

    @property
    def paste(self) -> PasteRule | None:
        """How masks in boxes are put into images; None where there are none."""
        ...

    def evaluation_stream(self) -> Any: ...

    def evaluate_batch(
        self, model: Any, batch: DetectionBatch, stats: eqx.nn.State
    ) -> tuple[dict[str, Mean], Detections]: ...


class DetectionEvaluator:
    """``evaluator(model, stats)`` runs the split; compiled once for each shape of image."""

    def __init__(self, problem: Evaluated, mesh: Mesh):
        self._problem, self._mesh = problem, mesh

        @jax.jit
        def step(batch: DetectionBatch, model: Any, stats: eqx.nn.State):
            specs = parameter_specs(model, mesh)
            return sharded_call(problem.evaluate_batch, mesh, specs, (P(), BATCH))(model, batch, stats)

        self._step = step

    def __call__(
        self, model: Any, stats: eqx.nn.State, *, stop: Callable[[], bool] = lambda: False
    ) -> DetectionEvaluation:
        """Raises StoppedEvaluation as soon as ``stop()`` says so."""
        source, sums = self._problem.test_source, {}
        masks = self._problem.paste is not None
        coco = CocoMetric(source.class_names, masks=masks, frequencies=lvis_frequencies(source))
        wanted = set(np.linspace(0, len(source) - 1, min(NUM_SAMPLES, len(source))).round().astype(int).tolist())
        samples = []
        with device_feed(self._problem.evaluation_stream(), NamedSharding(self._mesh, BATCH)) as feed:
            for batch in feed:
                if stop():
                    raise StoppedEvaluation
                batch_sums, found = self._step(batch, model, stats)
                sums = merge(sums, batch_sums) if sums else batch_sums
                samples += self._add(coco, batch, found, wanted)
        # of no objects at all: divided by 1, as in training
        loss = sum(float(part.total) / (float(part.weight) or 1.0) for part in sums.values())
        metrics = {"loss": loss, **coco.merge_hosts().compute()}
        return DetectionEvaluation(metrics, coco, tuple(samples))

    def _add(self, coco: CocoMetric, batch: DetectionBatch, found: Detections, wanted: set[int]):
        source, samples = self._problem.test_source, []
        indices, rows = local_rows(batch.indices), jax.tree.map(local_rows, found)
        weights, sizes = local_rows(batch.weights), local_rows(batch.original_size)
        for row, index in enumerate(indices.tolist()):
            if weights[row] == 0:  # padding, or a corrupt image
                continue
            size = (int(sizes[row][0]), int(sizes[row][1]))
            mine = jax.tree.map(lambda column, row=row: column[row], rows)
            self._score(coco, index, source.truth(index), mine, size)
            if index in wanted:
                samples.append(DetectionSample(index, mine))
        return samples

    def _score(
        self, coco: CocoMetric, index: int, truth: Annotations, found: Detections, size: tuple[int, int]
    ) -> None:
        """One image of ``size``; ``found`` are its rows."""
        source, paste = self._problem.test_source, self._problem.paste
        classes, masks = len(source.class_names), None if paste is None else source.truth_masks(index)
        negative, not_exhaustive = source.federated(index) if lvis_frequencies(source) else ((), ())
        coco.add_truth(
            index,
            truth.boxes,
            truth.labels,
            area=truth.area,
            crowd=truth.iscrowd,
            masks=masks,
            negative=negative,
            not_exhaustive=not_exhaustive,
        )
        named = found.valid & (found.labels < classes)  # the head may have classes that the data has not
        named = np.asarray(named)
        boxes, scores, labels = (np.asarray(each)[named] for each in (found.boxes, found.scores, found.labels))
        coco.add_detections(index, boxes, scores, labels, masks=_pasted(found, named, size, paste))


def lvis_frequencies(source: Any) -> tuple[str, ...] | None:
    """Whether each class is rare, common or frequent, where the file says so (LVIS): the figures then follow the rules
    of LVIS. None elsewhere, and where the classes are not those of the file."""
    frequencies = getattr(getattr(source, "index", None), "frequencies", None)
    same = frequencies is not None and len(frequencies) == len(source.class_names)
    return frequencies if same else None


def _pasted(
    found: Detections, named: np.ndarray, size: tuple[int, int], paste: PasteRule | None
) -> Iterator[dict[str, Any]] | None:
    if paste is None or found.masks is None:
        return None
    return pasted_run_lengths(np.asarray(found.masks)[named], np.asarray(found.boxes)[named], size, rule=paste)
