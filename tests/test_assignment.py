"""Matchers: optimal against SciPy, valid pairs only, and defined results where a problem cannot be solved."""

import argparse
import csv
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from scipy.optimize import linear_sum_assignment

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import assignment as benchmark
from eqvision import ops
from eqvision.names import UnknownNameError
from eqvision.ops import assignment

NAMES = ["hungarian", "scipy", "greedy", "sinkhorn", "lazy"]
USING_COSTS = NAMES[:-1]
EXACT = NAMES[:2]
SHAPE = (8, 9, 7)  # one shape for most tests, so that each matcher is compiled once
# The cheap ones stand for the others in the default suite where each would be compiled anew.
SLOWER = [*EXACT, "lazy", *(pytest.param(name, marks=pytest.mark.slow) for name in ("greedy", "sinkhorn"))]
JITTED = {name: jax.jit(matcher) for name, matcher in ops.MATCHERS.items()}


def problems(rng, shape=SHAPE, kind="random", share=0.7):
    """Costs and a validity that is anywhere, with at most as many valid targets as there are queries."""
    *batch, queries, targets = shape
    cost = rng.normal(size=shape) if kind == "random" else rng.integers(0, 4, shape)
    order = rng.random((*batch, targets)).argsort(-1).argsort(-1)
    valid = (rng.random((*batch, targets)) < share) & (order < queries)
    return jnp.asarray(cost, jnp.float32), jnp.asarray(valid)


def total(cost, valid, query):
    """The sum of the matched costs; first that the matching is one."""
    assert (query[~valid] == -1).all()
    matched = np.flatnonzero(query >= 0)
    assert len(matched) == min(valid.sum(), len(cost))
    assert len(set(query[matched])) == len(matched), "a query was given twice"
    assert (query < len(cost)).all()
    return cost[query[matched], matched].sum(dtype=np.float64)


def totals(cost, valid, query):
    return np.array([total(*problem) for problem in zip(*map(np.asarray, (cost, valid, query)), strict=True)])


def least(cost, valid):
    """SciPy's optimum of one problem."""
    columns = cost[:, valid].astype(np.float64)
    return columns[linear_sum_assignment(columns)].sum()


def leasts(cost, valid):
    return np.array([least(*problem) for problem in zip(*map(np.asarray, (cost, valid)), strict=True)])


def one_pair_at_a_time(cost, valid):
    """The definition of the greedy matching."""
    cost, query = np.where(np.asarray(valid), np.asarray(cost), np.inf), np.full(len(valid), -1)
    while np.isfinite(cost).any():
        row, column = np.unravel_index(cost.argmin(), cost.shape)
        query[column] = row
        cost[row], cost[:, column] = np.inf, np.inf
    return query


def test_hungarian_is_optimal_on_1000_random_and_tied_problems(rng):
    random, tied = problems(rng, (500, 14, 12), share=0.8), problems(rng, (500, 14, 12), "tied", share=0.8)
    cost, valid = (jnp.concatenate(pair) for pair in zip(random, tied, strict=True))
    found = totals(cost, valid, ops.hungarian(cost, valid))
    np.testing.assert_allclose(found, leasts(cost, valid), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(found[500:], leasts(cost, valid)[500:])


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(20, 100, 100), (4, 300, 100), (20, 40, 60)])
@pytest.mark.parametrize("kind", ["random", "tied"])
@pytest.mark.parametrize("share", [0.07, 1.0])
def test_hungarian_is_optimal_on_large_problems(rng, shape, kind, share):
    cost, valid = problems(rng, shape, kind, share)
    found = totals(cost, valid, ops.hungarian(cost, valid))
    np.testing.assert_allclose(found, leasts(cost, valid), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_junk_in_padded_columns_changes_nothing(rng, name):
    cost, valid = problems(rng)
    junk = jnp.asarray(rng.choice([np.nan, np.inf, -np.inf, -1e38], SHAPE), jnp.float32)
    query = JITTED[name](cost, valid)
    totals(cost, valid, query)
    assert query.dtype == jnp.int32
    np.testing.assert_array_equal(JITTED[name](jnp.where(valid[:, None], cost, junk), valid), query)


def test_scipy_is_optimal(rng):
    cost, valid = problems(rng)
    np.testing.assert_allclose(totals(cost, valid, JITTED["scipy"](cost, valid)), leasts(cost, valid), rtol=1e-6)


def test_greedy_takes_the_cheapest_pair_again_and_again(rng):
    cost, valid = problems(rng)
    expected = [one_pair_at_a_time(*problem) for problem in zip(cost, valid, strict=True)]
    np.testing.assert_array_equal(JITTED["greedy"](cost, valid), expected)
    tied, valid = problems(rng, SHAPE, "tied")
    expected = [one_pair_at_a_time(*problem) for problem in zip(tied, valid, strict=True)]
    assert (totals(tied, valid, JITTED["greedy"](tied, valid)) >= leasts(tied, valid)).all()
    totals(tied, valid, jnp.asarray(expected))


def test_sinkhorn_is_near_the_optimum_and_greedy_is_not(rng):
    cost, valid = problems(rng, share=1.0)
    best = leasts(cost, valid)
    sinkhorn, greedy = (totals(cost, valid, JITTED[name](cost, valid)) for name in ("sinkhorn", "greedy"))
    assert (sinkhorn - best).max() < 0.02 * SHAPE[-1] * np.ptp(cost)
    assert (sinkhorn - best).mean() < 0.2 * (greedy - best).mean()


def test_lazy_counts_valid_targets_and_ignores_costs():
    valid = jnp.array([[True, False, True, True], [False, False, False, True]])
    np.testing.assert_array_equal(ops.lazy(jnp.full((2, 5, 4), jnp.nan), valid), [[0, -1, 1, 2], [-1, -1, -1, 0]])


@pytest.mark.parametrize("name", NAMES)
def test_no_valid_target_and_no_target_at_all(name):
    none = JITTED[name](jnp.zeros(SHAPE), jnp.zeros((8, 7), bool))
    np.testing.assert_array_equal(none, np.full((8, 7), -1))
    assert JITTED[name](jnp.zeros((2, 3, 0)), jnp.zeros((2, 0), bool)).shape == (2, 0)
    assert JITTED[name](jnp.zeros((0, 9, 7)), jnp.zeros((0, 7), bool)).shape == (0, 7)


@pytest.mark.parametrize("name", EXACT)
def test_one_query(name):
    query = JITTED[name](jnp.array([[3.0, 1.0, 2.0]]), jnp.array([False, False, True]))
    np.testing.assert_array_equal(query, [-1, -1, 0])


@pytest.mark.parametrize("name", EXACT)
def test_order_of_targets_does_not_change_the_total(rng, name):
    cost, valid = problems(rng)
    order = rng.permutation(SHAPE[-1])
    turned = cost[..., order], valid[..., order]
    before, after = totals(cost, valid, JITTED[name](cost, valid)), totals(*turned, JITTED[name](*turned))
    np.testing.assert_allclose(after, before, rtol=1e-6)


@pytest.mark.parametrize("name", ["scipy", "lazy", pytest.param("greedy", marks=pytest.mark.slow)])
def test_without_jit(rng, name):
    cost, valid = problems(rng)
    np.testing.assert_array_equal(ops.MATCHERS[name](cost, valid), JITTED[name](cost, valid))


@pytest.mark.parametrize("name", SLOWER)
def test_vmap_and_leading_axes(rng, name):
    cost, valid = problems(rng)
    expected = JITTED[name](cost, valid)
    mapped = jax.vmap(JITTED[name])(cost.reshape(2, 2, 2, *SHAPE[1:]), valid.reshape(2, 2, 2, -1))
    np.testing.assert_array_equal(mapped.reshape(8, -1), expected)


def test_all_problems_are_one_callback(rng, monkeypatch):
    calls = []
    solve = assignment.solve_on_host
    monkeypatch.setattr(assignment, "solve_on_host", lambda *problem: calls.append(1) or solve(*problem))
    cost, valid = problems(rng)
    mapped = jax.jit(jax.vmap(ops.scipy_assignment))(cost.reshape(2, 4, *SHAPE[1:]), valid.reshape(2, 4, -1))
    totals(cost, valid, mapped.reshape(8, -1))
    assert len(calls) == 1


@pytest.mark.parametrize("name", SLOWER)
def test_under_shard_map_equals_one_device(rng, mesh, name):
    cost, valid = problems(rng)
    split = jax.jit(jax.shard_map(ops.MATCHERS[name], mesh=mesh, in_specs=P("data"), out_specs=P("data")))
    np.testing.assert_array_equal(split(cost, valid), JITTED[name](cost, valid))


@pytest.mark.slow
def test_under_shard_map_with_the_same_targets_everywhere(rng, mesh):
    cost, valid = problems(rng)
    whole = jnp.broadcast_to(valid[0], valid.shape)

    def local(cost, valid):
        return ops.hungarian(cost, valid)

    split = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data")))
    np.testing.assert_array_equal(split(cost, whole[:1]), JITTED["hungarian"](cost, whole))


@pytest.mark.parametrize("name", SLOWER)
def test_no_gradient_passes(rng, name):
    cost, valid = problems(rng)

    def matched(cost):
        query = ops.MATCHERS[name](cost, valid)
        return jnp.sum(jnp.where(valid, jnp.take_along_axis(cost, query[:, None], 1)[:, 0], 0.0)), query

    gradient, query = jax.jit(jax.grad(matched, has_aux=True))(cost)
    expected = (np.arange(SHAPE[1])[:, None] == query[:, None]) & valid[:, None]
    np.testing.assert_array_equal(gradient, expected)


class TestTooManyTargets:
    """More valid targets than queries, which padding alone is not."""

    def turned(self, rng):
        return problems(rng, (8, 7, 9), share=1.0)[0], jnp.ones((8, 9), bool)

    @pytest.mark.parametrize("name", NAMES)
    def test_is_an_error_where_the_validity_is_known(self, rng, name):
        cost, valid = self.turned(rng)
        valid = valid.at[:5, 7:].set(False)
        with pytest.raises(
            ValueError, match=r"problem \(5,\) has 9 valid targets but only 7 queries.*use more queries"
        ):
            ops.MATCHERS[name](cost, valid)
        with pytest.raises(ValueError, match=r"problem \(5,\) has 9 valid targets but only 7 queries"):
            jax.jit(lambda cost: ops.MATCHERS[name](cost, valid))(cost)

    @pytest.mark.parametrize("name", SLOWER)
    def test_under_jit_shows_as_valid_targets_without_a_query(self, rng, name):
        cost, valid = self.turned(rng)
        query = JITTED[name](cost, valid)
        found = totals(cost, valid, query)  # checks that as many are matched as there are queries
        if name in EXACT:
            np.testing.assert_allclose(found, leasts(cost, valid), rtol=1e-5)

    @pytest.mark.parametrize("name", EXACT)
    def test_padding_may_exceed_the_queries(self, rng, name):
        cost, valid = problems(rng, (8, 7, 9), share=0.9)
        assert (valid.sum(1) <= 7).all()
        np.testing.assert_allclose(
            totals(cost, valid, JITTED[name](cost, valid)), leasts(cost, valid), rtol=1e-5, atol=1e-6
        )

    @pytest.mark.parametrize("name", NAMES)
    def test_no_query_at_all(self, name):
        with pytest.raises(ValueError, match=r"shape \(2, 0, 3\).*have no query"):
            ops.MATCHERS[name](jnp.zeros((2, 0, 3)), jnp.zeros((2, 3), bool))


class TestUnusableCosts:
    """One problem of eight has a cost that is no number; the others must not notice."""

    @pytest.mark.parametrize("name", USING_COSTS)
    @pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, 1e31])
    def test_error_outside_jit_and_minus_one_inside(self, rng, name, wrong):
        cost, valid = problems(rng)
        target = int(np.flatnonzero(valid[3])[-1])
        expected = np.asarray(JITTED[name](cost, valid)).copy()
        broken, expected[3] = cost.at[3, 2, target].set(wrong), -1
        place = rf"the cost of query 2 and target {target} of problem \(3,\) is .*one of 1 such"
        with pytest.raises(ValueError, match=place):
            ops.MATCHERS[name](broken, valid)
        np.testing.assert_array_equal(JITTED[name](broken, valid), expected)
        np.testing.assert_array_equal(ops.check_costs(broken, valid), np.arange(8) != 3)

    @pytest.mark.parametrize("name", USING_COSTS)
    def test_all_nan_ends(self, name):
        query = JITTED[name](jnp.full(SHAPE, jnp.nan, jnp.float32), jnp.ones((8, 7), bool))
        np.testing.assert_array_equal(query, np.full((8, 7), -1))

    @pytest.mark.parametrize("name", USING_COSTS)
    @pytest.mark.parametrize("scale", [0.0, 1e-38, 1e30])
    def test_equal_tiny_and_huge_costs_end_with_all_matched(self, rng, name, scale):
        cost, valid = problems(rng, share=1.0)
        cost = cost / jnp.abs(cost).max() * scale
        assert ops.check_costs(cost, valid).all()
        totals(cost, valid, JITTED[name](cost, valid))


def test_sinkhorn_names_its_limits(rng):
    cost, valid = problems(rng)
    with pytest.raises(ValueError, match=r"epsilon=0.0 and iterations=200; expected epsilon in \(0, 1\]"):
        ops.sinkhorn(cost, valid, epsilon=0.0)
    with pytest.raises(ValueError, match=r"iterations=0"):
        ops.sinkhorn(cost, valid, iterations=0)


def test_matchers_by_name():
    assert ops.matcher_by_name("hungarian") is ops.hungarian
    with pytest.raises(UnknownNameError, match=r"matcher 'hungarain' does not exist; nearest: hungarian"):
        ops.matcher_by_name("hungarain")


class TestBenchmark:
    def test_refuses_cases_that_make_no_sense(self):
        assert benchmark.parse_case("48x100x90:7") == (48, 100, 90, 7)
        assert benchmark.parse_case("8x100x20").valid is None
        with pytest.raises(argparse.ArgumentTypeError, match=r"'8x100' is not PROBLEMSxQUERIESxTARGETS"):
            benchmark.parse_case("8x100")
        with pytest.raises(argparse.ArgumentTypeError, match="valid <= targets <= queries"):
            benchmark.parse_case("8x20x100")

    @pytest.mark.slow
    def test_writes_a_row_for_each_matcher_and_finds_exact_ones_exact(self, tmp_path, capsys):
        benchmark.main(["--case", "3x6x4:2", "--rounds", "1", "--csv", str(tmp_path / "table.csv")])
        with (tmp_path / "table.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["matcher"] for row in rows] == list(benchmark.contestants())
        above = {row["matcher"]: float(row["above_optimum"]) for row in rows}
        assert all(abs(above[name]) < 1e-4 for name in above if name not in ("greedy", "sinkhorn"))
        assert "3x6x4, about 2 valid | hungarian" in capsys.readouterr().out
