"""Greedy assignment on the device: the cheapest pair, then the cheapest of what remains, and so on."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from eqvision.ops.assignment_problems import first_index, solve_each
from eqvision.ops.collectives import vary_like

NONE = -1


class _Proposals(NamedTuple):
    """Who holds each query at what cost, and which targets still have to propose."""

    holder: Int[Array, " q"]
    held_at: Float[Array, " q"]
    pending: Bool[Array, " g"]
    steps: Int[Array, ""]


@jax.jit
def greedy_matches(cost: Float[Array, "*batch q g"], valid: Bool[Array, "*batch g"]) -> Int[Array, "*batch g"]:
    """See ``eqvision.ops.greedy``."""
    return solve_each(solve_greedily, cost, valid)


def solve_greedily(cost: Float[Array, "g q"], valid: Bool[Array, " g"]) -> Int[Array, " g"]:
    """Deferred acceptance (Gale and Shapley 1962): one proposal for each valid target and one for each refusal.

    Both sides rank pairs by the same cost, so the stable matching is the greedy one; no pair is looked at twice and
    no table of all pairs is searched. A target proposes to no query twice, which bounds the steps.
    """
    targets, queries = cost.shape
    nobody = jnp.full(queries, NONE, jnp.int32), jnp.full(queries, jnp.inf, jnp.float32)
    first = vary_like(_Proposals(*nobody, valid, jnp.int32(0)), cost)
    limit = targets * queries + targets
    unfinished = lambda p: jnp.any(p.pending) & (p.steps < limit)  # noqa: E731
    holder = lax.while_loop(unfinished, partial(_propose, cost), first).holder
    held = holder == jnp.arange(targets)[:, None]
    query = first_index(held)
    return jnp.where(valid & (query < queries), query, NONE)


def _propose(cost: Float[Array, "g q"], proposals: _Proposals) -> _Proposals:
    """The first pending target asks the cheapest query at which it undercuts the holder, who is then pending again."""
    holder, held_at, pending, steps = proposals
    row = first_index(pending)
    offers = jnp.where(cost[row] < held_at, cost[row], jnp.inf)
    lowest = jnp.min(offers)
    taken = (jnp.arange(len(offers)) == first_index(offers == lowest)) & jnp.isfinite(lowest)
    left = jnp.max(jnp.where(taken, holder, NONE))
    pending = (pending & (jnp.arange(len(pending)) != row)) | (jnp.arange(len(pending)) == left)
    return _Proposals(jnp.where(taken, row, holder), jnp.where(taken, lowest, held_at), pending, steps + 1)
