"""From classes to questions: what is looked for in each image by name, of what is there and of what is not.

As OWL-ViT is trained (Minderer et al. 2022, appendix A1.4; facts from scenic/projects/owl_vit/preprocessing): the names
of the classes in the image and of others that are not, each in a sentence drawn anew. Labels become columns of the
image's own questions.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from eqvision.data.detection.stream import DetectionStream
from eqvision.types import DetectionBatch, QueriedBatch, QueriedTargets, TextTokens

Known = Callable[[int], Int[np.ndarray, " _"]]


@runtime_checkable
class TextEncoder(Protocol):
    """What is needed of a tokenizer."""

    def encode_batch(self, texts: Sequence[str], length: int) -> TextTokens:
        """One row of ``length`` numbers for each text; longer ones are cut."""
        ...


def canonical(text: str) -> str:
    """Lower case, and nothing but letters, digits and single dashes and spaces: ``aerosol_can`` is "aerosol can"."""
    text = re.sub(r"[^\w-]|_", " ", text.lower())
    return re.sub(r"-+", "-", re.sub(r"\s+", " ", text)).strip()


@dataclass(frozen=True)
class Questions:
    """What is asked of each image of a batch: ``questions(batch, step)``, a pure function of (seed, step, image).

    ``names`` are those of the labels, put into one of ``templates`` (``{}``). ``num_negatives`` names that are not in
    the image are drawn by ``frequencies`` (None: evenly), after those that are known to be absent (``absent`` of an
    image's index). At most ``max_queries`` are asked; where more classes are there, some are drawn and objects of the
    others are not looked for. Classes in ``hidden`` are never asked for, and their objects not looked for. Of two
    objects whose IoU is ``merge`` or more one box is taken, which answers to both names (None: never).

    Raises ValueError for values that do not fit.
    """

    names: tuple[str, ...]
    templates: tuple[str, ...]
    tokenizer: TextEncoder
    length: int
    max_queries: int = 100
    num_negatives: int = 50
    frequencies: Float[np.ndarray, " k"] | None = None
    absent: Known | None = None
    hidden: frozenset[int] = frozenset()
    merge: float | None = 0.9
    seed: int = 0
    _rows: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self):
        if not self.names or not self.templates or any("{}" not in template for template in self.templates):
            raise ValueError(
                f"{len(self.names)} names and the templates {self.templates}; expected a name for each label, and "
                "sentences with {} where it stands"
            )
        if self.max_queries < 1 or self.num_negatives < 0:
            raise ValueError(
                f"max_queries={self.max_queries}, num_negatives={self.num_negatives}; expected 1 or more, and 0 or more"
            )
        if self.frequencies is not None and len(self.frequencies) != len(self.names):
            raise ValueError(f"{len(self.frequencies)} frequencies for {len(self.names)} names")

    def __call__(self, batch: DetectionBatch, step: int) -> QueriedBatch:
        rows = [self._row(batch, row, step) for row in range(len(batch.images))]
        queries, answers, boxes, valid = (np.stack(each) for each in zip(*rows, strict=True))
        ids, mask = np.ascontiguousarray(queries[:, 0]), queries[:, 1].astype(bool)
        targets = QueriedTargets(*cast(Any, (boxes, answers, valid)))
        tokens = TextTokens(*cast(Any, (ids, mask)))
        return QueriedBatch(batch.images, batch.size, tokens, targets, batch.weights, batch.indices)

    def _row(self, batch: Any, row: int, step: int) -> tuple[np.ndarray, ...]:
        index = int(batch.indices[row])
        rng = np.random.default_rng([self.seed, step, max(index, 0)])
        targets = batch.targets
        used = np.flatnonzero(targets.valid[row])
        boxes, names = merged(targets.boxes[row][used], targets.labels[row][used], self.merge, rng)
        asked = self._asked({label for each in names for label in each}, index, rng)
        columns = {label: column for column, label in enumerate(asked)}
        room = len(targets.valid[row])
        answers = np.zeros((room, self.max_queries), bool)
        for number, labels in enumerate(names):
            answers[number, [columns[label] for label in labels if label in columns]] = True
        placed = np.zeros((room, 4), np.float32)
        placed[: len(boxes)] = boxes
        return self._encoded(asked, rng), answers, placed, np.asarray(answers.any(axis=1))

    def _asked(self, present: set[int], index: int, rng: np.random.Generator) -> list[int]:
        """Labels that are there, as many as there is room for, and labels that are not."""
        there = sorted(present - self.hidden)
        if len(there) > self.max_queries:
            there = sorted(rng.choice(there, self.max_queries, replace=False).tolist())
        known = [] if self.absent is None or index < 0 else self.absent(index).tolist()
        drawn = rng.choice(len(self.names), 2 * self.num_negatives, p=self.frequencies).tolist()
        others = dict.fromkeys([*known, *drawn])
        missing = [label for label in others if label not in present and label not in self.hidden]
        count = min(max(self.num_negatives, len(known)), self.max_queries - len(there))
        return there + missing[:count]

    def _encoded(self, asked: list[int], rng: np.random.Generator) -> np.ndarray:
        """(2, q, n): numbers and mask of a sentence for each label; nothing where there is no label."""
        chosen = rng.integers(len(self.templates), size=len(asked))
        texts = [
            canonical(self.templates[number].format(canonical(self.names[label]) or self.names[label]))
            for number, label in zip(chosen, asked, strict=True)
        ]
        encoded = np.zeros((2, self.max_queries, self.length), np.int32)
        for place, text in enumerate(texts):
            encoded[:, place] = self._encode(text)
        return encoded

    def _encode(self, text: str) -> np.ndarray:
        """Kept: there are no more texts than names times templates."""
        if text not in self._rows:
            tokens = self.tokenizer.encode_batch([text], self.length)
            self._rows[text] = np.stack([np.asarray(tokens.ids[0]), np.asarray(tokens.mask[0])]).astype(np.int32)
        return self._rows[text]


def merged(
    boxes: Float[np.ndarray, "g 4"], labels: Int[np.ndarray, " g"], least: float | None, rng: np.random.Generator
) -> tuple[Float[np.ndarray, "m 4"], list[frozenset[int]]]:
    """Boxes and the labels of each, where no two have an IoU of ``least`` or more: the nearest pair first becomes one,
    with the box of either of them and the labels of both."""
    names = [frozenset((int(label),)) for label in labels]
    while least is not None and len(boxes) > 1:
        iou = _pairs_iou(boxes)
        first, second = sorted(np.unravel_index(int(iou.argmax()), iou.shape))
        if iou[first, second] < least:
            break
        boxes = boxes.copy()
        boxes[first] = boxes[(first, second)[int(rng.integers(2))]]
        names[first] |= names[second]
        boxes, names = np.delete(boxes, second, axis=0), [*names[:second], *names[second + 1 :]]
    return boxes, names


def _pairs_iou(boxes: Float[np.ndarray, "g 4"]) -> Float[np.ndarray, "g g"]:
    """0 of a box with itself."""
    low, high = (pick(boxes[:, None, half], boxes[None, :, half]) for pick, half in _CORNERS)
    common = np.prod(np.maximum(high - low, 0), axis=-1)
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=-1)
    iou = common / np.maximum(areas[:, None] + areas[None] - common, 1e-6)
    np.fill_diagonal(iou, 0)
    return iou


_CORNERS = ((np.maximum, slice(0, 2)), (np.minimum, slice(2, 4)))


class QueriedStream:
    """The batches of a stream from ``start_step`` on, with questions; ``num_dropped`` is that of the stream."""

    def __init__(self, stream: DetectionStream, questions: Questions, start_step: int):
        self._stream, self._questions, self._step = stream, questions, start_step

    @property
    def num_dropped(self) -> int:
        return self._stream.num_dropped

    def __iter__(self) -> "QueriedStream":
        return self

    def __next__(self) -> QueriedBatch:
        batch, step = next(self._stream), self._step
        self._step += 1
        return self._questions(batch, step)

    def close(self) -> None:
        """End the threads. Closing twice is fine."""
        self._stream.close()


def federated_absent(source: Any) -> Known | None:
    """The labels that are known not to be in an image, where the data says so (LVIS); None where it does not."""
    if getattr(getattr(source, "index", None), "negative", None) is None:
        return None
    return lambda index: source.federated(index)[0]
