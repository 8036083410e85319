"""Losses: pure functions from predictions and targets to one float32 value per example, and their reduction.

A training step takes ``weighted_mean(softmax_cross_entropy(logits, labels), weights)``: per-example values,
then one division by the global sum of weights. Weight 0 marks padding and changes nothing.
"""

from eqvision.losses.classification import (
    label_rows,
    sigmoid_cross_entropy,
    sigmoid_focal,
    softmax_cross_entropy,
    softmax_focal,
)
from eqvision.losses.distillation import logit_distillation, token_distillation
from eqvision.losses.reduce import mask_rows, weighted_mean, weighted_sums
from eqvision.losses.regression import absolute_error, huber, smooth_l1, squared_error

__all__ = [
    "absolute_error",
    "huber",
    "label_rows",
    "logit_distillation",
    "mask_rows",
    "sigmoid_cross_entropy",
    "sigmoid_focal",
    "smooth_l1",
    "softmax_cross_entropy",
    "softmax_focal",
    "squared_error",
    "token_distillation",
    "weighted_mean",
    "weighted_sums",
]
