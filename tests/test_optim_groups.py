"""Parameter groups by name, freezing, layer-wise decay on real models, and the table."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eqvision import create
from eqvision.names import UnknownNameError
from eqvision.optim import (
    frozen_mask,
    layer_factors,
    make_optimizer,
    make_schedule,
    parameter_settings,
    parameter_table,
)
from eqvision.recipes import OptimizerConfig, ScheduleConfig


def abstract(name, image_size=32):
    return jax.eval_shape(lambda: create(name, image_size=image_size, key=jax.random.key(0))[0])


@pytest.fixture(scope="module")
def vit():
    return abstract("vit_ti4")


def toy(rng):
    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "backbone": {
            "blocks": {"fc": {"weight": normal(2, 4, 4), "bias": normal(2, 4)}},
            "norm": {"weight": normal(4)},
        },
        "head": {"linear": {"weight": normal(4, 3), "bias": normal(3)}},
    }


def updates_of(config, params, grads):
    optimizer = make_optimizer(config, make_schedule(ScheduleConfig(kind="constant"), config.learning_rate, 1))
    state = optimizer.init(params)
    return jax.jit(optimizer.update)(grads, state, params)[0], state


SGD = {"name": "sgd", "learning_rate": 0.1, "momentum": 0.0, "clip_norm": None}


def test_the_first_pattern_that_matches_counts(rng, assert_close):
    params = toy(rng)
    grads = jax.tree.map(jnp.ones_like, params)
    config = OptimizerConfig(
        **SGD, weight_decay=0.0, learning_rate_multipliers={r"^head\..*bias$": 3.0, "head": 2.0, "blocks|bias": 0.5}
    )
    updates, _ = updates_of(config, params, grads)
    factors = {"backbone": {"blocks": {"fc": {"weight": 0.5, "bias": 0.5}}, "norm": {"weight": 1.0}}}
    factors["head"] = {"linear": {"weight": 2.0, "bias": 3.0}}
    assert_close(updates, jax.tree.map(lambda f, g: -0.1 * f * g, factors, grads), 1e-6)


def test_weight_decays_replace_the_one_of_matrices(rng, assert_close):
    params = toy(rng)
    zeros = jax.tree.map(jnp.zeros_like, params)
    config = OptimizerConfig(**SGD, weight_decay=0.3, weight_decays={"norm": 0.2, "head": 0.0})
    updates, _ = updates_of(config, params, zeros)
    decays = {"backbone": {"blocks": {"fc": {"weight": 0.3, "bias": 0.0}}, "norm": {"weight": 0.2}}}
    decays["head"] = {"linear": {"weight": 0.0, "bias": 0.0}}
    assert_close(updates, jax.tree.map(lambda d, p: -0.1 * d * p, decays, params), 1e-6)


def test_weight_decays_reach_optimizers_by_name(rng, assert_close):
    params = toy(rng)
    grads = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params)
    options = {"weight_decays": {"norm": 0.2, "head": 0.0}, "weight_decay": 0.3, "learning_rate": 0.1}
    ours, _ = updates_of(OptimizerConfig(name="adamw", **options), params, grads)
    by_name, _ = updates_of(OptimizerConfig(name="adamaxw", **options), params, grads)
    plain, _ = updates_of(OptimizerConfig(name="adamaxw", weight_decay=0.0, learning_rate=0.1), params, grads)
    adam, _ = updates_of(OptimizerConfig(name="adamw", weight_decay=0.0, learning_rate=0.1), params, grads)
    difference = lambda a, b: jax.tree.map(jnp.subtract, a, b)  # noqa: E731
    assert_close(difference(by_name, plain), difference(ours, adam), 1e-4)


def test_frozen_parameters_do_not_move_have_no_state_and_do_not_count_in_the_norm(rng):
    params = toy(rng)
    grads = jax.tree.map(jnp.ones_like, params)
    grads["backbone"] = jax.tree.map(lambda leaf: 100 * leaf, grads["backbone"])
    config = OptimizerConfig(name="sgd", learning_rate=1.0, weight_decay=0.1, clip_norm=1.0, freeze=("^backbone",))
    updates, state = updates_of(config, params, grads)
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(updates["backbone"]))
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(state))
    assert sizes == [1, 3, 12]  # the step, and the momentum of the head alone
    np.testing.assert_allclose(updates["head"]["linear"]["bias"], -1.9 / np.sqrt(15), rtol=1e-6)
    mask = frozen_mask(config, params)
    assert all(jax.tree.leaves(mask["backbone"]))
    assert not any(jax.tree.leaves(mask["head"]))


@pytest.mark.parametrize("name", ["adamw", "lamb", "lion", "muon", "adafactor", "nadamw", "lars"])
def test_freezing_leaves_the_rest_as_if_it_were_alone(name, rng, assert_close):
    params = toy(rng)
    grads = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params)
    config = OptimizerConfig(name=name, clip_adaptive=0.1, freeze=("head",))
    updates, state = updates_of(config, params, grads)
    alone, _ = updates_of(
        OptimizerConfig(name=name, clip_adaptive=0.1), {"backbone": params["backbone"]}, {"backbone": grads["backbone"]}
    )
    assert_close(updates["backbone"], alone["backbone"], 1e-6)
    assert not any(leaf.shape in ((4, 3), (3,)) and leaf.ndim == 2 for leaf in jax.tree.leaves(state))
    applied = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(applied["head"]["linear"]["weight"], params["head"]["linear"]["weight"])


def message_of(error, params, **options):
    with pytest.raises(error, match=r".") as raised:
        parameter_settings(OptimizerConfig(**options), params)
    return str(raised.value)


def test_patterns_without_a_match_list_near_names(vit):
    message = message_of(UnknownNameError, vit, freeze=("backbon.patch",))
    assert "--optimizer.freeze: a parameter that matches 'backbon.patch' does not exist; nearest: " in message
    assert "backbone.patch_embed" in message
    message = message_of(UnknownNameError, vit, learning_rate_multipliers={"head": 10.0, "atention": 0.1})
    assert "--optimizer.learning-rate-multipliers" in message
    assert "'atention'" in message
    assert "attention" in message.split("nearest:")[1]
    assert "--optimizer.weight-decays" in message_of(UnknownNameError, vit, weight_decays={"hed": 0.1})


def test_senseless_groups_are_refused(vit):
    message = message_of(ValueError, vit, freeze=("(head",))
    assert "--optimizer.freeze: '(head' is no regular expression: missing )" in message
    assert "freezes all 25 parameters; leave some to train" in message_of(ValueError, vit, freeze=("head", "."))
    message = message_of(ValueError, {"weight": jnp.ones((2, 2))}, layer_decay=0.5)
    assert "--optimizer.layer-decay 0.5: the model has no blocks" in message
    assert "learning_rate_multipliers" in message


def test_the_optimizer_raises_them_when_it_sees_the_parameters(rng):
    optimizer = make_optimizer(OptimizerConfig(freeze=("hed",)), optax.constant_schedule(0.1))
    with pytest.raises(UnknownNameError, match="'hed' does not exist; nearest: head"):
        optimizer.init(toy(rng))


def exponents(params):
    """How many layers lie above each parameter: the exponents of the factors."""
    return {name: [round(-np.log2(f)) for f in factors] for name, factors in layer_factors(params, 0.5).items()}


def test_layers_of_a_vit(vit):
    above = exponents(vit)
    for name in ("patch_embed.weight", "patch_embed.bias", "position.weight", "class_token", "class_position"):
        assert above[f"backbone.{name}"] == [13]
    for name in ("norm1.weight", "attention.query.weight", "mlp.fc2.bias"):
        assert above[f"backbone.encoder.blocks.{name}"] == list(range(12, 0, -1))
    for name in ("backbone.norm.weight", "head.linear.weight", "head.linear.bias"):
        assert above[name] == [0]


def test_layers_of_a_resnet():
    above = exponents(abstract("resnet18"))
    assert above["backbone.stem.conv.weight"] == above["backbone.stem.norm.bias"] == [9]
    blocks = [above[f"backbone.stages.{stage}.{block}.convs.0.conv.weight"] for stage in range(4) for block in range(2)]
    assert blocks == [[8], [7], [6], [5], [4], [3], [2], [1]]
    assert above["backbone.stages.1.0.projection.conv.weight"] == [6]
    assert above["head.linear.weight"] == [0]


def test_layers_of_stages_with_a_first_block_and_a_stack():
    above = exponents(abstract("bit_r50x1"))
    assert above["backbone.stem.weight"] == [17]
    assert above["backbone.stages.0.first.conv1.weight"] == [16]
    assert above["backbone.stages.0.rest.conv1.weight"] == [15, 14]
    assert above["backbone.stages.2.rest.norm3.bias"] == [8, 7, 6, 5, 4]
    assert above["backbone.stages.3.rest.conv3.weight"] == [2, 1]
    assert above["backbone.norm.weight"] == above["head.linear.bias"] == [0]


def test_layers_of_a_hybrid_go_through_the_stem_to_the_transformer():
    above = exponents(abstract("vit_s_r26_s32", 64))
    assert above["backbone.stem.root.conv.weight"] == [21]
    assert above["backbone.stem.stages.0.first.conv1.conv.weight"] == [20]
    assert above["backbone.stem.stages.3.rest.conv1.conv.weight"] == [13]
    assert above["backbone.vit.patch_embed.weight"] == [13]
    assert above["backbone.vit.encoder.blocks.norm1.weight"] == list(range(12, 0, -1))
    assert above["backbone.vit.norm.weight"] == [0]


@pytest.mark.parametrize(
    "name", ["mixer_s32", "small_cnn", "mlp", "axial_resnet26", "vit_b16_big_vision", "resnet20_cifar"]
)
def test_every_family_has_an_order(name):
    above = exponents(abstract(name, 224 if "32" in name or "16" in name or "axial" in name else 32))
    assert above["head.linear.weight"] == [0]
    depth = max(max(layers) for layers in above.values())
    used = {layer for layers in above.values() for layer in layers}
    assert used >= set(range(depth + 1)) - {depth}
    assert all(layers == sorted(layers, reverse=True) for layers in above.values())


def test_layer_decay_scales_each_layer_of_a_stack(rng):
    params = toy(rng)
    grads = jax.tree.map(jnp.ones_like, params)
    config = OptimizerConfig(**SGD, weight_decay=0.0, layer_decay=0.5, learning_rate_multipliers={"fc.weight": 10.0})
    updates, _ = updates_of(config, params, grads)
    fc = updates["backbone"]["blocks"]["fc"]
    np.testing.assert_allclose(fc["weight"][0], -0.25, rtol=1e-6)
    np.testing.assert_allclose(fc["weight"][1], -0.5, rtol=1e-6)
    np.testing.assert_allclose(fc["bias"][:, 0], [-0.025, -0.05], rtol=1e-6)
    np.testing.assert_allclose(updates["head"]["linear"]["weight"], -0.1, rtol=1e-6)


# The table


def test_table_of_a_vit(vit):
    config = OptimizerConfig(
        weight_decay=0.05,
        layer_decay=0.75,
        freeze=("patch_embed",),
        learning_rate_multipliers={"^head": 10.0},
        weight_decays={r"norm1\.weight": 0.01},
    )
    lines = parameter_table(config, vit).splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert len(lines) == 27  # header, 25 leaves (stacks once), totals
    assert rows["backbone.patch_embed.weight"] == ["4x4x3x192", "9,216", "-", "-", "frozen"]
    assert rows["backbone.encoder.blocks.mlp.fc1.weight"] == ["12x192x768", "1,769,472", "0.0317..0.75", "0.05", "yes"]
    assert rows["backbone.encoder.blocks.norm1.weight"] == ["12x192", "2,304", "0.0317..0.75", "0.01", "yes"]
    assert rows["backbone.norm.bias"] == ["192", "192", "1", "0", "yes"]
    assert rows["head.linear.weight"] == ["192x1000", "192,000", "10", "0.05", "yes"]
    count = sum(leaf.size for leaf in jax.tree.leaves(vit))
    assert lines[-1] == f"{count - 9408:,} parameters train, 9,408 are frozen"
    starts = {line.index(word) for line, word in ((lines[0], "shape"), (lines[1], "4x4x3x192"))}
    assert len(starts) == 1  # aligned


def test_table_puts_equal_blocks_of_a_resnet_into_one_row():
    table = parameter_table(OptimizerConfig(freeze=("stages.0",)), abstract("resnet20_cifar"))
    lines = table.splitlines()
    convs = [line.split() for line in lines if line.startswith("backbone.stages.*.*.convs.*.conv.weight")]
    assert [line[1:4] for line in convs] == [["6", "x", "3x3x16x16"], ["12", "leaves", "of"]]
    assert convs[0][-1] == "frozen"
    assert convs[1][-1] == "yes"
    assert len(lines) < 20
    totals = [int(word.replace(",", "")) for word in lines[-1].split() if word[0].isdigit()]
    assert sum(totals) == sum(leaf.size for leaf in jax.tree.leaves(abstract("resnet20_cifar")))
    assert totals[1] == 6 * (3 * 3 * 16 * 16 + 32)
