"""Random keys of a step: functions of the seed and the step alone."""

import jax
from jaxtyping import Array, Int, Key


def step_key(seed: int, number: int | Int[Array, ""]) -> Key[Array, ""]:
    """Of the step after ``number`` steps; each device folds its index into it, each part of a batch its own."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), number)


def augment_key(key: Key[Array, ""]) -> Key[Array, ""]:
    """For what is drawn on the device before the model runs, which folds 0, 1 and 2 itself."""
    return jax.random.fold_in(key, 3)
