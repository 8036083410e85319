"""Random changes to training images on the host: operations by Pillow, the published policies, their composition."""

from eqvision.data.augment.compose import check_augment, host_augmentations
from eqvision.data.augment.operations import OPERATIONS, apply_operation
from eqvision.data.augment.policies import (
    autoaugment,
    color_jitter,
    mean_fill,
    randaugment,
    three_augment,
    trivialaugment,
)

__all__ = [
    "OPERATIONS",
    "apply_operation",
    "autoaugment",
    "check_augment",
    "color_jitter",
    "host_augmentations",
    "mean_fill",
    "randaugment",
    "three_augment",
    "trivialaugment",
]
