"""Schedules against closed forms and optax, their composition, and the errors about senseless values."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eqvision import optim
from eqvision.names import UnknownNameError
from eqvision.optim import make_schedule
from eqvision.recipes import ScheduleConfig


def values(schedule, steps):
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(steps)), np.float64)


@pytest.mark.parametrize(
    ("kind", "warmup", "expected"),
    [
        ("constant", 0, {0: 2.0, 5: 2.0, 99: 2.0}),
        ("constant", 4, {0: 0.5, 1: 1.0, 3: 2.0, 4: 2.0, 50: 2.0}),
        ("linear", 0, {0: 2.0, 25: 1.5, 75: 0.5, 100: 0.0}),
        ("linear", 20, {0: 0.1, 9: 1.0, 19: 2.0, 20: 2.0, 60: 1.0, 100: 0.0}),
        ("cosine", 0, {0: 2.0, 25: 1 + np.sqrt(0.5), 50: 1.0, 100: 0.0}),
        ("cosine", 20, {0: 0.1, 19: 2.0, 20: 2.0, 40: 1 + np.sqrt(0.5), 60: 1.0, 100: 0.0}),
        ("cosine", 1, {0: 2.0, 1: 2.0}),
        ("polynomial", 20, {0: 0.1, 20: 2.0, 60: 0.5, 100: 0.0}),
        ("step", 20, {19: 2.0, 49: 2.0, 50: 0.2, 74: 0.2, 75: 0.02, 99: 0.02}),
        ("cosine_restarts", 10, {0: 0.2, 10: 2.0, 25: 1.0, 40: 2.0, 70: 2.0, 100: 0.0}),
        ("rsqrt", 20, {0: 0.1, 20: 2.0, 100: 2.0 * math.sqrt(10_000 / 10_080)}),
    ],
)
def test_values_worked_out_by_hand(kind, warmup, expected):
    schedule = make_schedule(ScheduleConfig(kind=kind, warmup_steps=warmup), 2.0, 100)
    for step, rate in expected.items():
        assert float(schedule(step)) == pytest.approx(rate, abs=1e-6), step


ORACLES = {
    "linear": (ScheduleConfig(kind="linear", end_fraction=0.1), optax.linear_schedule(3.0, 0.3, 90)),
    "cosine": (ScheduleConfig(kind="cosine", end_fraction=0.1), optax.cosine_decay_schedule(3.0, 90, alpha=0.1)),
    "polynomial": (
        ScheduleConfig(kind="polynomial", power=3.0, end_fraction=0.2),
        optax.polynomial_schedule(3.0, 0.6, 3.0, 90),
    ),
    "step": (
        ScheduleConfig(kind="step", milestones=(1 / 3, 0.6), factor=0.5),
        optax.piecewise_constant_schedule(3.0, {30: 0.5, 54: 0.5}),
    ),
    "cosine_restarts": (
        ScheduleConfig(kind="cosine_restarts", num_cycles=3, end_fraction=0.2),
        optax.join_schedules([optax.cosine_decay_schedule(3.0, 30, alpha=0.2)] * 3, [30, 60]),
    ),
    "rsqrt": (ScheduleConfig(kind="rsqrt", timescale=7), lambda step: 3.0 * (1 + step / 7) ** -0.5),
}


@pytest.mark.parametrize("kind", ORACLES)
def test_kinds_equal_optax(kind):
    config, oracle = ORACLES[kind]
    np.testing.assert_allclose(values(make_schedule(config, 3.0, 90), 90), values(oracle, 90), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["linear", "cosine", "cosine_restarts", "polynomial", "rsqrt"])
def test_warmup_moves_the_start_of_the_kind(kind):
    """Without milestones, which count from the start of the run."""
    late = values(make_schedule(ScheduleConfig(kind=kind, warmup_steps=10), 3.0, 100), 100)
    np.testing.assert_allclose(late[:10], 3.0 * np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(
        late[10:], values(make_schedule(ScheduleConfig(kind=kind), 3.0, 90), 90), rtol=1e-5, atol=1e-7
    )


def test_a_restarted_cosine_begins_each_cycle_at_the_peak_at_any_length():
    for total in (90, 97, 3_001, 900_000):
        schedule = optim.cosine_restarts(total, num_cycles=7)
        for cycle in range(1, 7):
            first = -(-total * cycle // 7)
            assert float(schedule(first)) > 0.98, (total, cycle)
            assert float(schedule(first - 1)) < 0.03, (total, cycle)


def test_warmup_stable_decay():
    config = ScheduleConfig(kind="constant", warmup_steps=10, cooldown_steps=20)
    rates = values(make_schedule(config, 2.0, 100), 101)
    expected = 2.0 * np.minimum(
        np.minimum((np.arange(101) + 1) / 10, 1.0), np.minimum((100 - np.arange(101)) / 20, 1.0)
    )
    np.testing.assert_allclose(rates, expected, rtol=1e-6)
    assert rates[0] > 0
    assert rates[99] > 0
    assert rates[100] == 0


def test_cooldown_multiplies_the_kind():
    config = ScheduleConfig(kind="rsqrt", timescale=50, warmup_steps=10)
    with_cooldown = dataclasses.replace(config, cooldown_steps=40)
    plain, cooled = values(make_schedule(config, 1.0, 100), 100), values(make_schedule(with_cooldown, 1.0, 100), 100)
    np.testing.assert_allclose(cooled, plain * np.minimum((100 - np.arange(100)) / 40, 1.0), rtol=1e-6)


def test_product_of_factors_is_what_the_configuration_makes():
    config = ScheduleConfig(kind="rsqrt", timescale=20, warmup_steps=8, cooldown_steps=12)
    factors = (optim.constant(0.3), optim.warmup(8), optim.rsqrt(start=8, timescale=20), optim.cooldown(60, 12))
    composed = optim.product(*factors)
    np.testing.assert_array_equal(values(composed, 60), values(make_schedule(config, 0.3, 60), 60))
    assert optim.product(optax.constant_schedule(3.0), lambda step: 0.5)(7) == 1.5


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "cosine_restarts", "polynomial", "step", "rsqrt"])
def test_schedules_stay_within_the_run_and_are_float32_scalars(kind):
    schedule = make_schedule(ScheduleConfig(kind=kind, warmup_steps=5, cooldown_steps=5), 1.0, 50)
    rates = values(schedule, 200)
    assert np.all((rates >= 0) & (rates <= 1))
    assert np.all(rates[50:] == 0)  # after the cooldown
    for step in (3, np.int64(3), jnp.int32(3)):
        assert schedule(step).dtype == jnp.float32
        assert schedule(step).shape == ()


def refused(config, total=100, peak=1e-3):
    with pytest.raises(ValueError, match=r".") as raised:
        make_schedule(config, peak, total)
    return str(raised.value)


def test_senseless_values_are_refused():
    assert "--schedule.warmup-steps is -1" in refused(ScheduleConfig(warmup_steps=-1))
    assert "--schedule.cooldown-steps is -3" in refused(ScheduleConfig(cooldown_steps=-3))
    for milestones in ((), (0.0, 0.5), (0.5, 1.0), (0.7, 0.3), (0.5, 0.5), (30.0, 60.0)):
        assert f"milestones are {milestones}" in refused(ScheduleConfig(kind="step", milestones=milestones))
    assert "rising shares" in refused(ScheduleConfig(kind="step", milestones=(0.7, 0.3)))
    assert "factor is 0" in refused(ScheduleConfig(kind="step", factor=0.0))
    assert "end_fraction is 1.5" in refused(ScheduleConfig(kind="linear", end_fraction=1.5))
    assert "power is 0" in refused(ScheduleConfig(kind="polynomial", power=0.0))
    assert "timescale is 0" in refused(ScheduleConfig(kind="rsqrt", timescale=0))
    assert "num_cycles is 0" in refused(ScheduleConfig(kind="cosine_restarts", num_cycles=0))
    assert "training steps is 0" in refused(ScheduleConfig(), total=0)
    for peak in (-1.0, math.nan, math.inf):
        assert f"--optimizer.learning-rate is {peak}" in refused(ScheduleConfig(), peak=peak)


@pytest.mark.parametrize("kind", ["cosine", "linear", "rsqrt", "constant"])
def test_a_run_shorter_than_its_warmup_only_rises(kind):
    """A short trial of a recipe must not be refused for its warm-up."""
    rates = values(make_schedule(ScheduleConfig(kind=kind, warmup_steps=200), 1.0, 100), 100)
    np.testing.assert_allclose(rates, (np.arange(100) + 1) / 200, rtol=1e-6)


def test_a_warmup_of_the_whole_run_is_legal():
    rates = values(make_schedule(ScheduleConfig(warmup_steps=10), 1.0, 10), 10)
    np.testing.assert_allclose(rates, np.arange(1, 11) / 10, rtol=1e-6)


def test_unknown_kind_lists_the_nearest(unchecked):
    with pytest.raises(UnknownNameError, match=r"--schedule.kind 'cosin' does not exist; nearest: cosine") as raised:
        make_schedule(ScheduleConfig(kind="cosin"), 1.0, 100)  # pyright: ignore[reportArgumentType]
    assert "cosine_restarts" in str(raised.value)


def test_product_of_nothing_is_refused():
    with pytest.raises(ValueError, match="got no schedule"):
        optim.product()


# The average of the parameters


def test_ema_decay_rises_to_its_value():
    decays = [float(optim.ema_decay(0.99, step)) for step in (0, 80, 10_000)]
    np.testing.assert_allclose(decays, [0.1, 0.9, 0.99], rtol=1e-6)
    assert float(optim.ema_decay(0.99, 0, warmup=False)) == pytest.approx(0.99)
    assert float(jax.jit(lambda step: optim.ema_decay(0.99, step))(80)) == pytest.approx(0.9)
    with pytest.raises(ValueError, match=r"--optimizer.ema is 1.0; expected a decay in \[0, 1\)"):
        optim.ema_decay(1.0, 0)


def test_update_ema_is_the_weighted_mean(rng):
    trees = [{"a": jnp.asarray(rng.normal(size=(5,)), jnp.float32), "b": jnp.ones((2,)) * i} for i in range(4)]
    ema, oracle = trees[0], optax.ema(0.75, debias=False)
    state = oracle.init(trees[0])._replace(ema=trees[0])
    for tree in trees[1:]:
        ema = jax.jit(optim.update_ema)(ema, tree, optim.ema_decay(0.75, 0, warmup=False))
        expected, state = oracle.update(tree, state)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), ema, expected)


def test_update_ema_leaves_what_does_not_change_bit_for_bit_and_keeps_its_type(rng):
    same = {"a": jnp.asarray(rng.normal(size=(1000,)), jnp.float32)}
    for decay in (0.1, 0.9, 0.999):
        np.testing.assert_array_equal(optim.update_ema(same, same, decay)["a"], same["a"])
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), same)
    assert optim.update_ema(same, half, 0.5)["a"].dtype == jnp.float32
    assert optim.update_ema(half, same, jnp.float32(0.5))["a"].dtype == jnp.bfloat16
