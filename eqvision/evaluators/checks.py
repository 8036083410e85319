"""Errors about features and labels, found before anything is fitted."""

import numpy as np


def check_features(features: np.ndarray, labels: np.ndarray, num_classes: int, what: str) -> None:
    """Raise ValueError unless there is one finite row and one class index below ``num_classes`` per example."""
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{what} labels have shape {labels.shape} and type {labels.dtype}; evaluators on frozen features "
            "need one class index per example"
        )
    if features.ndim != 2 or len(features) != len(labels) or not len(labels):
        raise ValueError(
            f"{what} features have shape {features.shape} and there are {len(labels)} labels; "
            "expected [n d] with n > 0 labels"
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"{what} labels are {labels.min()}..{labels.max()}; expected 0..{num_classes - 1}")
    check_finite(features, what)


def check_finite(features: np.ndarray, what: str) -> None:
    """Raise ValueError that names the first row with NaN or infinity."""
    wrong = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(wrong):
        raise ValueError(
            f"{what} features of {len(wrong)} examples are not finite, the first in row {wrong[0]}; "
            "the model overflows or its parameters are NaN"
        )


def check_pair(train: np.ndarray, test: np.ndarray) -> None:
    """Raise ValueError where training and test features differ in width."""
    if train.shape[1] != test.shape[1]:
        raise ValueError(
            f"training features are {train.shape[1]} wide and test features {test.shape[1]}; "
            "both must come from one model"
        )
