"""Objects that any detector of the zoo finds, whatever its predictions are."""

from typing import Any

import equinox as eqx
from jaxtyping import Array, Int

from eqvision.detectors.centernet import STRIDE, decode_centers
from eqvision.detectors.decode import decode_sigmoid, decode_softmax
from eqvision.detectors.rcnn_decode import scale_detections
from eqvision.types import CenterPredictions, Detections, PaddedImages, SetPredictions


def find_objects(
    model: Any,
    inputs: PaddedImages,
    state: eqx.nn.State,
    original_size: Int[Array, "b 2"],
    *,
    softmax: bool = False,
    count: int = 100,
) -> Detections:
    """Objects best first, in pixels of images of ``original_size`` (height, width), which ``inputs`` were made from.

    DETR and its kin: ``softmax`` tells whether classes exclude each other (DETR) or not (Deformable DETR), and
    ``count`` is how many the latter keeps; with the former every query is one. CenterNet: the ``count`` highest peaks.
    R-CNN: as many as it is built for. Boxes of R-CNNs are cut off at the image, and the others' are not. Masks stay
    as the model gives them: DETR's logits over the padded image, R-CNN's probabilities over each box.

    Raises TypeError for a model that gives something else, such as a classifier.
    """
    predictions, _ = model(inputs, state)
    return found_in(
        predictions, inputs, original_size, softmax=softmax, count=count, stride=getattr(model, "stride", STRIDE)
    )


def found_in(
    predictions: Any,
    inputs: PaddedImages,
    original_size: Int[Array, "b 2"],
    *,
    softmax: bool = False,
    count: int = 100,
    stride: int = STRIDE,
) -> Detections:
    """``find_objects`` from what the model said; ``stride`` is that of a CenterNet's maps."""
    if isinstance(predictions, Detections):
        return scale_detections(predictions, inputs.size, original_size)
    if isinstance(predictions, CenterPredictions):
        return decode_centers(predictions, inputs.size, original_size, count=count, stride=stride)
    if isinstance(predictions, SetPredictions):
        return (
            decode_softmax(predictions, original_size) if softmax else decode_sigmoid(predictions, original_size, count)
        )
    raise TypeError(
        f"find_objects: the model gives {type(predictions).__name__}; expected SetPredictions (DETR), "
        "CenterPredictions (CenterNet) or Detections (R-CNN): is it a detector?"
    )
