"""Regression losses: predictions and targets of one shape, averaged over output dimensions per example."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Num


def squared_error(predictions: Float[Array, "b ..."], targets: Num[Array, "b ..."]) -> Float[Array, " b"]:
    """Squared difference. Raises ValueError where the shapes differ."""
    return _example_mean(jnp.square(_difference(predictions, targets)))


def absolute_error(predictions: Float[Array, "b ..."], targets: Num[Array, "b ..."]) -> Float[Array, " b"]:
    """Absolute difference, with gradient 0 where it is 0. Raises ValueError where the shapes differ."""
    difference = _difference(predictions, targets)
    return _example_mean(jnp.sign(difference) * difference)  # the gradient of jnp.abs at 0 is 1


def smooth_l1(
    predictions: Float[Array, "b ..."], targets: Num[Array, "b ..."], *, beta: float = 1.0
) -> Float[Array, " b"]:
    """Parabola ``d^2 / (2 beta)`` for differences below ``beta``, then slope 1 (Girshick 2015, equation 3,
    has ``beta=1``).

    Raises ValueError where the shapes differ or ``beta`` is not positive.
    """
    return huber(predictions, targets, delta=beta) / beta


def huber(
    predictions: Float[Array, "b ..."], targets: Num[Array, "b ..."], *, delta: float = 1.0
) -> Float[Array, " b"]:
    """Parabola ``d^2 / 2`` for differences below ``delta``, then slope ``delta`` (Huber 1964).

    Raises ValueError where the shapes differ or ``delta`` is not positive.
    """
    if not delta > 0:
        raise ValueError(f"the width of the parabola is {delta}; expected a positive number (absolute_error has none).")
    distance = jnp.abs(_difference(predictions, targets))
    near = jnp.minimum(distance, delta)
    return _example_mean(near * (distance - 0.5 * near))


def _difference(predictions: Float[Array, "b ..."], targets: Num[Array, "b ..."]) -> Float[Array, "b ..."]:
    # [b 1] against [b] would broadcast to [b b] and train on nonsense
    if predictions.shape != targets.shape:
        raise ValueError(
            f"predictions have shape {predictions.shape} and targets {targets.shape}; expected equal shapes, "
            "nothing is broadcast. Reshape the targets."
        )
    return predictions.astype(jnp.float32) - targets.astype(jnp.float32)


def _example_mean(errors: Float[Array, "b ..."]) -> Float[Array, " b"]:
    return errors.reshape(errors.shape[0], -1).mean(axis=1)
