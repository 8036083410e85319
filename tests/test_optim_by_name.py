"""Optimizers of optax by their names there, the options that reach them, and the errors about options."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optim_trees import Matrix, optimizer_of, toy_gradients, toy_params, train

from eqvision import optim
from eqvision.names import UnknownNameError
from eqvision.optim import decay_mask
from eqvision.recipes import OptimizerConfig


@pytest.mark.parametrize("name", optim.optimizer_names())
def test_every_optimizer_of_optax_takes_a_step(name, rng):
    params = {"layer": Matrix(jnp.asarray(rng.normal(size=(4, 4)), jnp.float32), jnp.ones((4,)))}
    config = OptimizerConfig(name=name, learning_rate=0.1, weight_decay=0.0)
    new, _ = train(optimizer_of(config), params, toy_gradients(params, rng, 2), jit=lambda update: update)
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(new), strict=True):
        assert np.all(np.isfinite(after))
        assert np.any(before != after)


def test_options_reach_optax_under_its_own_names(rng, assert_close):
    params = toy_params(rng)
    gradients = toy_gradients(params, rng)
    cases = [
        (OptimizerConfig(name="rmsprop", momentum=0.5, beta2=0.8, eps=1e-3, weight_decay=0.0),
         optax.rmsprop(0.1, decay=0.8, eps=1e-3, momentum=0.5)),
        (OptimizerConfig(name="nadamw", momentum=0.7, beta2=0.9, weight_decay=0.2),
         optax.nadamw(0.1, b1=0.7, b2=0.9, weight_decay=0.2, mask=decay_mask)),
        (OptimizerConfig(name="adan", weight_decay=0.0), optax.adan(0.1)),
        (OptimizerConfig(name="contrib.ademamix", weight_decay=0.1),
         optax.contrib.ademamix(0.1, weight_decay=0.1, mask=decay_mask)),
    ]  # fmt: skip
    for config, oracle in cases:
        config = dataclasses.replace(config, learning_rate=0.1, clip_norm=None)
        assert_close(train(optimizer_of(config), params, gradients)[0], train(oracle, params, gradients)[0], 1e-6)


def refused(error=ValueError, **options):
    with pytest.raises(error, match=r".") as raised:
        optimizer_of(OptimizerConfig(**options))
    return str(raised.value)


def test_options_that_an_optimizer_does_not_take_are_named():
    message = refused(name="adam")
    assert "optax.adam takes no weight_decay (0.0001 given); it takes b1, b2, eps" in message
    assert "--optimizer.weight-decay 0" in message
    message = refused(name="sign_sgd", momentum=0.9, eps=1e-3, weight_decay=0.0)
    assert "no momentum (0.9 given) and no eps (0.001 given)" in message
    assert "weight_decay (3.0 given)" in refused(name="adam", weight_decay=0.0, weight_decays={"head": 3.0})
    assert "'sgd' takes no beta2 and no eps; it takes momentum" in refused(name="sgd", beta2=0.9, eps=1e-8)


def test_unknown_and_unsupported_optimizers():
    assert "--optimizer.name 'adamv' does not exist; nearest: adam" in refused(UnknownNameError, name="adamv")
    assert "muon" in refused(UnknownNameError, name="mouon")
    assert "takes no schedule" in refused(name="sm3")
    assert "'lbfgs' of optax does not work here: it searches along a line" in refused(name="lbfgs")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"momentum": 1.0}, "--optimizer.momentum is 1.0; expected a decay in [0, 1)"),
        ({"beta2": -0.1}, "--optimizer.beta2 is -0.1"),
        ({"ema": 1.0}, "--optimizer.ema is 1.0"),
        ({"eps": 0.0}, "--optimizer.eps is 0.0; expected a positive number"),
        ({"clip_norm": 0.0}, "--optimizer.clip-norm is 0.0"),
        ({"clip_value": -1.0}, "--optimizer.clip-value is -1.0"),
        ({"clip_adaptive": float("nan")}, "--optimizer.clip-adaptive is nan"),
        ({"layer_decay": 1.5}, "--optimizer.layer-decay is 1.5; expected a factor in (0, 1]"),
        ({"weight_decay": -1e-4}, "--optimizer.weight-decay is -0.0001"),
        ({"weight_decays": {"my_head": -1.0}}, "--optimizer.weight-decays 'my_head' is -1.0"),
        ({"learning_rate_multipliers": {"head": 0.0}}, "--optimizer.learning-rate-multipliers 'head' is 0.0; expected"),
    ],
)
def test_values_out_of_range_are_refused(options, words):
    assert words in refused(**options)
