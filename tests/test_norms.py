"""Normalisation: equal to PyTorch, equal on one device and eight, hand-written gradients equal to automatic ones."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from eqvision.layers import (
    BatchNorm,
    Conv,
    FrozenBatchNorm,
    GroupNorm,
    LayerNorm,
    Linear,
    RMSNorm,
    batch_norm,
    layer_norm,
)

CHANNELS = 5
# With mean 100 and std 1 the output inherits the rounding of the mean, a float32 sum of n values of 100: about
# 100 * 2^-24 * sqrt(n) / 3 = 5e-5 absolute for n = 648. Statistics from E[x^2] - E[x]^2 would be off by 1e-3.
FAR_MEAN_TOLERANCE = 2e-5
# The gradient of the weight sums (x - mean) * g, so it takes that rounding once for every pixel.
FAR_MEAN_GRADIENT_TOLERANCE = 1e-4


def draw(*shape, seed=0, mean=0.5, std=2.0):
    return (mean + std * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def affine(layer, seed=7):
    """The layer with weight and bias away from 1 and 0."""
    weight, bias = jnp.asarray(draw(CHANNELS, seed=seed, mean=1.0, std=0.3)), jnp.asarray(draw(CHANNELS, seed=seed + 1))
    return eqx.tree_at(lambda leaf: (leaf.weight, leaf.bias), layer, (weight, bias))


def make_batch_norm(**options):
    layer, state = eqx.nn.make_with_state(BatchNorm)(CHANNELS, **options)
    return affine(layer), state


def copy(state):
    """Equinox refuses to use a state twice, unless it is a copy."""
    return jax.tree.map(lambda leaf: leaf, state)


def torch_norm(module, layer):
    """Give the torch module the layer's parameters."""
    import torch

    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(np.array(layer.weight)))
        if getattr(layer, "bias", None) is not None:
            module.bias.copy_(torch.from_numpy(np.array(layer.bias)))
    return module


def to_torch(x, requires_grad=False):
    import torch

    first = np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1))
    return torch.from_numpy(first).requires_grad_(requires_grad)


def from_torch(x):
    return np.moveaxis(x.detach().numpy(), 1, -1)


# --- batch norm against torch ---------------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("momentum", [0.1, 0.01])
def test_batch_norm_equals_torch_over_steps_and_in_evaluation(assert_close, momentum):
    import torch

    layer, state = make_batch_norm(momentum=momentum)
    oracle = torch_norm(torch.nn.BatchNorm2d(CHANNELS, momentum=momentum), layer)
    step = jax.jit(lambda x, state: layer(x, state, train=True))
    for number in range(4):
        x = draw(6, 7, 8, CHANNELS, seed=number, mean=number)
        y, state = step(jnp.asarray(x), state)
        assert_close(y, from_torch(oracle(to_torch(x))), 1e-6)
        expected = (oracle.running_mean.numpy(), oracle.running_var.numpy())
        assert_close(state.get(layer.stats), expected, 1e-6)
    x = draw(6, 7, 8, CHANNELS, seed=9)
    y, after = layer(jnp.asarray(x), state)
    assert_close(y, from_torch(oracle.eval()(to_torch(x))), 1e-6)
    assert_close(after.get(layer.stats), state.get(layer.stats), 0.0)


@pytest.mark.parity
@pytest.mark.parametrize("shape", [(12,), (4, 6), (3, 2, 4, 5)])
def test_batch_norm_equals_torch_for_every_rank(assert_close, shape):
    import torch

    layer, state = make_batch_norm()
    oracle = torch.nn.BatchNorm3d if len(shape) == 4 else torch.nn.BatchNorm1d
    x = draw(*shape, CHANNELS)
    y, _ = layer(jnp.asarray(x), state, train=True)
    assert_close(y, from_torch(torch_norm(oracle(CHANNELS), layer)(to_torch(x))), 1e-6)


@pytest.mark.parity
def test_batch_norm_keeps_its_digits_where_the_mean_is_large(assert_close):
    import torch

    layer, state = make_batch_norm()
    x = draw(8, 9, 9, CHANNELS, mean=100.0, std=1.0)
    oracle = torch_norm(torch.nn.BatchNorm2d(CHANNELS), layer).double()
    expected = from_torch(oracle(to_torch(x).double()))
    y, after = layer(jnp.asarray(x), state, train=True)
    assert_close(y, expected, FAR_MEAN_TOLERANCE)
    mean, variance = after.get(layer.stats)
    assert_close(mean, oracle.running_mean.numpy(), 1e-6)
    assert_close(variance, oracle.running_var.numpy(), 1e-6)


@pytest.mark.parity
@pytest.mark.parametrize(("mean", "tolerance"), [(0.5, 1e-6), (100.0, FAR_MEAN_GRADIENT_TOLERANCE)])
@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_gradient_equals_torch(assert_close, train, mean, tolerance):
    import torch

    layer, state = make_batch_norm()
    state = state.set(layer.stats, (jnp.full(CHANNELS, mean - 0.5, jnp.float32), jnp.full(CHANNELS, 1.7, jnp.float32)))
    oracle = torch_norm(torch.nn.BatchNorm2d(CHANNELS), layer).double().train(train)
    oracle.running_mean.fill_(mean - 0.5)
    oracle.running_var.fill_(1.7)
    x, cotangent = draw(6, 5, 4, CHANNELS, mean=mean, std=1.0), draw(6, 5, 4, CHANNELS, seed=3)
    x_torch = to_torch(x.astype(np.float64), requires_grad=True)
    oracle(x_torch).backward(to_torch(cotangent.astype(np.float64)))
    gradient = jax.grad(lambda layer, x: jnp.vdot(layer(x, state, train=train)[0], cotangent), argnums=(0, 1))
    g_layer, g_x = gradient(layer, jnp.asarray(x))
    assert_close(g_x, from_torch(x_torch.grad), tolerance)
    assert_close(g_layer.weight, oracle.weight.grad.numpy(), tolerance)
    assert_close(g_layer.bias, oracle.bias.grad.numpy(), tolerance)


@pytest.mark.parity
def test_batch_norm_fine_tunes_from_published_statistics(assert_close):
    import torch

    layer, state = make_batch_norm()
    published = draw(CHANNELS, seed=4), np.abs(draw(CHANNELS, seed=5))
    oracle = torch_norm(torch.nn.BatchNorm2d(CHANNELS), layer)
    oracle.running_mean.copy_(torch.from_numpy(published[0]))
    oracle.running_var.copy_(torch.from_numpy(published[1]))
    state = state.set(layer.stats, tuple(jnp.asarray(part) for part in published))
    x = draw(4, 6, 6, CHANNELS)
    y, state = layer(jnp.asarray(x), state, train=True)
    assert_close(y, from_torch(oracle(to_torch(x))), 1e-6)
    assert_close(state.get(layer.stats), (oracle.running_mean.numpy(), oracle.running_var.numpy()), 1e-6)


def test_batch_norm_in_bfloat16_keeps_statistics_in_float32(assert_close):
    layer, state = make_batch_norm()
    x = jnp.asarray(draw(8, 6, 6, CHANNELS), jnp.bfloat16)
    y, after = layer(x, copy(state), train=True)
    expected, expected_after = layer(x.astype(jnp.float32), copy(state), train=True)
    assert y.dtype == jnp.bfloat16
    assert all(part.dtype == jnp.float32 for part in after.get(layer.stats))
    assert_close(y, expected, 2**-8)
    assert_close(after.get(layer.stats), expected_after.get(layer.stats), 1e-6)
    assert layer(x, state)[0].dtype == jnp.bfloat16


def test_batch_norm_of_one_value_per_channel_is_finite():
    layer, state = make_batch_norm()
    y, after = layer(jnp.asarray(draw(1, CHANNELS)), state, train=True)
    assert np.isfinite(y).all()
    assert all(np.isfinite(part).all() for part in after.get(layer.stats))


# --- one device and eight -------------------------------------------------------------------------------------------


def norm_step(layer, state, x, cotangent, axes=()):
    """Output, gradients of x and the layer, new statistics; the loss is the global sum of y * cotangent."""

    def loss(layer, x):
        y, new_state = layer(x, state, train=True)
        total = jnp.vdot(y, cotangent)
        return (lax.psum(total, axes) if axes else total), (y, new_state)

    (_, (y, new_state)), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(layer, x)
    return y, gradients, new_state.get(layer.stats)


@pytest.mark.parametrize("axes", [("data",), ("data", "fsdp")])
@pytest.mark.parametrize(("mean", "tolerance"), [(0.5, 1e-6), (100.0, FAR_MEAN_TOLERANCE)])
def test_batch_norm_under_shard_map_equals_one_device(assert_close, axes, mean, tolerance):
    shape = (8,) if len(axes) == 1 else (4, 2)
    mesh = jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(axes))
    layer, state = make_batch_norm()
    # Another distribution on every device, so that local statistics would not do.
    x = draw(16, 4, 3, CHANNELS, mean=mean) + (np.arange(16, dtype=np.float32) // 2)[:, None, None, None]
    # Correlated with x: the gradients of weight and bias are then sums whose terms do not cancel.
    cotangent = draw(16, 4, 3, CHANNELS, seed=2, mean=1.0) + (x - x.mean())
    split = P(axes)
    sharded = jax.shard_map(
        lambda layer, state, x, cotangent: norm_step(layer, state, x, cotangent, axes),
        mesh=mesh,
        in_specs=(P(), P(), split, split),
        out_specs=(split, (P(), split), P()),
    )
    expected = jax.jit(norm_step)(layer, state, x, cotangent)
    assert_close(jax.jit(sharded)(layer, state, x, cotangent), expected, tolerance)


def test_batch_norm_under_plain_jit_with_a_split_batch_equals_one_device(assert_close, mesh):
    layer, state = make_batch_norm()
    x, cotangent = draw(16, 4, 3, CHANNELS), draw(16, 4, 3, CHANNELS, seed=2)
    expected = jax.jit(norm_step)(layer, state, x, cotangent)
    split = jax.device_put((x, cotangent), NamedSharding(mesh, P("data")))
    assert_close(jax.jit(norm_step)(layer, state, *split), expected, 1e-6)


@pytest.mark.parametrize("make", [LayerNorm, RMSNorm])
def test_token_norms_under_shard_map_equal_one_device(assert_close, mesh, make):
    layer, x, cotangent = make(CHANNELS), draw(16, 3, CHANNELS), draw(16, 3, CHANNELS, seed=2)

    def step(layer, x, cotangent, axes=()):
        def loss(layer, x):
            total = jnp.vdot(layer(x), cotangent)
            return lax.psum(total, axes) if axes else total

        return layer(x), jax.grad(loss, argnums=(0, 1))(layer, x)

    sharded = jax.shard_map(
        lambda *inputs: step(*inputs, axes=("data",)),
        mesh=mesh,
        in_specs=(P(), P("data"), P("data")),
        out_specs=(P("data"), (P(), P("data"))),
    )
    assert_close(jax.jit(sharded)(layer, x, cotangent), jax.jit(step)(layer, x, cotangent), 1e-6)


class Net(eqx.Module):
    """Convolution, batch norm, relu, mean over pixels, linear."""

    conv: Conv
    norm: BatchNorm
    fc: Linear

    def __init__(self, key):
        keys = jax.random.split(key)
        self.conv = Conv(3, 8, 3, key=keys[0])
        self.norm = BatchNorm(8)
        self.fc = Linear(8, 4, key=keys[1])

    def __call__(self, x, state):
        x, state = self.norm(self.conv(x), state, train=True)
        return self.fc(jnp.mean(jax.nn.relu(x), axis=(1, 2))), state


def train_step(net, state, opt_state, x, labels, axes=()):
    def loss(net):
        logits, new_state = net(x, state)
        value = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
        return (lax.pmean(value, axes) if axes else value), new_state

    (value, new_state), gradients = jax.value_and_grad(loss, has_aux=True)(net)
    updates, opt_state = optax.adamw(1e-3).update(gradients, opt_state, net)
    return optax.apply_updates(net, updates), new_state, opt_state, value


def five_steps(step, net, state):
    opt_state, values = optax.adamw(1e-3).init(net), []
    for number in range(5):
        x = draw(16, 6, 6, 3, seed=number)
        labels = np.random.default_rng(number).integers(0, 4, 16)
        net, state, opt_state, value = step(net, state, opt_state, x, labels)
        values.append(value)
    return net, state.get(net.norm.stats), values


def test_five_adamw_steps_on_eight_devices_equal_one(assert_close, key, mesh):
    net, state = eqx.nn.make_with_state(Net)(key)
    sharded = jax.shard_map(
        lambda *inputs: train_step(*inputs, axes=("data",)),
        mesh=mesh,
        in_specs=(P(), P(), P(), P("data"), P("data")),
        out_specs=P(),
    )
    expected = five_steps(jax.jit(train_step), net, state)
    assert_close(five_steps(jax.jit(sharded), net, state), expected, 1e-6)
    moved = jax.tree.map(lambda new, old: float(jnp.max(jnp.abs(new - old))), expected[0], net)
    assert min(jax.tree.leaves(moved)) > 1e-3


# --- hand-written gradients -----------------------------------------------------------------------------------------


def plain_layer_norm(x, weight, bias, eps):
    mean = jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean((x - mean) ** 2, axis=-1, keepdims=True)
    return (x - mean) / jnp.sqrt(variance + eps) * weight + bias


def plain_batch_norm(x, weight, bias, eps):
    leading = tuple(range(x.ndim - 1))
    mean = jnp.mean(x, axis=leading)
    variance = jnp.mean((x - mean) ** 2, axis=leading)
    return (x - mean) / jnp.sqrt(variance + eps) * weight + bias


def hand_batch_norm(x, weight, bias, eps):
    return batch_norm(x, weight, bias, eps, ())[0]


PAIRS = {"layer_norm": (layer_norm, plain_layer_norm), "batch_norm": (hand_batch_norm, plain_batch_norm)}


def once(norm):
    return lambda x, weight, bias: norm(x, weight[0], bias[0], 1e-5)


def scanned(norm):
    def run(x, weight, bias):
        return lax.scan(lambda y, layer: (jnp.sin(norm(y, *layer, 1e-5)) + y, None), x, (weight, bias))[0]

    return run


def checkpointed(norm):
    @jax.checkpoint
    def run(x, weight, bias):
        return jnp.sin(norm(jnp.sin(norm(x, weight[0], bias[0], 1e-5)), weight[1], bias[1], 1e-5))

    return run


def scanned_and_checkpointed(norm):
    return scanned(jax.checkpoint(norm, static_argnums=3))


def value_and_pullback(function, inputs, cotangent):
    y, pullback = jax.vjp(function, *inputs)
    return y, pullback(cotangent)


@pytest.mark.parametrize("wrap", [once, scanned, checkpointed, scanned_and_checkpointed])
@pytest.mark.parametrize("name", list(PAIRS))
def test_hand_written_gradient_equals_automatic_one_in_float64(assert_close, name, wrap):
    hand, plain = PAIRS[name]
    with jax.enable_x64(True):
        x, cotangent = (jnp.asarray(draw(3, 4, 2, CHANNELS, seed=seed), jnp.float64) for seed in (0, 1))
        weight, bias = (jnp.asarray(draw(3, CHANNELS, seed=seed), jnp.float64) for seed in (2, 3))
        run = lambda norm: jax.jit(lambda *inputs: value_and_pullback(wrap(norm), inputs, cotangent))(x, weight, bias)  # noqa: E731
        assert run(hand)[0].dtype == jnp.float64
        assert_close(run(hand), run(plain), 1e-10)


def test_layer_norm_gradient_under_vmap_equals_automatic_one(assert_close):
    """Over examples with shared parameters, and over a stack of parameters."""
    with jax.enable_x64(True):
        x, cotangent = (jnp.asarray(draw(3, 4, CHANNELS, seed=seed), jnp.float64) for seed in (0, 1))
        weight, bias = (jnp.asarray(draw(3, CHANNELS, seed=seed), jnp.float64) for seed in (2, 3))

        def run(norm, axis, *inputs):
            mapped = jax.vmap(lambda x, weight, bias: norm(x, weight, bias, 1e-5), in_axes=(0, axis, axis))
            gradient = jax.grad(lambda *i: jnp.sum(jnp.sin(norm(*i, 1e-5))), argnums=(0, 1, 2))
            return value_and_pullback(mapped, inputs, cotangent), jax.vmap(gradient, (0, axis, axis))(*inputs)

        for axis, inputs in ((None, (x, weight[0], bias[0])), (0, (x, weight, bias))):
            assert_close(run(layer_norm, axis, *inputs), run(plain_layer_norm, axis, *inputs), 1e-10)


def test_no_gradient_flows_into_the_returned_statistics():
    x, ones = jnp.asarray(draw(6, CHANNELS)), jnp.ones(CHANNELS)
    gradient = jax.grad(lambda x: sum(jnp.sum(part) for part in batch_norm(x, ones, ones, 1e-5, ())[1:]))(x)
    np.testing.assert_array_equal(gradient, 0)


# --- the other norms ------------------------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1e-2])
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_token_norms_equal_torch(assert_close, name, eps):
    import torch

    layer = {"LayerNorm": LayerNorm, "RMSNorm": RMSNorm}[name](CHANNELS, eps=eps)
    layer = eqx.tree_at(lambda leaf: leaf.weight, layer, jnp.asarray(draw(CHANNELS, seed=6)))
    if name == "LayerNorm":
        layer = affine(layer)
    oracle = torch_norm(getattr(torch.nn, name)(CHANNELS, eps=eps), layer)
    x, cotangent = draw(4, 7, CHANNELS), draw(4, 7, CHANNELS, seed=1)
    x_torch = torch.from_numpy(x).requires_grad_()
    y_torch = oracle(x_torch)
    y_torch.backward(torch.from_numpy(cotangent))
    g_layer, g_x = jax.grad(lambda layer, x: jnp.vdot(layer(x), cotangent), argnums=(0, 1))(layer, jnp.asarray(x))
    assert_close(layer(jnp.asarray(x)), y_torch.detach().numpy(), 1e-6)
    assert_close((g_x, g_layer.weight), (x_torch.grad.numpy(), oracle.weight.grad.numpy()), 1e-6)


@pytest.mark.parity
@pytest.mark.parametrize("shape", [(6, 5), (9,), (2, 3, 4)])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_group_norm_equals_torch(assert_close, groups, shape):
    import torch

    layer = GroupNorm(8, num_groups=groups)
    weight, bias = jnp.asarray(draw(8, seed=4)), jnp.asarray(draw(8, seed=5))
    layer = eqx.tree_at(lambda leaf: (leaf.weight, leaf.bias), layer, (weight, bias))
    oracle = torch_norm(torch.nn.GroupNorm(groups, 8), layer)
    x, cotangent = draw(3, *shape, 8), draw(3, *shape, 8, seed=1)
    x_torch = to_torch(x, requires_grad=True)
    y_torch = oracle(x_torch)
    y_torch.backward(to_torch(cotangent))
    g_layer, g_x = jax.grad(lambda layer, x: jnp.vdot(layer(x), cotangent), argnums=(0, 1))(layer, jnp.asarray(x))
    assert_close(layer(jnp.asarray(x)), from_torch(y_torch), 1e-6)
    expected = from_torch(x_torch.grad), oracle.weight.grad.numpy(), oracle.bias.grad.numpy()
    assert_close((g_x, g_layer.weight, g_layer.bias), expected, 1e-6)


def frozen(state_values):
    layer = affine(FrozenBatchNorm(CHANNELS))
    return eqx.tree_at(lambda leaf: (leaf.running_mean, leaf.running_var), layer, state_values)


@pytest.mark.parity
@pytest.mark.parametrize("train", [True, False])
def test_frozen_batch_norm_equals_torch_in_evaluation(assert_close, train):
    import torch

    statistics = jnp.asarray(draw(CHANNELS, seed=2)), jnp.abs(draw(CHANNELS, seed=3))
    layer, x = frozen(statistics), draw(3, 4, 5, CHANNELS)
    oracle = torch_norm(torch.nn.BatchNorm2d(CHANNELS), layer).eval()
    oracle.running_mean.copy_(torch.tensor(np.array(statistics[0])))
    oracle.running_var.copy_(torch.tensor(np.array(statistics[1])))
    y, _ = layer(jnp.asarray(x), empty_state(), train=train)
    assert_close(y, from_torch(oracle(to_torch(x))), 1e-6)


def empty_state():
    """The state of a model without statistics."""
    return eqx.nn.make_with_state(Linear)(1, 1, key=jax.random.key(0))[1]


def test_frozen_batch_norm_trains_nothing_but_passes_the_gradient_on(assert_close):
    layer = frozen((jnp.zeros(CHANNELS), jnp.full(CHANNELS, 4.0)))
    x, state = jnp.asarray(draw(3, 2, 2, CHANNELS)), empty_state()
    g_layer, g_x = jax.grad(lambda layer, x: jnp.sum(layer(x, state, train=True)[0]), argnums=(0, 1))(layer, x)
    for leaf in jax.tree.leaves(g_layer):
        np.testing.assert_array_equal(leaf, 0)
    assert_close(g_x, jnp.broadcast_to(layer.weight / jnp.sqrt(4.0 + 1e-5), x.shape), 1e-6)


def test_group_norm_refuses_groups_of_unequal_size():
    with pytest.raises(ValueError, match="6 channels cannot be split into 4 equal groups"):
        GroupNorm(6, num_groups=4)


@pytest.mark.parametrize("make", [LayerNorm, RMSNorm, lambda width: GroupNorm(width, num_groups=2)])
def test_statistics_of_bfloat16_input_are_float32(assert_close, make):
    """Mean 20, spread 1: bfloat16 statistics would be off by a tenth."""
    layer = make(8)
    x = jnp.asarray(draw(4, 6, 8, mean=20.0, std=1.0), jnp.bfloat16)
    y = layer(x)
    assert y.dtype == jnp.bfloat16
    assert_close(y, layer(x.astype(jnp.float32)), 2**-8)
    gradient = jax.grad(lambda layer: jnp.sum(layer(x).astype(jnp.float32)))(layer)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradient))
