"""Exact assignment on the device: shortest augmenting paths that start at valid targets only.

The method is that of Jonker and Volgenant (1987), in the form of Crouse, "On implementing 2D rectangular assignment
algorithms" (2016): targets are inserted one by one, each along a shortest path of alternating pairs. Padding is the
common case here (100 rows of which 7 are objects), and a solver that inserts it too spends nearly all its time
there, because rows of equal costs tie and the search walks through everything that is matched already.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from eqvision.ops.assignment_problems import first_index, solve_each
from eqvision.ops.collectives import vary_like

NONE = -1


class _Matching(NamedTuple):
    """Pairs so far, the dual price of each query (never above 0), and the targets that are still to be inserted."""

    target: Int[Array, " q"]
    query: Int[Array, " g"]
    price: Float[Array, " q"]
    pending: Bool[Array, " g"]


class _Search(NamedTuple):
    """Dijkstra's search from one target: ``previous`` is the target through which each query is reached."""

    distance: Float[Array, " q"]
    previous: Int[Array, " q"]
    visited: Bool[Array, " q"]
    query: Int[Array, ""]  # the one visited last,
    owner: Int[Array, ""]  # the target that has it, NONE at the end of the search,
    length: Float[Array, ""]  # and its distance
    steps: Int[Array, ""]


@jax.jit
def hungarian_matches(cost: Float[Array, "*batch q g"], valid: Bool[Array, "*batch g"]) -> Int[Array, "*batch g"]:
    """See ``eqvision.ops.hungarian``."""
    return solve_each(_solve, cost, valid)


def _solve(cost: Float[Array, "g q"], valid: Bool[Array, " g"]) -> Int[Array, " g"]:
    targets, queries = cost.shape
    if targets > queries:
        cost = _with_places_for_the_rest(cost, valid)
    start = vary_like(_first_choices(cost, valid), cost)
    query = lax.while_loop(lambda m: jnp.any(m.pending), partial(_insert, cost), start).query
    return jnp.where(query < queries, query, NONE)


def _with_places_for_the_rest(cost: Float[Array, "g q"], valid: Bool[Array, " g"]) -> Float[Array, "g g"]:
    """As many more queries as there are too many valid targets, at one price for all; they stand for no query.

    All of them must be taken, so their price is the same in every assignment and the others are the cheapest choice.
    """
    targets, queries = cost.shape
    price = jnp.where(jnp.arange(queries, targets) < jnp.sum(valid), jnp.max(cost), jnp.inf)
    return jnp.concatenate([cost, jnp.broadcast_to(price, (targets, targets - queries))], axis=1)


def _first_choices(cost: Float[Array, "g q"], valid: Bool[Array, " g"]) -> _Matching:
    """Each valid target takes its cheapest query, the first one where several want it; prices are then all 0."""
    targets, queries = cost.shape
    choice = first_index(cost == jnp.min(cost, axis=1, keepdims=True))
    wanted = valid[:, None] & (choice[:, None] == jnp.arange(queries))
    winner = first_index(wanted, axis=0)
    got = valid & (winner[choice] == jnp.arange(targets))
    target, query = jnp.where(winner < targets, winner, NONE), jnp.where(got, choice, NONE)
    return _Matching(target, query, jnp.zeros(queries, jnp.float32), valid & ~got)


def _insert(cost: Float[Array, "g q"], matching: _Matching) -> _Matching:
    """Match the first pending target; if no query can be reached (never, for finite costs) it stays without.

    Under ``vmap`` this runs for finished problems too, until all are: those start from NONE and must not loop.
    """
    start = jnp.where(jnp.any(matching.pending), first_index(matching.pending), NONE)
    search = _search(cost, matching, start)
    found = (start != NONE) & (search.owner == NONE) & jnp.isfinite(search.length)
    cheaper = jnp.where(search.visited, search.distance - search.length, 0.0)
    price = jnp.where(found, matching.price + cheaper, matching.price)
    target, query = _augment(matching, search.previous, jnp.where(found, search.query, NONE))
    return _Matching(target, query, price, matching.pending & (jnp.arange(len(query)) != start))


def _search(cost: Float[Array, "g q"], matching: _Matching, start: Int[Array, ""]) -> _Search:
    """Visit queries in order of distance until one is free; each step visits another one, so at most q steps."""
    queries = cost.shape[1]

    def step(search: _Search) -> _Search:
        # A matched pair has reduced cost 0, which gives the target's own dual value without storing it.
        row, query = search.owner, search.query
        own = jnp.where(search.steps == 0, 0.0, cost[row, query] - matching.price[query])
        reached = cost[row] - matching.price + (search.length - own)
        better = ~search.visited & (reached < search.distance)
        distance = jnp.where(better, reached, search.distance)
        ahead = jnp.where(search.visited, jnp.inf, distance)
        length = jnp.min(ahead)
        query = jnp.minimum(first_index(ahead == length), queries - 1)
        visited = search.visited | (jnp.arange(queries) == query)
        previous = jnp.where(better, row, search.previous)
        return _Search(distance, previous, visited, query, matching.target[query], length, search.steps + 1)

    nothing = jnp.full(queries, jnp.inf, jnp.float32), jnp.full(queries, NONE, jnp.int32), jnp.zeros(queries, bool)
    first = _Search(*nothing, jnp.int32(0), start, jnp.float32(0), jnp.int32(0))
    return lax.while_loop(lambda s: (s.owner != NONE) & (s.steps < queries), step, vary_like(first, cost))


def _augment(
    matching: _Matching, previous: Int[Array, " q"], end: Int[Array, ""]
) -> tuple[Int[Array, " q"], Int[Array, " g"]]:
    """Give each query of the path that ends in ``end`` to the target it was reached through, back to the start."""

    def step(state):
        target, query, column, steps = state
        row = previous[column]
        target = jnp.where(jnp.arange(len(target)) == column, row, target)
        return target, jnp.where(jnp.arange(len(query)) == row, column, query), query[row], steps + 1

    first = matching.target, matching.query, end, jnp.zeros_like(end)
    unfinished = lambda state: (state[2] != NONE) & (state[3] < len(matching.query))  # noqa: E731
    target, query, _, _ = lax.while_loop(unfinished, step, first)
    return target, query
