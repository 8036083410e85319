"""From the configuration to what an image goes through on the host."""

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from eqvision.data.augment.operations import AFFINE_FILTERS, Fill
from eqvision.data.augment.policies import autoaugment, color_jitter, randaugment, three_augment, trivialaugment
from eqvision.names import nearest

if TYPE_CHECKING:  # recipes come after data: their type may be named here, their code not imported
    import eqvision.recipes.config

HostTransform = Callable[[np.ndarray, np.random.Generator], np.ndarray]
POLICIES = ("none", "randaugment", "trivialaugment", "autoaugment", "three_augment")
THREE_AUGMENT_JITTER = 0.3  # DeiT III


def host_augmentations(
    config: "eqvision.recipes.config.AugmentConfig",
    table: str = "imagenet",
    interpolation: str = "bicubic",
    fill: Fill = 128,
) -> tuple[HostTransform, ...]:
    """What follows crop and flip, in order: colour jitter, then the policy. Empty where the configuration has neither.

    Jitter comes first because the policies that rotate and shear paint uncovered pixels with ``fill``, the mean of
    the data: jitter afterwards would move it away from zero. three_augment is its own whole, jitter last; its
    strength is ``color_jitter``, or DeiT III's 0.3 where that is 0. ``table`` is AutoAugment's. Filters that affine
    maps do not have (lanczos, box) become bicubic there. Raises ValueError as ``check_augment``.
    """
    check_augment(config)
    if config.policy == "three_augment":
        return (functools.partial(three_augment, color_jitter=config.color_jitter or THREE_AUGMENT_JITTER),)
    jitter = (functools.partial(color_jitter, strength=config.color_jitter),) if config.color_jitter else ()
    filter_name = interpolation if interpolation in AFFINE_FILTERS else "bicubic"
    return jitter + _policy(config, table, filter_name, fill)


def _policy(
    config: "eqvision.recipes.config.AugmentConfig", table: str, interpolation: str, fill: Fill
) -> tuple[HostTransform, ...]:
    if config.policy == "none":
        return ()
    if config.policy == "trivialaugment":
        return (functools.partial(trivialaugment, interpolation=interpolation, fill=fill),)
    if config.policy == "autoaugment":
        return (functools.partial(autoaugment, table=table, interpolation=interpolation, fill=fill),)
    policy = functools.partial(
        randaugment,
        num_ops=config.num_ops,
        magnitude=config.magnitude,
        magnitude_std=config.magnitude_std,
        interpolation=interpolation,
        fill=fill,
    )
    return (policy,)


def check_augment(config: "eqvision.recipes.config.AugmentConfig") -> None:
    """Raises ValueError naming the option that is out of range, UnknownNameError for the policy.

    Whether ``repeats`` divides the batch is for ``train_stream`` to say.
    """
    if config.policy not in POLICIES:
        raise nearest(config.policy, list(POLICIES), "augment.policy")
    _check_whole("num_ops", config.num_ops, "operations for each image, 2 is common")
    _check_whole("repeats", config.repeats, "how often each image appears in a batch, 1 is off, 3 is common")
    _check("magnitude", config.magnitude, 10.0, "9 is common")
    _check("magnitude_std", config.magnitude_std, math.inf, "0.5 is common")
    _check("color_jitter", config.color_jitter, 1.0, "0.3 or 0.4 is common")
    _check("random_erasing", config.random_erasing, 1.0, "a probability, 0.25 is common")
    _check("mixup", config.mixup, math.inf, "alpha of a Beta distribution, 0 is off, 0.2 or 0.8 is common")
    _check("cutmix", config.cutmix, math.inf, "alpha of a Beta distribution, 0 is off, 1 is common")
    _check("cutmix_share", config.cutmix_share, 1.0, "the share of batches that take CutMix")


def _check(name: str, value: float, largest: float, hint: str) -> None:
    if not (0 <= value <= largest and math.isfinite(value)):  # written so that NaN fails
        wanted = f"0 to {largest:g}" if math.isfinite(largest) else "0 or more"
        raise ValueError(f"augment.{name} is {value}; expected {wanted} ({hint})")


def _check_whole(name: str, value: int, hint: str) -> None:
    if not (value >= 1 and value == int(value)):
        raise ValueError(f"augment.{name} is {value}; expected a whole number from 1 up ({hint})")
