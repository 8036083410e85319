"""Entropic assignment on the device (Cuturi 2013), rounded to pairs."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from eqvision.ops.assignment_greedy import solve_greedily
from eqvision.ops.assignment_problems import solve_each
from eqvision.ops.collectives import vary_like


@partial(jax.jit, static_argnames=("epsilon", "iterations"))
def sinkhorn_matches(
    cost: Float[Array, "*batch q g"], valid: Bool[Array, "*batch g"], *, epsilon: float, iterations: int
) -> Int[Array, "*batch g"]:
    """See ``eqvision.ops.sinkhorn``."""
    return solve_each(partial(_solve, epsilon=epsilon, iterations=iterations), cost, valid)


def _solve(cost: Float[Array, "g q"], valid: Bool[Array, " g"], *, epsilon: float, iterations: int) -> Int[Array, " g"]:
    """The log of the plan is (both prices - cost) / epsilon, so the likeliest pairs have the least reduced cost."""
    rows = valid[:, None]
    low = jnp.min(cost, where=rows, initial=jnp.inf)
    high = jnp.max(cost, where=rows, initial=-jnp.inf)
    spread = jnp.where(high > low, high - low, 1.0)
    scaled = jnp.where(rows, (cost - low) / spread, 0.0)

    def step(number: Int[Array, ""], price: Float[Array, " q"]) -> Float[Array, " q"]:
        return _query_prices(scaled, _target_prices(scaled, price, width(number)), valid, width(number))

    def width(number: Int[Array, ""]) -> Float[Array, ""]:
        # From 1 (all queries alike) down to epsilon in the first half, which leads to the right corner sooner.
        return epsilon ** jnp.minimum(2.0 * number / iterations, 1.0)

    price = lax.fori_loop(0, iterations, step, vary_like(jnp.zeros_like(cost[0]), cost))
    reduced = scaled - price - _target_prices(scaled, price, jnp.float32(epsilon))[:, None]
    return solve_greedily(reduced, valid)


def _target_prices(cost: Float[Array, "g q"], price: Float[Array, " q"], width: Float[Array, ""]) -> Float[Array, " g"]:
    """Each target is spread over queries with total 1."""
    return -width * jax.nn.logsumexp((price - cost) / width, axis=1)


def _query_prices(
    cost: Float[Array, "g q"], price: Float[Array, " g"], valid: Bool[Array, " g"], width: Float[Array, ""]
) -> Float[Array, " q"]:
    """Each query takes at most 1 in total: no price where it takes less."""
    load = jnp.where(valid[:, None], (price[:, None] - cost) / width, -jnp.inf)
    return jnp.minimum(0.0, -width * jax.nn.logsumexp(load, axis=0))
