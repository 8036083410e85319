"""Parameters held in parts: the rules, the bytes, and a training step that equals the replicated one."""

import functools
import re
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import eqvision
import eqvision.layers
from benchmarks import scaling
from eqvision.backbones.vit import VisionTransformer, ViTSize
from eqvision.losses import weighted_mean
from eqvision.mesh import BATCH, make_mesh
from eqvision.recipes import MeshConfig
from eqvision.sharding import (
    constrain,
    device_bytes,
    gather,
    matching_rule,
    parameter_specs,
    sharded_call,
    sharded_value_and_grad,
    sharding_table,
    shardings,
    state_shardings,
    state_specs,
)

FSDP, MIXED, MODEL, ALL = (MeshConfig(fsdp=8), MeshConfig(fsdp=4), MeshConfig(model=2), MeshConfig(fsdp=2, model=2))
MESHES = pytest.mark.parametrize("config", [FSDP, MIXED, MODEL, ALL], ids=["fsdp8", "data2-fsdp4", "model2", "2x2x2"])
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, eps=1e-6))


class TinyViT(eqx.Module):
    """Two blocks with four heads, for which every rule splits something."""

    backbone: VisionTransformer
    head: eqvision.layers.Linear

    def __init__(self, key):
        size = ViTSize(width=32, depth=2, num_heads=4, mlp_dim=64)
        self.backbone = VisionTransformer(size, 4, image_size=8, key=key)
        self.head = eqvision.layers.Linear(32, 8, key=jax.random.fold_in(key, 1))

    def __call__(self, images, state, *, train=False, key=None):
        features, state = self.backbone(images, state, train=train, key=key)
        return self.head(features.patches.mean(axis=(1, 2))), state


@functools.cache
def vit():
    return eqx.nn.make_with_state(TinyViT)(jax.random.key(0))


@functools.cache
def resnet():
    return eqvision.create("resnet20_cifar", num_classes=8, image_size=8, key=jax.random.key(0))


@functools.cache
def abstract(name):
    return jax.eval_shape(lambda: eqvision.create(name, key=jax.random.key(0))[0])


def by_name(specs):
    leaves = jax.tree_util.tree_leaves_with_path(specs)
    return {jax.tree_util.keystr(path, simple=True, separator="."): spec for path, spec in leaves}


# Rules


def test_transformer_rules_split_columns_then_rows():
    specs = by_name(parameter_specs(vit()[0], make_mesh(ALL), min_size=64))
    blocks = "backbone.encoder.blocks"
    for name in ("attention.query", "attention.key", "attention.value", "mlp.fc1"):
        assert specs[f"{blocks}.{name}.weight"] == P(None, "fsdp", "model")
        assert specs[f"{blocks}.{name}.bias"] == P(None, "model")
    for name in ("attention.out", "mlp.fc2"):
        assert specs[f"{blocks}.{name}.weight"] == P(None, "model", "fsdp")
    assert specs[f"{blocks}.norm1.weight"] == P(None, "fsdp")
    assert specs["backbone.patch_embed.weight"] == P(None, None, None, "fsdp")


def test_the_largest_axis_that_fsdp_divides_is_split_and_never_the_depth():
    tree = {
        "blocks": {"w": jnp.zeros((64, 8, 16))},
        "stages": [{"rest": {"w": jnp.zeros((64, 3, 8))}}],
        "blocks_in_a_list": {"blocks": [jnp.zeros((64, 8))]},
        "conv": jnp.zeros((3, 3, 16, 32)),
        "odd": jnp.zeros((24, 1001)),
        "square": jnp.zeros((64, 64)),
        "none": jnp.zeros((63, 63)),
        "scalar": jnp.zeros(()),
    }
    specs = parameter_specs(tree, make_mesh(FSDP), min_size=1)
    assert specs["blocks"]["w"] == P(None, None, "fsdp")
    assert specs["stages"][0]["rest"]["w"] == P(None, None, "fsdp")
    assert specs["blocks_in_a_list"]["blocks"][0] == P("fsdp")
    assert specs["conv"] == P(None, None, None, "fsdp")
    assert specs["odd"] == P("fsdp")
    assert specs["square"] == P(None, "fsdp")
    assert specs["none"] == P()
    assert specs["scalar"] == P()


def test_small_leaves_and_axes_of_one_device_stay_whole():
    assert set(jax.tree.leaves(parameter_specs({"w": jnp.zeros((64, 64))}, make_mesh(FSDP)))) == {P()}
    assert not any(any(spec) for spec in jax.tree.leaves(parameter_specs(vit()[0], make_mesh(), min_size=1)))


def test_a_model_that_has_nothing_to_split_over_model_is_refused():
    with pytest.raises(ValueError, match=r"--mesh.model 2: no parameter of this model can be split .* use --mesh.fsdp"):
        parameter_specs(resnet()[0], make_mesh(MODEL))


def test_moments_and_averages_follow_their_parameter_and_nothing_else_does():
    model = vit()[0]
    mesh = make_mesh(FSDP)
    specs = parameter_specs(model, mesh, min_size=64)
    state = {"model": model, "ema": model, "opt": jax.eval_shape(OPTIMIZER.init, model), "step": jnp.zeros(())}
    state["factored"] = {"head": {"weight": jnp.zeros((32,))}}  # the name of a parameter, another shape
    found = state_specs(state, model, specs)
    assert jax.tree.leaves(found["model"]) == jax.tree.leaves(found["ema"]) == jax.tree.leaves(specs)
    adam = found["opt"][1][0]
    assert jax.tree.leaves(adam.mu) == jax.tree.leaves(adam.nu) == jax.tree.leaves(specs)
    assert adam.count == found["step"] == found["factored"]["head"]["weight"] == P()


def test_state_shardings_cover_every_optimizer_of_a_run():
    model, mesh = vit()[0], make_mesh(FSDP)
    masked = optax.multi_transform({"on": optax.adamw(1e-3), "off": optax.set_to_zero()}, lambda p: {"on": None} and (
        jax.tree.map_with_path(lambda path, _: "on" if "blocks" in str(path) else "off", p)))  # fmt: skip
    for optimizer in (optax.lamb(1e-3), optax.lion(1e-3), optax.contrib.muon(1e-3), optax.adafactor(1e-3), masked):
        abstract_state = jax.eval_shape(optimizer.init, model)
        where = state_shardings(abstract_state, model, mesh, min_size=64)
        assert jax.tree.structure(where) == jax.tree.structure(abstract_state)
        for leaf, sharding in zip(jax.tree.leaves(abstract_state), jax.tree.leaves(where), strict=True):
            sharding.shard_shape(leaf.shape)  # raises where the axes do not divide


# Bytes


@pytest.mark.parametrize("name", ["vit_b16", "resnet50", "mixer_b16"])
def test_fsdp_over_eight_devices_holds_at_most_a_seventh(name):
    model = abstract(name)
    state = {"model": model, "opt": jax.eval_shape(optax.adamw(1e-3).init, model)}
    parts, whole = (device_bytes(state, state_shardings(state, model, make_mesh(c))) for c in (FSDP, MeshConfig()))
    assert whole == 12 * sum(leaf.size for leaf in jax.tree.leaves(model)) + 4
    assert parts <= whole / 7


def test_bytes_are_those_of_the_buffers():
    model, mesh = vit()[0], make_mesh(ALL)
    where = shardings(parameter_specs(model, mesh, min_size=64), mesh)
    placed = jax.device_put(model, where)
    held = sum(leaf.addressable_shards[3].data.nbytes for leaf in jax.tree.leaves(placed))
    assert device_bytes(model, where) == held < 0.5 * sum(leaf.nbytes for leaf in jax.tree.leaves(model))


def test_the_table_shows_rules_leaves_and_totals():
    model, mesh = abstract("vit_b16"), make_mesh(ALL)
    lines = sharding_table(model, mesh).splitlines()
    assert lines[0].startswith("Mesh data=2, fsdp=2, model=2.")
    rows = [re.split(r"\s{2,}", line) for line in lines]
    (row,) = [row for row in rows if row[0].endswith("blocks.mlp.fc2.weight")]
    assert row[1:] == ["12x3072x768", "-, model, fsdp", "3", f"{12 * 3072 * 768:,}"]
    (row,) = [row for row in rows if row[0].endswith("class_token")]
    assert row[1:] == ["768", "replicated", "4", "3,072"]
    here, whole = (int(number.replace(",", "")) for number in re.findall(r"[\d,]{5,}", lines[-1]))
    assert whole == 4 * sum(leaf.size for leaf in jax.tree.leaves(model))
    assert here == device_bytes(model, shardings(parameter_specs(model, mesh), mesh))
    assert matching_rule("encoder.blocks.attention.out.weight").axes == ("model", "fsdp")


# The step


def loss_fn(model, batch, stats, key):
    images, labels, weights = batch
    outputs, stats = model(images, stats, train=True, key=key)
    return weighted_mean(optax.softmax_cross_entropy_with_integer_labels(outputs, labels), weights), stats


def toy_batch(mesh):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(16, 8, 8, 3)).astype(np.float32)
    weights = np.array([1.0] * 11 + [0.0] * 5, np.float32)  # some devices hold padding alone
    return jax.device_put((images, rng.integers(0, 8, 16), weights), NamedSharding(mesh, BATCH))


def start(build, config):
    """Mesh, specs, and the sharded state and its compiled step."""
    (model, stats), mesh = build(), make_mesh(config)
    specs = parameter_specs(model, mesh, min_size=64)
    state = (model, OPTIMIZER.init(model))
    where = state_shardings(state, model, mesh, min_size=64)
    value_and_grad = sharded_value_and_grad(loss_fn, mesh, specs)

    def step(state, batch, stats):
        (loss, stats), grads = value_and_grad(state[0], batch, stats, jax.random.key(1))
        updates, opt_state = OPTIMIZER.update(grads, state[1], state[0])
        return (eqx.apply_updates(state[0], updates), opt_state), stats, loss, grads

    state, stats = jax.device_put(state, where), jax.device_put(stats, NamedSharding(mesh, P()))
    batch = toy_batch(mesh)
    jitted = jax.jit(step, out_shardings=(where, None, None, where[0]))
    return jitted.lower(state, batch, stats).compile(), state, batch, stats


@functools.cache
def four_steps(build, config):
    """All that four AdamW steps leave; the gradient is that of the first."""
    step, state, batch, stats = start(build, config)
    first, losses = None, []
    for _ in range(4):
        state, stats, loss, grads = step(state, batch, stats)
        first = grads if first is None else first
        losses.append(loss)
    kept = [leaf.sharding.spec for leaf in jax.tree.leaves(state)]
    return jax.device_get((state, stats, losses, first)), kept


def assert_near(actual, expected, tolerance):
    """By the largest value of the whole tree: the gradient of a key's bias is zero but for rounding."""
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    scale = max(np.max(np.abs(leaf)) for leaf in expected)
    error = max(np.max(np.abs(a - e)) for a, e in zip(actual, expected, strict=True))
    assert error <= tolerance * scale, f"error {error:.3g}, scale {scale:.3g}"


def check_equal_to_replicated(build, config):
    (state, stats, losses, grads), kept = four_steps(build, config)
    (expected, expected_stats, expected_losses, expected_grads), _ = four_steps(build, MeshConfig())
    assert_near(grads, expected_grads, 1e-5)
    assert_near(losses, expected_losses, 1e-5)
    assert_near(state[0], expected[0], 1e-5)
    assert_near(state[1][1][0].mu, expected[1][1][0].mu, 1e-5)
    if jax.tree.leaves(stats):
        assert_near(stats, expected_stats, 1e-5)
    model = build()[0]
    where = state_shardings((model, OPTIMIZER.init(model)), model, make_mesh(config), min_size=64)
    assert kept == [sharding.spec for sharding in jax.tree.leaves(where)]


@MESHES
def test_a_vit_trains_as_if_replicated(config):
    check_equal_to_replicated(vit, config)


@pytest.mark.slow
@pytest.mark.parametrize("config", [FSDP, MIXED], ids=["fsdp8", "data2-fsdp4"])
def test_a_resnet_with_batch_norm_trains_as_if_replicated(config):
    check_equal_to_replicated(resnet, config)


def test_replicated_on_eight_devices_equals_plain_jax_on_one(assert_close):
    """The comparison above would not see an error that all meshes share."""
    (_, _, losses, grads), _ = four_steps(vit, MeshConfig())
    model, stats = vit()
    batch = toy_batch(make_mesh(num_devices=1))
    value, expected = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(model, batch, stats, jax.random.key(1))
    assert_near(grads, expected, 1e-5)
    assert_close(losses[0], value[0], 1e-6)


@pytest.mark.parametrize("config", [FSDP, ALL], ids=["fsdp8", "2x2x2"])
def test_the_compiled_step_scatters_gradients(config):
    scatters = re.compile(r" reduce-scatter\(")
    assert scatters.search(compiled_text(vit, config))
    assert not scatters.search(compiled_text(vit, MeshConfig()))


@functools.cache
def compiled_text(build, config):
    return str(start(build, config)[0].as_text())


@pytest.mark.parametrize("config", [MeshConfig(), FSDP, MIXED], ids=["data8", "fsdp8", "data2-fsdp4"])
@pytest.mark.parametrize("build", [vit, pytest.param(resnet, marks=pytest.mark.slow)], ids=["vit", "resnet"])
def test_the_analytic_collectives_are_those_of_the_compiled_step(build, config):
    expected, found = analytic_and_compiled(build, config)
    assert found["all-gather"] == expected.all_gather
    assert found["reduce-scatter"] == expected.reduce_scatter
    assert 0 <= found["all-reduce"] - expected.all_reduce <= 400  # the scalars of loss, weight and clipping
    assert set(found) <= {"all-gather", "reduce-scatter", "all-reduce"}


@pytest.mark.parametrize("config", [MODEL, ALL], ids=["model2", "2x2x2"])
def test_the_analytic_collectives_of_tensor_parallelism(config):
    """The compiler chooses these: what it adds to the sums that the method needs stays small."""
    expected, found = analytic_and_compiled(vit, config)
    assert found["reduce-scatter"] == expected.reduce_scatter
    assert expected.all_gather <= found["all-gather"] <= 1.05 * expected.all_gather + 4096
    assert expected.all_reduce <= found["all-reduce"] <= 1.05 * expected.all_reduce + 4096


def analytic_and_compiled(build, config):
    model, mesh = build()[0], make_mesh(config)
    specs = parameter_specs(model, mesh, min_size=64)
    images, tokens = 16 // (mesh.shape["data"] * mesh.shape["fsdp"]), 5
    expected = scaling.traffic(model, specs, mesh, images, tokens)
    return expected, scaling.collective_bytes(compiled_text(build, config), mesh.shape["fsdp"])


def test_gather_gives_the_whole_parameter_and_sums_its_gradient_once():
    mesh, value = make_mesh(ALL), jnp.arange(32.0).reshape(8, 4)
    specs = {"both": P("fsdp", "model"), "whole": P()}
    params = jax.device_put({"both": value, "whole": value}, shardings(specs, mesh))
    rows = jax.device_put(jnp.arange(4.0) + 1, NamedSharding(mesh, BATCH))

    def local_loss(params, rows):
        total = sum(jnp.sum(leaf) for leaf in params.values()) * jnp.sum(rows)
        return jax.lax.psum(total, ("data", "fsdp")), None

    (loss, _), grads = jax.jit(sharded_value_and_grad(local_loss, mesh, specs))(params, rows)
    assert float(loss) == 2 * 496 * 10
    for name, grad in grads.items():
        np.testing.assert_array_equal(grad, np.full((8, 4), 10.0))
        assert grad.sharding.spec == specs[name]


def test_an_answer_that_differs_between_devices_is_refused():
    mesh = make_mesh(FSDP)
    forgot_the_sum = lambda params, rows: (jnp.sum(params["w"] * rows[0]), None)  # noqa: E731
    with pytest.raises(ValueError, match="out_specs"):
        jax.eval_shape(sharded_value_and_grad(forgot_the_sum, mesh, {"w": P("fsdp")}), {"w": jnp.ones(8)}, jnp.ones(8))


def test_sharded_call_returns_rows_and_sums():
    mesh = make_mesh(ALL)
    model, stats = vit()
    specs = parameter_specs(model, mesh, min_size=64)
    images = toy_batch(mesh)[0]

    def evaluate(model, images, stats):
        outputs, _ = model(images, stats)
        return outputs, jax.lax.psum(outputs.sum(axis=0), ("data", "fsdp"))

    call = jax.jit(sharded_call(evaluate, mesh, specs, (BATCH, P())))
    rows, total = call(jax.device_put(model, shardings(specs, mesh)), images, stats)
    expected = jax.jit(lambda x: model(x, stats)[0])(np.asarray(images))
    assert_near(rows, expected, 1e-5)
    assert_near(total, np.asarray(expected).sum(axis=0), 1e-5)
    assert rows.sharding.spec == BATCH


def test_constrain_keeps_the_layout_under_jit():
    mesh = make_mesh(FSDP)
    specs = {"w": P("fsdp")}
    held = jax.jit(lambda tree: constrain(jax.tree.map(lambda x: x + 1, tree), specs, mesh))({"w": jnp.ones(8)})
    assert held["w"].sharding.spec == P("fsdp")


def test_gather_passes_what_is_not_split():
    leaf = jnp.ones(3)
    assert gather({"w": leaf}, {"w": P()})["w"] is leaf
