"""Losses: pure functions from predictions and targets to one float32 value per example, and their reduction.

A training step takes ``weighted_mean(softmax_cross_entropy(logits, labels), weights)``: per-example values,
then one division by the global sum of weights. Weight 0 marks padding and changes nothing.
"""

from eqvision.losses.boxes import box_giou, box_l1
from eqvision.losses.centernet import (
    CENTERNET_LOSS,
    CenterCounts,
    CenterNetConfig,
    CenterTargets,
    center_counts,
    center_loss,
    center_targets,
)
from eqvision.losses.classification import (
    label_rows,
    sigmoid_cross_entropy,
    sigmoid_focal,
    softmax_cross_entropy,
    softmax_focal,
)
from eqvision.losses.contrastive import CHUNK, contrastive_loss, pair_log_sums, sigmoid_loss
from eqvision.losses.distillation import logit_distillation, token_distillation
from eqvision.losses.language import BertCounts, BertTargets, bert_counts, bert_loss, token_cross_entropy
from eqvision.losses.masked_pixels import masked_pixel_loss, normalised_pixels, patch_moments
from eqvision.losses.masks import mask_dice, mask_focal
from eqvision.losses.matching_cost import box_cost, focal_cost, softmax_cost
from eqvision.losses.open_vocabulary import OpenVocabularyLossConfig, answer_cost, open_vocabulary_loss
from eqvision.losses.prompted_masks import (
    SAM_LOSS,
    PromptedMaskConfig,
    PromptedMaskLosses,
    mask_iou,
    prompted_mask_loss,
)
from eqvision.losses.rcnn import (
    CENTERNET2_LOSS,
    DETECTRON2_LOSS,
    MMDET_LOSS,
    RCNN_LOSSES,
    TORCHVISION_LOSS,
    RCNNCounts,
    RCNNLossConfig,
    rcnn_counts,
    rcnn_loss,
    whole_batch,
)
from eqvision.losses.reduce import mask_rows, weighted_mean, weighted_sums
from eqvision.losses.regression import absolute_error, huber, smooth_l1, squared_error
from eqvision.losses.segmentation import (
    CROSS_ENTROPY,
    SegmentationCounts,
    SegmentationLossConfig,
    dice_loss,
    lovasz_softmax,
    rebalanced_weights,
    segmentation_counts,
    segmentation_loss,
)
from eqvision.losses.set_prediction import (
    DEFORMABLE_DETR_LOSS,
    DETR_LOSS,
    Counts,
    SetPredictionConfig,
    detr_loss,
    target_counts,
)

__all__ = [
    "CENTERNET2_LOSS",
    "CENTERNET_LOSS",
    "CHUNK",
    "CROSS_ENTROPY",
    "DEFORMABLE_DETR_LOSS",
    "DETECTRON2_LOSS",
    "DETR_LOSS",
    "MMDET_LOSS",
    "RCNN_LOSSES",
    "SAM_LOSS",
    "TORCHVISION_LOSS",
    "BertCounts",
    "BertTargets",
    "CenterCounts",
    "CenterNetConfig",
    "CenterTargets",
    "Counts",
    "OpenVocabularyLossConfig",
    "PromptedMaskConfig",
    "PromptedMaskLosses",
    "RCNNCounts",
    "RCNNLossConfig",
    "SegmentationCounts",
    "SegmentationLossConfig",
    "SetPredictionConfig",
    "absolute_error",
    "answer_cost",
    "bert_counts",
    "bert_loss",
    "box_cost",
    "box_giou",
    "box_l1",
    "center_counts",
    "center_loss",
    "center_targets",
    "contrastive_loss",
    "detr_loss",
    "dice_loss",
    "focal_cost",
    "huber",
    "label_rows",
    "logit_distillation",
    "lovasz_softmax",
    "mask_dice",
    "mask_focal",
    "mask_iou",
    "mask_rows",
    "masked_pixel_loss",
    "normalised_pixels",
    "open_vocabulary_loss",
    "pair_log_sums",
    "patch_moments",
    "prompted_mask_loss",
    "rcnn_counts",
    "rcnn_loss",
    "rebalanced_weights",
    "segmentation_counts",
    "segmentation_loss",
    "sigmoid_cross_entropy",
    "sigmoid_focal",
    "sigmoid_loss",
    "smooth_l1",
    "softmax_cost",
    "softmax_cross_entropy",
    "softmax_focal",
    "squared_error",
    "target_counts",
    "token_cross_entropy",
    "token_distillation",
    "weighted_mean",
    "weighted_sums",
    "whole_batch",
]
