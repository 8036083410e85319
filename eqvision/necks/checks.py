"""Checks of what a neck is built for and of what it is given; shapes are static, so they cost nothing at run time."""

import itertools
from typing import NamedTuple

from eqvision.types import Features


class Levels(NamedTuple):
    channels: tuple[int, ...]
    strides: tuple[int, ...]


def check_levels(neck: str, channels: tuple[int, ...], strides: tuple[int, ...], first_level: int = 0) -> Levels:
    """The levels from ``first_level`` on; ValueError unless there are some and each stride is twice the last."""
    if len(channels) != len(strides):
        raise ValueError(
            f"{neck}: {len(channels)} channels {channels} and {len(strides)} strides {strides} were given; "
            "both are those of one backbone, one number for each of its maps"
        )
    if not 0 <= first_level < len(channels):
        raise ValueError(f"{neck}: first_level {first_level} does not exist, the backbone has 0..{len(channels) - 1}")
    chosen = strides[first_level:]
    if any(coarse != 2 * fine for fine, coarse in itertools.pairwise(chosen)):
        raise ValueError(
            f"{neck}: each map must have twice the stride of the one before, got strides {chosen}; "
            "a backbone with dilation repeats one, and needs a neck of its own"
        )
    return Levels(channels[first_level:], chosen)


def check_features(neck: str, features: Features, channels: tuple[int, ...]) -> None:
    """Raise a ValueError unless there is one map for each of the channels that the neck was built for."""
    given = tuple(each.shape[-1] for each in features)
    if given != channels:
        raise ValueError(
            f"{neck}: it was built for maps of {channels} channels and got {given}; "
            "build it with channels and strides of the backbone whose maps it reads"
        )
