"""Random keys of a step: functions of the seed and the step alone."""

from typing import NamedTuple

import jax
from jaxtyping import Array, Int, Key


class StepKeys(NamedTuple):
    """What a problem draws with: ``own`` differs between devices and parts of a batch, ``common`` does not."""

    own: Key[Array, ""]
    common: Key[Array, ""]


def step_key(seed: int, number: int | Int[Array, ""]) -> Key[Array, ""]:
    """Of the step after ``number`` steps; each device folds its index into it, each part of a batch its own."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), number)


def augment_key(key: Key[Array, ""]) -> Key[Array, ""]:
    """For what is drawn on the device before the model runs, which folds 0, 1 and 2 itself."""
    return jax.random.fold_in(key, 3)


def image_keys(common: Key[Array, ""], indices: Int[Array, " b"]) -> Key[Array, " b"]:
    """For what is drawn for each image: the same on one device and on many, whatever rows they hold."""
    return jax.vmap(lambda index: jax.random.fold_in(jax.random.fold_in(common, 4), index))(indices)
