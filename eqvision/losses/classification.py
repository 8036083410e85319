"""Classification losses: logits and labels to one value per example, in float32 whatever the input dtype.

Labels are class indices ``[b]`` or rows ``[b k]`` (one-hot, multi-hot, or soft as after mixup). A class index
outside ``0..k-1`` gives NaN, so that it cannot train in silence; the data pipeline reports it by name first.
A class masked out with a logit of minus infinity is legal as long as it is not the label. Every value is
finite in its gradient for logits of any finite size.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from eqvision.types import Labels


def softmax_cross_entropy(
    logits: Float[Array, "b k"],
    labels: Labels,
    *,
    label_smoothing: float = 0.0,
    class_weights: Float[Array, " k"] | None = None,
) -> Float[Array, " b"]:
    """Cross entropy of a softmax over classes, in nats.

    Smoothing turns targets ``t`` into ``t * (1 - s) + s / k``. Class weights multiply the targets afterwards,
    as in ``torch.nn.functional.cross_entropy(reduction="none")``; unlike that function's mean, the weights
    never enter a normaliser. Raises ValueError for labels that do not fit the logits.
    """
    targets = _targets(labels, logits, label_smoothing, class_weights)
    return -(targets * _where_used(targets, _log_softmax(logits))).sum(axis=1)


def sigmoid_cross_entropy(
    logits: Float[Array, "b k"],
    labels: Labels,
    *,
    label_smoothing: float = 0.0,
    class_weights: Float[Array, " k"] | None = None,
) -> Float[Array, " b"]:
    """Binary cross entropy of every class, summed over classes, in nats.

    The sum keeps the gradient of one logit independent of the number of classes, so a learning rate carries
    over from softmax and between data sets; it is also what Scenic trains with. Divide by ``k`` to compare
    with the mean that timm takes. At zero logits the value is ``k * log(2)``. Smoothing turns targets into
    ``t * (1 - s) + s / k``, as for softmax and in Scenic and timm (Keras moves ``t`` towards 0.5 instead). A
    class weight scales the positive and the negative term of its class. Raises ValueError for labels that do
    not fit the logits.
    """
    targets = _targets(labels, logits, label_smoothing, None)
    positive, negative = _log_sigmoids(logits)
    off = 1 - targets
    losses = -targets * _where_used(targets, positive) - off * _where_used(off, negative)
    return _weighted(losses, class_weights).sum(axis=1)


def softmax_focal(logits: Float[Array, "b k"], labels: Labels, *, gamma: float = 2.0) -> Float[Array, " b"]:
    """Softmax focal loss, ``-t (1 - p)^gamma log p`` summed over classes (Lin et al. 2017, equation 4).

    ``gamma=0.0`` is the cross entropy. Raises ValueError for a negative ``gamma`` and for labels that do not
    fit the logits.
    """
    _check_gamma(gamma)
    targets = label_rows(labels, logits.shape)
    log_p = _where_used(targets, _log_softmax(logits))
    return -(targets * _power(-jnp.expm1(log_p), gamma) * log_p).sum(axis=1)


def sigmoid_focal(
    logits: Float[Array, "b k"], labels: Labels, *, alpha: float | None = 0.25, gamma: float = 2.0
) -> Float[Array, " b"]:
    """Sigmoid focal loss summed over classes (Lin et al. 2017, equation 5).

    ``alpha`` in 0..1 weights the positives and ``1 - alpha`` the negatives; None weights neither. The loss is
    linear in the label: a soft label gets the expectation over hard ones. Raises ValueError for ``alpha``
    outside its range, a negative ``gamma``, and labels that do not fit the logits.
    """
    _check_gamma(gamma)
    on, off = _balance(alpha)
    targets = label_rows(labels, logits.shape)
    log_p, log_not_p = _log_sigmoids(logits)
    # powers as exp(gamma * log): the gradient of 0 ** gamma would be infinite for gamma below 1
    positive = on * targets * jnp.exp(gamma * log_not_p) * _where_used(targets, log_p)
    negative = off * (1 - targets) * jnp.exp(gamma * log_p) * _where_used(1 - targets, log_not_p)
    return -(positive + negative).sum(axis=1)


def label_rows(labels: Labels, shape: tuple[int, ...]) -> Float[Array, "b k"]:
    """Labels as float32 rows of ``shape`` ``(b, k)``: one-hot of class indices, NaN for those outside 0..k-1.

    Raises ValueError where labels are neither integer ``[b]`` nor numbers ``[b k]``; nothing is broadcast.
    """
    if labels.shape == shape:
        return labels.astype(jnp.float32)
    if labels.shape == shape[:1] and jnp.issubdtype(labels.dtype, jnp.integer):
        valid = (labels >= 0) & (labels < shape[1])
        return jnp.where(valid[:, None], jax.nn.one_hot(labels, shape[1], dtype=jnp.float32), jnp.nan)
    raise ValueError(
        f"labels have shape {labels.shape} and dtype {labels.dtype}, but logits have shape {shape}. Expected "
        f"integer class indices of shape {shape[:1]} or rows of shape {shape}; encode or reshape the labels."
    )


def _targets(
    labels: Labels, logits: Float[Array, "b k"], smoothing: float, class_weights: Float[Array, " k"] | None
) -> Float[Array, "b k"]:
    if not 0.0 <= smoothing < 1.0:
        raise ValueError(f"label_smoothing is {smoothing}; expected a value in [0, 1), commonly 0.1.")
    rows = label_rows(labels, logits.shape)
    if smoothing:
        rows = rows * (1 - smoothing) + smoothing / logits.shape[1]
    return _weighted(rows, class_weights)


def _weighted(rows: Float[Array, "b k"], class_weights: Array | None) -> Float[Array, "b k"]:
    if class_weights is None:
        return rows
    if class_weights.shape != rows.shape[1:]:
        raise ValueError(
            f"class_weights have shape {class_weights.shape}, but there are {rows.shape[1]} classes; "
            f"expected one weight per class, shape {rows.shape[1:]}."
        )
    return rows * class_weights.astype(jnp.float32)


def _log_softmax(logits: Float[Array, "b k"]) -> Float[Array, "b k"]:
    return jax.nn.log_softmax(logits.astype(jnp.float32), axis=1)


def _log_sigmoids(logits: Float[Array, "b k"]) -> tuple[Float[Array, "b k"], Float[Array, "b k"]]:
    """Logarithms of p and of 1 - p."""
    logits = logits.astype(jnp.float32)
    return jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)


def _where_used(targets: Float[Array, "b k"], log_p: Float[Array, "b k"]) -> Float[Array, "b k"]:
    """Zero where the target is zero: 0 * log 0 is 0 here, and so is its gradient."""
    return jnp.where(targets == 0, 0.0, log_p)


def _power(x: Float[Array, "b k"], gamma: float) -> Float[Array, "b k"]:
    """``x ** gamma`` for x in 0..1 with a zero gradient at x = 0, where for gamma below 1 it is infinite."""
    positive = x > 0
    return jnp.where(positive, jnp.where(positive, x, 1.0) ** gamma, 1.0 if gamma == 0 else 0.0)


def _balance(alpha: float | None) -> tuple[float, float]:
    if alpha is None:
        return 1.0, 1.0
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha}; expected a value in 0..1 (the paper uses 0.25), or None for no weights.")
    return alpha, 1.0 - alpha


def _check_gamma(gamma: float) -> None:
    if gamma < 0:
        raise ValueError(f"gamma is {gamma}; expected 0 (cross entropy) or more (the paper uses 2).")
