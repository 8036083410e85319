"""Update rules against optax, stacks against their layers, clipping, and arrays that are split over devices."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from optim_trees import Matrix, optimizer_of, restacked, toy_gradients, toy_params, train, unstacked

from eqvision import create, optim
from eqvision.optim import decay_mask, make_schedule
from eqvision.recipes import OptimizerConfig, ScheduleConfig

OWN = ("adamw", "sgd", "lamb", "lion", "muon", "adafactor")


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


def first_update(config, gradient: float):
    params = Matrix(jnp.full((2, 2), 3.0), jnp.full((2,), 3.0))
    grads = jax.tree.map(lambda p: jnp.full(p.shape, gradient), params)
    optimizer = optimizer_of(config)
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


def weights_only(params):
    return jax.tree.map_with_path(lambda path, leaf: leaf.ndim >= 2, params)


ORACLES = {
    "adamw": lambda mask: optax.adamw(1e-2, weight_decay=0.1, mask=mask),
    "sgd": lambda mask: optax.chain(optax.add_decayed_weights(0.1, mask), optax.sgd(1e-2, momentum=0.9, nesterov=True)),
    "lamb": lambda mask: optax.lamb(1e-2, weight_decay=0.1, mask=mask),
    "lion": lambda mask: optax.lion(1e-2, b2=0.99, weight_decay=0.1, mask=mask),
    "adafactor": lambda mask: optax.chain(
        optax.scale_by_factored_rms(
            min_dim_size_to_factor=32,
            decay_rate_fn=lambda step, rate: jnp.minimum(0.999, 1 - (jnp.float32(step) + 1) ** -rate),
        ),
        optax.ema(0.9, debias=False, accumulator_dtype=jnp.bfloat16),
        optax.add_decayed_weights(0.1, mask),
        optax.scale_by_learning_rate(1e-2),
    ),
}


@pytest.mark.parametrize("name", ORACLES)
def test_rules_equal_optax_on_unstacked_trees(name, rng, assert_close):
    params = unstacked(toy_params(rng))
    gradients = toy_gradients(params, rng)
    config = OptimizerConfig(name=name, learning_rate=1e-2, weight_decay=0.1, clip_norm=1.0)
    actual, _ = train(optimizer_of(config), params, gradients)
    oracle = optax.chain(optax.clip_by_global_norm(1.0), ORACLES[name](weights_only))
    assert_close(actual, train(oracle, params, gradients)[0], 2e-6)


def test_muon_equals_optax_in_blocks_and_adamw_elsewhere(rng, assert_close):
    params = unstacked(toy_params(rng))
    gradients = toy_gradients(params, rng)
    config = OptimizerConfig(name="muon", learning_rate=1e-2, weight_decay=0.1, clip_norm=None)
    actual, _ = train(optimizer_of(config), params, gradients)

    def dimensions(tree):
        def leaf(path, x):
            in_blocks = "blocks" in jax.tree_util.keystr(path)
            if not in_blocks or x.ndim < 2:
                return None
            return optax.contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), x.ndim - 1)

        return jax.tree.map_with_path(leaf, tree)

    oracle = optax.contrib.muon(1e-2, weight_decay=0.1, consistent_rms=0.2, muon_weight_dimension_numbers=dimensions)
    expected, _ = train(oracle, params, gradients)
    for actual_layer, layer in zip(actual["backbone"]["blocks"], expected["backbone"]["blocks"], strict=True):
        for name in ("fc1", "conv"):
            assert_close(actual_layer[name]["weight"], layer[name]["weight"], 1e-5)
    by_adamw, _ = train(optax.adamw(1e-2, weight_decay=0.1, mask=weights_only), params, gradients)
    assert_close(actual["head"], by_adamw["head"], 1e-6)
    assert_close(actual["backbone"]["patch_embed"], by_adamw["backbone"]["patch_embed"], 1e-6)
    assert_close(actual["backbone"]["blocks"][0]["norm"], by_adamw["backbone"]["blocks"][0]["norm"], 1e-6)


def test_muon_makes_each_layer_orthogonal(rng):
    params = toy_params(rng)
    config = OptimizerConfig(name="muon", learning_rate=1.0, weight_decay=0.0, clip_norm=None)
    optimizer = optimizer_of(config)
    updates, _ = optimizer.update(toy_gradients(params, rng, 1)[0], optimizer.init(params), params)
    for layer in np.asarray(updates["backbone"]["blocks"]["fc1"]["weight"]):
        values = np.linalg.svd(layer, compute_uv=False) / (0.2 * np.sqrt(40))
        assert values.min() > 0.5
        assert values.max() < 1.5  # five Newton-Schulz steps bring them near 1 and no nearer
    rms = np.sqrt(np.mean(np.square(updates["backbone"]["blocks"]["conv"]["weight"])))
    assert 0.1 < rms < 0.3


@pytest.mark.parametrize("name", [*OWN, "lars", "fromage", "novograd", "nadamw"])
def test_a_stack_trains_as_its_layers_do(name, rng, assert_close):
    params = toy_params(rng)
    gradients = toy_gradients(params, rng, 3)
    decay = 0.0 if name == "fromage" else 0.05
    config = OptimizerConfig(name=name, learning_rate=1e-2, weight_decay=decay, clip_adaptive=0.5, layer_decay=0.5)
    actual, _ = train(optimizer_of(config), params, gradients)
    expected, _ = train(optimizer_of(config), unstacked(params), [unstacked(grads) for grads in gradients])
    assert_close(actual, restacked(expected), 1e-5)


def test_adafactor_clips_layers_caps_the_decay_and_shifts_its_steps(rng, assert_close):
    params = toy_params(rng)
    gradients = toy_gradients(params, rng)
    ours = optim.scale_by_adafactor(beta2_cap=0.4, clipping_threshold=0.7, momentum=None, decay_offset=-3)
    oracle = optax.chain(
        optax.scale_by_factored_rms(
            min_dim_size_to_factor=32,
            step_offset=-3,
            decay_rate_fn=lambda step, rate: jnp.minimum(0.4, 1 - (jnp.float32(step) + 1) ** -rate),
        ),
        optax.clip_by_block_rms(0.7),
    )
    actual, _ = train(ours, params, gradients)
    expected, _ = train(oracle, unstacked(params), [unstacked(grads) for grads in gradients])
    assert_close(actual, restacked(expected), 1e-5)


def test_adafactor_keeps_rows_and_columns_of_each_layer_and_momentum_in_bf16(rng):
    params = toy_params(rng)
    moments, momentum = optim.scale_by_adafactor().init(params)
    blocks = lambda tree: tree["backbone"]["blocks"]  # noqa: E731
    assert blocks(moments.row)["fc1"]["weight"].shape == (2, 32)
    assert blocks(moments.column)["fc1"]["weight"].shape == (2, 40)
    assert blocks(moments.full)["fc1"]["weight"] is None
    assert blocks(moments.full)["norm"]["weight"].shape == (2, 32)
    assert blocks(moments.full)["conv"]["weight"].shape == (2, 3, 3, 8, 32)  # 8 channels are too few to factor
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(momentum.ema))
    assert len(optimizer_of(OptimizerConfig(name="adafactor", momentum=0.0)).init(params)[1]) == 1


# Clipping


def test_clip_value_comes_before_the_norm():
    config = OptimizerConfig(
        name="sgd", learning_rate=1.0, weight_decay=0.0, momentum=0.0, clip_value=0.2, clip_norm=None
    )
    np.testing.assert_allclose(first_update(config, 5.0).weight, -0.2)
    np.testing.assert_allclose(first_update(config, -0.1).weight, 0.1)
    both = dataclasses.replace(config, clip_norm=0.1)
    np.testing.assert_allclose(first_update(both, 5.0).weight, -0.1 / np.sqrt(6), rtol=1e-6)


def test_adaptive_clipping_equals_optax_on_matrices_convolutions_and_vectors(rng, assert_close):
    params = {"linear": (8, 16), "conv": (3, 3, 4, 8), "bias": (16,), "zero": (4, 4)}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in params.items()}
    params["zero"] = jnp.zeros((4, 4))
    grads = toy_gradients(params, rng, 1)[0]
    actual, _ = optim.clip_adaptive(0.3).update(grads, optax.EmptyState(), params)
    expected, _ = optax.adaptive_grad_clip(0.3).update(grads, optax.EmptyState(), params)
    assert_close(actual, expected, 1e-6)
    norms = np.linalg.norm(actual["linear"], axis=0) / np.linalg.norm(params["linear"], axis=0)
    assert norms.max() == pytest.approx(0.3, rel=1e-5)


def test_adaptive_clipping_treats_layers_alone_and_leaves_the_head(rng, assert_close):
    params = toy_params(rng)
    grads = toy_gradients(params, rng, 1)[0]
    clip = optim.clip_adaptive(0.2)
    actual, _ = clip.update(grads, optax.EmptyState(), params)
    by_layer, _ = clip.update(unstacked(grads), optax.EmptyState(), unstacked(params))
    assert_close(actual, restacked(by_layer), 1e-6)
    np.testing.assert_array_equal(actual["head"]["linear"]["weight"], grads["head"]["linear"]["weight"])
    assert np.all(
        np.abs(actual["backbone"]["patch_embed"]["weight"]) <= np.abs(grads["backbone"]["patch_embed"]["weight"])
    )
    assert not np.allclose(actual["backbone"]["patch_embed"]["weight"], grads["backbone"]["patch_embed"]["weight"])


# Programs and devices


def test_the_default_adds_nothing_to_optax_adamw(rng):
    params = toy_params(rng)
    ours = optimizer_of(OptimizerConfig())
    schedule = make_schedule(ScheduleConfig(kind="constant"), 1e-3, 1)
    theirs = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=1e-4, mask=decay_mask))

    def equations(optimizer):
        jaxpr = jax.make_jaxpr(optimizer.update)(params, optimizer.init(params), params)
        return sorted(str(equation.primitive) for equation in jaxpr.eqns)

    assert equations(ours) == equations(theirs)
    shapes = lambda optimizer: [leaf.shape for leaf in jax.tree.leaves(optimizer.init(params))]  # noqa: E731
    assert shapes(ours) == shapes(theirs)


@pytest.mark.parametrize("name", ["adamw", "lamb", "muon", "adafactor"])  # the others work element by element
def test_sharded_parameters_train_as_those_on_one_device(name, rng, mesh, assert_close):
    params = toy_params(rng)
    gradients = toy_gradients(params, rng, 2)
    config = OptimizerConfig(
        name=name,
        learning_rate=1e-2,
        weight_decay=0.1,
        clip_adaptive=0.5,
        layer_decay=0.7,
        freeze=("patch_embed",),
        learning_rate_multipliers={"head": 2.0},
    )
    optimizer = optimizer_of(config)
    expected, _ = train(optimizer, params, gradients)

    def place(tree):
        return jax.device_put(tree, jax.tree.map(lambda leaf: NamedSharding(mesh, last_axis(leaf)), tree))

    def last_axis(leaf):
        return P(*(None,) * (leaf.ndim - 1), "data")

    actual, state = train(optimizer, place(params), [place(grads) for grads in gradients])
    assert_close(actual, expected, 1e-5)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("name", OWN)
def test_optax_finds_the_parameters_inside_the_state(name, rng):
    params = toy_params(rng)
    optimizer = optimizer_of(OptimizerConfig(name=name, layer_decay=0.5, weight_decays={"head": 0.0}, freeze=("norm",)))
    state = optimizer.init(params)
    marked = optax.tree.map_params(
        optimizer, lambda leaf: "parameter", state, transform_non_params=lambda leaf: "other"
    )
    leaves = jax.tree.leaves(marked)
    assert leaves.count("parameter") >= 5
    assert leaves.count("other") >= 1


@pytest.mark.parametrize("model", ["vit_ti4", "resnet20_cifar", "bit_r50x1"])
@pytest.mark.parametrize("name", [*OWN, "lars"])
def test_real_models_with_every_option(name, model):
    """Shapes only: nothing is compiled."""
    params = jax.eval_shape(lambda: create(model, image_size=32, key=jax.random.key(0))[0])
    config = OptimizerConfig(
        name=name,
        clip_value=1.0,
        clip_adaptive=0.01,
        learning_rate_multipliers={r"^head\.": 10.0},
        weight_decays={"norm": 0.01},
        freeze=("patch_embed|stem",),
        layer_decay=0.75,
    )
    optimizer = optimizer_of(config)
    state = jax.eval_shape(optimizer.init, params)
    updates, new = jax.eval_shape(optimizer.update, params, state, params)
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)  # noqa: E731
    assert shapes(updates) == shapes(params)
    assert shapes(new) == shapes(state)


def test_presets_are_what_big_vision_trains_with(rng):
    optimizer, schedule = optim.adafactor_vit_g()
    assert optimizer.weight_decay * optimizer.learning_rate == pytest.approx(0.03 * 8e-4)
    settings = optim.parameter_settings(optimizer, toy_params(rng))
    assert settings["head.linear.weight"].weight_decay == pytest.approx(
        100 * settings["backbone.blocks.fc1.weight"].weight_decay
    )
    rate = make_schedule(schedule, optimizer.learning_rate, 1_000_000)
    assert float(rate(10_000)) == pytest.approx(8e-4)
    assert float(rate(40_000)) == pytest.approx(4e-4)
    assert optim.adafactor_stable().beta2 == 0.95
