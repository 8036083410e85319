"""Regression metrics as device sums."""

from jaxtyping import Array, Float, Num

from eqvision.losses.regression import absolute_error, squared_error
from eqvision.metrics.sums import Mean


def mean_squared_error(
    predictions: Float[Array, "b ..."], targets: Num[Array, "b ..."], weights: Float[Array, " b"]
) -> Mean:
    """Mean over output dimensions, then over examples. Raises ValueError where the shapes differ."""
    return Mean.of(squared_error(predictions, targets), weights)


def mean_absolute_error(
    predictions: Float[Array, "b ..."], targets: Num[Array, "b ..."], weights: Float[Array, " b"]
) -> Mean:
    """Mean over output dimensions, then over examples. Raises ValueError where the shapes differ."""
    return Mean.of(absolute_error(predictions, targets), weights)
