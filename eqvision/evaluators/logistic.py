"""Multinomial logistic regression by L-BFGS, on the accelerator."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

MAX_STEPS = 1000
TOLERANCE = 1e-6  # largest element of the gradient of the mean loss, for features scaled to a mean square of 1


class Fit(NamedTuple):
    """Weights, intercepts, the number of L-BFGS steps and the largest element of the last gradient."""

    weight: Float[np.ndarray, "d k"]
    bias: Float[np.ndarray, " k"]
    num_steps: int
    gradient: float


def logistic_regression(
    features: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    num_classes: int,
    l2s: tuple[float, ...],
    *,
    max_steps: int = MAX_STEPS,
) -> list[Fit]:
    """A fit for each of ``l2s``, each started from the one before: give them from strong to weak.

    Minimises the sum of cross entropies plus ``l2 / 2`` times the squared norm of the weights; intercepts are not
    penalised. This is scikit-learn's ``LogisticRegression(C=1 / l2)``. Features are centred and divided by one
    number, which changes the way to the optimum and not the optimum.

    Raises ValueError unless every ``l2`` is positive.
    """
    if not all(l2 > 0 for l2 in l2s):
        raise ValueError(f"l2s={l2s}; expected positive strengths of regularisation")
    mean = features.mean(axis=0, dtype=np.float64)
    centred = features - mean.astype(np.float32)
    scale = float(np.sqrt(np.mean(np.square(centred), dtype=np.float64))) or 1.0
    data = jnp.asarray(centred / np.float32(scale)), jnp.asarray(labels)
    params = jnp.zeros((features.shape[1], num_classes)), jnp.zeros(num_classes)
    fits = []
    for l2 in l2s:
        strength = jnp.float32(l2 / len(labels) / scale**2)
        params, steps, gradient = _minimise(params, data, strength, max_steps)
        weight = np.asarray(params[0], np.float64) / scale
        fits.append(Fit(weight, np.asarray(params[1], np.float64) - mean @ weight, int(steps), float(gradient)))
    return fits


def _objective(params: tuple[Array, Array], data: tuple[Array, Array], strength: Array) -> Float[Array, ""]:
    (weight, bias), (features, labels) = params, data
    logits = jnp.matmul(features, weight, precision=jax.lax.Precision.HIGHEST) + bias
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss + 0.5 * strength * jnp.sum(jnp.square(weight))


@functools.partial(jax.jit, static_argnames="max_steps")
def _minimise(
    params: tuple[Array, Array], data: tuple[Array, Array], strength: Float[Array, ""], max_steps: int
) -> tuple[tuple[Array, Array], Int[Array, ""], Float[Array, ""]]:
    objective = functools.partial(_objective, data=data, strength=strength)
    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def step(carry: tuple[Any, Any, Array, Array]) -> tuple[Any, Any, Array, Array]:
        params, state, count, _ = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = optimizer.update(grad, state, params, value=value, grad=grad, value_fn=objective)
        params = optax.apply_updates(params, updates)
        return params, state, count + 1, _largest(optax.tree.get(state, "grad"))

    def unfinished(carry: tuple[Any, Any, Array, Array]) -> Array:
        return (carry[2] < max_steps) & (carry[3] > TOLERANCE)

    start = (params, optimizer.init(params), jnp.zeros((), jnp.int32), jnp.float32(jnp.inf))
    params, _, count, gradient = jax.lax.while_loop(unfinished, step, start)
    return params, count, gradient


def _largest(tree: Any) -> Float[Array, ""]:
    return jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(tree)]))
