"""What every matcher does before and after its own work: checks, batching, and problems that cannot be solved."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from eqvision.ops.collectives import vary_like

LARGEST_COST = 1e30  # sums of a few thousand of these still fit in float32

# From costs "g c" (a row for each target) and validity "g" to the query of each target "g", -1 for none.
Solver = Callable[[Array, Array], Array]


def check_costs(cost: Float[Array, "*batch q g"], valid: Bool[Array, "*batch g"]) -> Bool[Array, "*batch"]:
    """Whether each problem's costs of valid targets are all numbers of at most 1e30 in size.

    Where this is False the matchers give -1 for every target of the problem. Inside ``jit``, where nothing can be
    raised, the caller reports it (for instance as a metric, or by making the loss NaN, which stops the run).
    """
    fine = jnp.abs(cost.astype(jnp.float32)) <= LARGEST_COST  # False for NaN
    return jnp.all(fine | ~valid[..., None, :], axis=(-2, -1))


def solve_each(
    solver: Solver, cost: Float[Array, "*batch q g"], valid: Bool[Array, "*batch g"]
) -> Int[Array, "*batch g"]:
    """``solver`` on every problem in float32, with costs of targets that are not valid set to 0.

    In a problem that ``check_costs`` refuses, no target is valid.
    """
    if valid.size == 0:
        return jnp.zeros(valid.shape, jnp.int32)
    cost = lax.stop_gradient(cost).astype(jnp.float32)
    valid = valid & check_costs(cost, valid)[..., None]
    rows = jnp.swapaxes(jnp.where(valid[..., None, :], cost, 0.0), -2, -1)
    rows, valid = rows.reshape(-1, *rows.shape[-2:]), vary_like(valid, rows).reshape(-1, valid.shape[-1])
    return jax.vmap(solver)(rows, valid).reshape(cost.shape[:-2] + cost.shape[-1:])


def require_solvable(cost: Float[Array, "*batch q g"], valid: Bool[Array, "*batch g"]) -> None:
    """ValueError for what is known to be wrong: while tracing that is what shapes and constants say, else all of it."""
    require_enough_queries(cost, valid)
    if _is_known(cost) and _is_known(valid):
        _require_finite(np.asarray(cost, np.float32), np.asarray(valid))


def require_enough_queries(cost: Float[Array, "*batch q g"], valid: Bool[Array, "*batch g"]) -> None:
    """ValueError where there are targets but no query, or where more targets than queries are known to be valid."""
    queries, targets = cost.shape[-2:]
    if queries == 0 and targets > 0:
        raise ValueError(f"costs of shape {cost.shape} (..., queries, targets) have no query; expected at least one")
    counts = np.asarray(valid).sum(-1) if _is_known(valid) else np.zeros((), int)
    if (counts > queries).any():
        place = _first(counts > queries)
        raise ValueError(
            f"problem {place} has {counts[place]} valid targets but only {queries} queries, so some would go unmatched;"
            " use more queries, or drop objects when reading the data"
        )


def _require_finite(cost: np.ndarray, valid: np.ndarray) -> None:
    wrong = ~(np.abs(cost) <= LARGEST_COST) & valid[..., None, :]
    if wrong.any():
        *batch, query, target = place = _first(wrong)
        raise ValueError(
            f"the cost of query {query} and target {target} of problem {tuple(batch)} is {cost[place]}, one of"
            f" {wrong.sum()} such entries; expected numbers of at most {LARGEST_COST:g} in size: look for NaN in the"
            " predictions, or for boxes without finite corners in the targets"
        )


def _is_known(x: Array | np.ndarray) -> bool:
    return not isinstance(x, Tracer) and getattr(x, "is_fully_addressable", True)


def _first(mask: np.ndarray) -> tuple[int, ...]:
    return tuple(int(axis[0]) for axis in np.nonzero(mask))


def first_index(mask: Bool[Array, "..."], axis: int = -1) -> Int[Array, "..."]:
    """Position of the first True along an axis, its length where there is none.

    A minimum over integers: XLA turns that into vector instructions, and argmin into a loop over pairs.
    """
    size = mask.shape[axis]
    positions = lax.broadcasted_iota(jnp.int32, mask.shape, axis % mask.ndim)
    return jnp.min(jnp.where(mask, positions, size), axis=axis)
