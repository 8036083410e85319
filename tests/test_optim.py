"""Schedules, weight decay mask, clipping and update rules against values worked out by hand."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvision import create
from eqvision.optim import decay_mask, make_optimizer, make_schedule
from eqvision.recipes import OptimizerConfig, ScheduleConfig

# The optimizer


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
    ],
)
def test_schedules(kind, warmup, expected):
    schedule = make_schedule(ScheduleConfig(kind=kind, warmup_steps=warmup), 2.0, 100)
    for step, rate in expected.items():
        assert float(schedule(step)) == pytest.approx(rate, abs=1e-6), step


def decayed(name):
    mask = eqx.filter_eval_shape(lambda: decay_mask(create(name, key=jax.random.key(0))[0]))
    leaves = jax.tree_util.tree_leaves_with_path(mask)
    return {jax.tree_util.keystr(path, simple=True, separator=".") for path, masked in leaves if masked}


def test_weight_decay_reaches_exactly_the_matrices_of_a_vit():
    attention = {f"backbone.encoder.blocks.attention.{name}.weight" for name in ("query", "key", "value", "out")}
    mlp = {f"backbone.encoder.blocks.mlp.{name}.weight" for name in ("fc1", "fc2")}
    assert decayed("vit_ti16") == attention | mlp | {"backbone.patch_embed.weight", "head.linear.weight"}


def test_weight_decay_reaches_exactly_the_convolutions_of_a_resnet():
    convs = {
        f"backbone.stages.{stage}.{block}.convs.{conv}.conv.weight"
        for stage in range(3)
        for block in range(3)
        for conv in range(2)
    }
    assert decayed("resnet20_cifar") == convs | {"backbone.stem.conv.weight", "head.linear.weight"}


def test_weight_decay_reaches_exactly_the_matrices_of_a_mixer():
    mlps = {f"backbone.blocks.{mlp}.{layer}.weight" for mlp in ("token_mlp", "channel_mlp") for layer in ("fc1", "fc2")}
    assert decayed("mixer_s32") == mlps | {"backbone.patch_embed.weight", "head.linear.weight"}


def test_weight_decay_leaves_out_the_norms_of_stacked_blocks():
    assert not [name for name in decayed("bit_r50x1") if "norm" in name]


@dataclasses.dataclass
class Matrix:
    """Parameters with the names that weight decay looks at."""

    weight: jax.Array
    bias: jax.Array


jax.tree_util.register_dataclass(Matrix, ["weight", "bias"], [])


def first_update(config, gradient: float):
    params = Matrix(jnp.full((2, 2), 3.0), jnp.full((2,), 3.0))
    grads = jax.tree.map(lambda p: jnp.full(p.shape, gradient), params)
    optimizer = make_optimizer(config, make_schedule(ScheduleConfig(kind="constant"), config.learning_rate, 1))
    return optimizer.update(grads, optimizer.init(params), params)[0]


def test_sgd_clips_the_global_norm_and_then_adds_l2_and_nesterov_momentum():
    config = OptimizerConfig(name="sgd", learning_rate=0.1, weight_decay=0.01, momentum=0.9, clip_norm=1.0)
    update = first_update(config, 5.0)
    clipped = 1 / np.sqrt(6)  # six equal entries of norm 1
    np.testing.assert_allclose(update.weight, -0.1 * 1.9 * (clipped + 0.01 * 3), rtol=1e-6)
    np.testing.assert_allclose(update.bias, -0.1 * 1.9 * clipped, rtol=1e-6)


def test_clip_norm_none_and_small_gradients_are_not_clipped():
    for clip, gradient in ((None, 5.0), (1.0, 0.1)):
        config = OptimizerConfig(name="sgd", learning_rate=1.0, weight_decay=0.0, momentum=0.0, clip_norm=clip)
        np.testing.assert_allclose(first_update(config, gradient).weight, -gradient, rtol=1e-6)


def test_adamw_decays_apart_from_the_gradient():
    update = first_update(OptimizerConfig(name="adamw", learning_rate=0.1, weight_decay=0.01), 0.2)
    np.testing.assert_allclose(update.weight, -0.1 * (1 + 0.01 * 3), rtol=1e-5)
    np.testing.assert_allclose(update.bias, -0.1, rtol=1e-5)
