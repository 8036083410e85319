"""Segment Anything in use: an image is set once, then points, boxes and masks ask for masks in it."""

from collections.abc import Iterator
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Num, Shaped

from eqvision.layers import mask_prompts
from eqvision.layers.prompts import MASK_STRIDE
from eqvision.segmenters.sam.images import Geometry, geometry, prepare_image, resize_masks, to_input
from eqvision.segmenters.sam.model import SAM
from eqvision.types import Images, MaskPredictions, MaskPrompts

Points = Num[np.ndarray, "p n 2"]
PointLabels = Int[np.ndarray, "p n"]
Boxes = Num[np.ndarray, "p 4"]
MaskLogits = Float[np.ndarray, "p h w"]


class PredictedMasks(NamedTuple):
    """``m`` masks of each prompt at the size of the image, and the IoU with the object that the model expects of each.

    ``logits`` are the small maps that they were enlarged from; one of a prompt's can be given back as its mask.
    """

    masks: Bool[np.ndarray, "p m h w"]
    iou: Float32[np.ndarray, "p m"]
    logits: Float32[np.ndarray, "p m h4 w4"]


class NoImageError(RuntimeError):
    """``predict`` before ``set_image``."""


class Predictor:
    """SAM with an image: the image is encoded by ``set_image``, and ``predict`` only decodes.

    Prompts go through the decoder ``prompts_per_batch`` at a time, each with room for ``max_points`` points; both are
    filled up, so that one program serves prompts of every kind and number. Memory grows with ``prompts_per_batch``
    (about 20 MB each for published sizes), and time with it where fewer prompts come.
    """

    def __init__(self, model: SAM, state: eqx.nn.State, *, prompts_per_batch: int = 8, max_points: int = 8):
        for name, value in (("prompts_per_batch", prompts_per_batch), ("max_points", max_points)):
            if value < 1:
                raise ValueError(f"Predictor: {name} must be at least 1, got {value}")
        self.model = model
        self.prompts_per_batch = prompts_per_batch
        self.max_points = max_points
        self.side = _side(model)
        self._state = state
        self._image: tuple[Float[Array, "1 h w d"], Geometry] | None = None

    @property
    def sizes(self) -> Geometry:
        """Of the image that is set. Raises NoImageError where none is."""
        return self._found()[1]

    def set_image(self, image: Shaped[np.ndarray, "..."]) -> None:
        """Encode an RGB image, (height, width, 3) uint8. Raises ValueError for another."""
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(
                f"Predictor: an image must be RGB (height, width, 3) of uint8, got {image.shape} {image.dtype}"
            )
        prepared = jnp.asarray(prepare_image(image, self.side))[None]
        features = _encode(self.model, self._state, prepared)
        self._image = features, geometry((image.shape[0], image.shape[1]), self.side)

    def predict(
        self,
        points: Points | None = None,
        labels: PointLabels | None = None,
        boxes: Boxes | None = None,
        masks: MaskLogits | None = None,
        *,
        multimask: bool = True,
        threshold: float = 0.0,
    ) -> PredictedMasks:
        """Masks of ``p`` prompts, each of points (x, y), a box (xyxy) and logits of an earlier mask, or some of them.

        Points and boxes are in pixels of the image; labels are 1 inside the object, 0 outside, -1 for a row without a
        point. With ``multimask`` three masks a prompt, for a click may mean several things, otherwise one. Raises
        ValueError for prompts that do not fit each other or the image, NoImageError.
        """
        parts = list(self.logits(points, labels, boxes, masks))
        chosen = slice(1, None) if multimask else slice(0, 1)
        logits = np.concatenate([part.logits[:, chosen] for part in parts])
        iou = np.concatenate([part.iou[:, chosen] for part in parts])
        return PredictedMasks(resize_masks(logits, self.sizes, threshold=threshold), iou, logits)

    def logits(
        self,
        points: Points | None = None,
        labels: PointLabels | None = None,
        boxes: Boxes | None = None,
        masks: MaskLogits | None = None,
    ) -> Iterator["SmallMasks"]:
        """``predict`` batch after batch, before masks are chosen and enlarged."""
        features, sizes = self._found()
        count = _check(points, labels, boxes, masks, sizes, self)
        moved = None if points is None else to_input(points.astype(np.float64), sizes)
        corners = None if boxes is None else to_input(boxes.astype(np.float64).reshape(-1, 2, 2), sizes).reshape(-1, 4)
        for first in range(0, count, self.prompts_per_batch):
            rows = slice(first, first + self.prompts_per_batch)
            part = [None if x is None else x[rows] for x in (moved, labels, corners, masks)]
            used = min(count - first, self.prompts_per_batch)
            found = _decode(self.model, features, self._batch(part, used))
            yield SmallMasks(np.asarray(found.logits)[0, :used], np.asarray(found.iou)[0, :used])

    def _batch(self, part: list[np.ndarray | None], used: int) -> MaskPrompts:
        """One batch of the full size; rows that only fill it up repeat the last prompt."""
        rows = np.minimum(np.arange(self.prompts_per_batch), used - 1)
        points, labels, boxes, masks = (None if x is None else x[rows][None] for x in part)
        cells = MASK_STRIDE * self.side // self.model.backbone.strides[-1]
        count, has_mask = (1, self.prompts_per_batch), masks is not None
        prompts = mask_prompts(points, labels, boxes, count=count, slots=self.max_points + 2)
        logits = np.zeros((*count, cells, cells), np.float32) if masks is None else masks.astype(np.float32)
        return prompts._replace(masks=jnp.asarray(logits), has_mask=jnp.full(count, has_mask))

    def _found(self) -> tuple[Float[Array, "1 h w d"], Geometry]:
        if self._image is None:
            raise NoImageError("Predictor: there is no image yet; call set_image first")
        return self._image


class SmallMasks(NamedTuple):
    """All masks of a batch of prompts, the one for clear prompts first, as the model gives them."""

    logits: Float32[np.ndarray, "p m h w"]
    iou: Float32[np.ndarray, "p m"]


@jax.jit
def _encode(model: SAM, state: eqx.nn.State, images: Images) -> Float[Array, "b gh gw d"]:
    return model.encode(images, state)[0]


@jax.jit
def _decode(model: SAM, features: Float[Array, "b gh gw d"], prompts: MaskPrompts) -> MaskPredictions:
    return model.decode(features, prompts)


def _side(model: SAM) -> int:
    position = model.backbone.position
    if position is None or position.shape[0] != position.shape[1]:
        grid = "no positions" if position is None else f"positions of {position.shape[0]}x{position.shape[1]}"
        raise ValueError(f"Predictor: images are padded to a square, and the model has {grid}")
    return position.shape[0] * model.backbone.strides[-1]


def _check(
    points: Points | None,
    labels: PointLabels | None,
    boxes: Boxes | None,
    masks: MaskLogits | None,
    sizes: Geometry,
    predictor: Predictor,
) -> int:
    """How many prompts there are: one where nothing is given."""
    cells = MASK_STRIDE * predictor.side // predictor.model.backbone.strides[-1]
    expected = {"points": "(p, n, 2)", "labels": "(p, n)", "boxes": "(p, 4)", "masks": f"(p, {cells}, {cells})"}
    given = {"points": points, "labels": labels, "boxes": boxes, "masks": masks}
    given = {name: x for name, x in given.items() if x is not None}
    ends = {"points": (3, (2,)), "labels": (2, ()), "boxes": (2, (4,)), "masks": (3, (cells, cells))}
    for name, x in given.items():
        ndim, end = ends[name]
        if x.ndim != ndim or x.shape[ndim - len(end) :] != end:
            raise ValueError(f"Predictor: {name} must be {expected[name]} for p prompts, got {x.shape}")
    if (points is None) != (labels is None):
        raise ValueError("Predictor: points need labels, 1 inside the object and 0 outside, and labels points")
    if len({len(x) for x in given.values()}) > 1 or any(len(x) == 0 for x in given.values()):
        shapes = ", ".join(f"{name} {x.shape}" for name, x in given.items())
        raise ValueError(f"Predictor: all parts must be of the same prompts, one or more; got {shapes}")
    if points is not None and points.shape[1] > predictor.max_points:
        raise ValueError(
            f"Predictor: {points.shape[1]} points for a prompt, and max_points is {predictor.max_points}; "
            "build the Predictor with more"
        )
    _check_places(points, labels, boxes, sizes.original)
    return len(next(iter(given.values()))) if given else 1


def _check_places(
    points: Points | None, labels: PointLabels | None, boxes: Boxes | None, size: tuple[int, int]
) -> None:
    """Points and boxes are inside the image; what is outside is mostly y before x, or of another size."""
    limit = np.array(size[::-1])
    where = f"the image of {size[0]}x{size[1]} (x to {size[1]}, y to {size[0]}, in pixels of the image as it was set)"
    if points is not None and labels is not None:
        outside = ~((points >= 0) & (points <= limit)).all(axis=-1) & (labels >= 0)
        if outside.any():
            raise ValueError(f"Predictor: the point (x, y) = {points[outside][0].tolist()} is outside {where}")
    if boxes is not None:
        low, high = boxes[:, :2], boxes[:, 2:]
        wrong = ~((low >= 0) & (low < high) & (high <= limit)).all(axis=-1)
        if wrong.any():
            raise ValueError(f"Predictor: the box {boxes[wrong][0].tolist()} is empty, or outside {where}")
