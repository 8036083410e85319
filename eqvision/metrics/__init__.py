"""Metrics: every example counts exactly once for any batch size and any number of devices.

Device metrics. A function ``(outputs, labels, weights) -> sums`` gives the sums of one batch as a NamedTuple
of float32 arrays: ``accuracy``, ``precision_at_k``, ``recall``, ``mean_squared_error``,
``mean_absolute_error`` and ``Mean.of`` (any value per example, such as the loss) give a ``Mean``;
``confusion_matrix`` a ``ConfusionMatrix``; ``calibration_error`` a ``CalibrationError``. A dict of them is a
pytree, so one evaluation is::

    def batch_sums(model, batch):                                # inside jit and shard_map
        logits = ...
        sums = {"top1": accuracy(logits, batch.labels, batch.weights),
                "loss": Mean.of(softmax_cross_entropy(logits, batch.labels), batch.weights)}
        return all_reduce(sums)                                  # over the devices that split the batch

    total = merge(total, batch_sums(model, batch))               # addition, on the device, over batches
    results = compute(total)                                     # on the host, once: dict[str, float]

Weight 0 marks padding and adds nothing, whatever the row holds. Counts are exact up to 2**24 examples, where
float32 stops counting in ones. A metric over no examples is NaN, not 0.

Host metrics. ``MeanAveragePrecision`` needs all scores at once and holds them in numpy: ``update(logits,
labels, weights)`` per batch, ``merge(other)``, ``compute()``. So do ``CocoMetric``, which gathers objects and
detections image by image for the figures of COCO and LVIS, and ``PanopticQuality`` and ``SegmentationMetric``, which
keep sums for each class; the latter takes those of a batch from the device, as ``pixel_confusion`` counts them.
``GlueMetric`` keeps predictions of a GLUE task, ``CaptionMetric`` captions with what people wrote. ``Perplexity`` is a
device metric; ``word_errors`` gives sums on the host.
The function ``compute`` takes host and device metrics alike.
"""

from eqvision.metrics.agreement import f1_score, matthews_correlation, pearson_correlation, spearman_correlation
from eqvision.metrics.average_precision import MeanAveragePrecision, average_precision
from eqvision.metrics.captions import CaptionMetric, bleu, caption_words, cider, rouge_l
from eqvision.metrics.classification import (
    CalibrationError,
    ConfusionMatrix,
    accuracy,
    calibration_error,
    confusion_matrix,
    precision_at_k,
    recall,
)
from eqvision.metrics.coco import CocoMetric, frequency_groups
from eqvision.metrics.coco_figures import CocoResult
from eqvision.metrics.glue import GLUE_TASKS, GlueMetric, GlueTask, glue_task
from eqvision.metrics.panoptic import PanopticQuality, Segment, ids_to_rgb, rgb_to_ids
from eqvision.metrics.regression import mean_absolute_error, mean_squared_error
from eqvision.metrics.retrieval import RetrievalRecall, retrieval_recall
from eqvision.metrics.segmentation import PixelConfusion, SegmentationMetric, pixel_confusion
from eqvision.metrics.sums import Mean, Metric, all_reduce, compute, merge, zeros_like
from eqvision.metrics.text import Perplexity, WordErrors, edit_distance, word_errors

__all__ = [
    "GLUE_TASKS",
    "CalibrationError",
    "CaptionMetric",
    "CocoMetric",
    "CocoResult",
    "ConfusionMatrix",
    "GlueMetric",
    "GlueTask",
    "Mean",
    "MeanAveragePrecision",
    "Metric",
    "PanopticQuality",
    "Perplexity",
    "PixelConfusion",
    "RetrievalRecall",
    "Segment",
    "SegmentationMetric",
    "WordErrors",
    "accuracy",
    "all_reduce",
    "average_precision",
    "bleu",
    "calibration_error",
    "caption_words",
    "cider",
    "compute",
    "confusion_matrix",
    "edit_distance",
    "f1_score",
    "frequency_groups",
    "glue_task",
    "ids_to_rgb",
    "matthews_correlation",
    "mean_absolute_error",
    "mean_squared_error",
    "merge",
    "pearson_correlation",
    "pixel_confusion",
    "precision_at_k",
    "recall",
    "retrieval_recall",
    "rgb_to_ids",
    "rouge_l",
    "spearman_correlation",
    "word_errors",
    "zeros_like",
]
