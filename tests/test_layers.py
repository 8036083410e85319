"""Layers: equal to PyTorch and to plain formulas, scanned stacks equal to loops, contracts that every layer keeps."""

import inspect
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import draw, shaken, to_float64
from jax import lax

from eqvision import layers
from eqvision.layers import (
    MLP,
    Attention,
    BatchNorm,
    Conv,
    ConvTranspose,
    DecoderBlock,
    DecoderStack,
    DeformableAttention,
    DeformableDecoder,
    DeformableEncoder,
    DeformConv,
    DETRDecoder,
    DETRDecoderLayer,
    DETREncoder,
    DETREncoderLayer,
    FourierPosition,
    FrozenBatchNorm,
    GatedMLP,
    GroupNorm,
    LayerNorm,
    LayerScale,
    Linear,
    MaskEncoder,
    MissingKeyError,
    NarrowAttention,
    NormedConv,
    PatchEmbed,
    PatchEmbed3D,
    PositionEmbedding1D,
    PositionEmbedding2D,
    PromptEncoder,
    RelativeAttention,
    RelativeBias,
    RMSNorm,
    SinCos2D,
    StandardizedConv,
    TokenEmbedding,
    TransformerBlock,
    TransformerStack,
    TwoWayBlock,
    TwoWayTransformer,
    activate,
    drop_path,
    dropout,
    fold,
)

# --- contracts of every layer ---------------------------------------------------------------------------------------

TOKENS, IMAGE, VIDEO = (2, 5, 8), (2, 6, 6, 8), (2, 4, 6, 6, 8)

LAYERS = {
    "Linear": (lambda key: Linear(8, 3, key=key), TOKENS),
    "LayerNorm": (lambda key: LayerNorm(8), TOKENS),
    "RMSNorm": (lambda key: RMSNorm(8), TOKENS),
    "GroupNorm": (lambda key: GroupNorm(8, num_groups=4), IMAGE),
    "LayerScale": (lambda key: LayerScale(8), TOKENS),
    "MLP": (lambda key: MLP(8, 16, key=key), TOKENS),
    "GatedMLP": (lambda key: GatedMLP(8, 16, key=key), TOKENS),
    "Attention": (lambda key: Attention(8, 2, key=key), TOKENS),
    "TransformerBlock": (lambda key: TransformerBlock(8, 2, 16, layer_scale=0.1, key=key), TOKENS),
    "TransformerStack": (lambda key: TransformerStack(2, 8, 2, 16, key=key), TOKENS),
    "Conv": (lambda key: Conv(8, 4, 3, use_bias=True, key=key), IMAGE),
    "StandardizedConv": (lambda key: StandardizedConv(8, 4, 3, use_bias=True, key=key), IMAGE),
    "PatchEmbed": (lambda key: PatchEmbed(8, 4, 3, key=key), IMAGE),
    "PatchEmbed3D": (lambda key: PatchEmbed3D(8, 4, (2, 3, 3), key=key), VIDEO),
}
NORMS_WITH_STATE = {"BatchNorm": BatchNorm, "FrozenBatchNorm": FrozenBatchNorm}
TABLES = {
    "PositionEmbedding1D": (lambda key: PositionEmbedding1D(6, 8, key=key), 5),
    "PositionEmbedding2D": (lambda key: PositionEmbedding2D((4, 6), 8, key=key), (6, 5)),
    "SinCos2D": (lambda key: SinCos2D(8), (4, 6)),
}

# What they compute is tested with the models that they are parts of.
DETECTOR_LAYERS = {
    "FourierPosition": lambda key: FourierPosition(8, key=key),
    "MaskEncoder": lambda key: MaskEncoder(8, 4, key=key),
    "PromptEncoder": lambda key: PromptEncoder(8, mask_channels=4, key=key),
    "NarrowAttention": lambda key: NarrowAttention(8, 4, 2, key=key),
    "TwoWayBlock": lambda key: TwoWayBlock(8, 2, 16, inner_width=4, first=True, key=key),
    "TwoWayTransformer": lambda key: TwoWayTransformer(2, 8, 2, 16, inner_width=4, key=key),
    "ConvTranspose": lambda key: ConvTranspose(8, 4, 2, stride=2, key=key),
    "DETREncoderLayer": lambda key: DETREncoderLayer(8, 2, 16, key=key),
    "DETREncoder": lambda key: DETREncoder(2, 8, 2, 16, key=key),
    "DETRDecoderLayer": lambda key: DETRDecoderLayer(8, 2, 16, key=key),
    "DETRDecoder": lambda key: DETRDecoder(2, 8, 2, 16, key=key),
    "NormedConv": lambda key: NormedConv(8, 4, 3, norm="layer", key=key),
    "RelativeAttention": lambda key: RelativeAttention(8, 2, grid=(3, 4), key=key),
    "DeformConv": lambda key: DeformConv(8, 4, key=key),
    "DeformableAttention": lambda key: DeformableAttention(8, 2, key=key),
    "DeformableEncoder": lambda key: DeformableEncoder(2, 8, 2, 16, key=key),
    "DeformableDecoder": lambda key: DeformableDecoder(2, 8, 2, 16, refine=False, key=key),
    "DecoderBlock": lambda key: DecoderBlock(8, 2, 16, memory_width=4, key=key),
    "DecoderStack": lambda key: DecoderStack(2, 8, 2, 16, norm="rms", key=key),
    "RelativeBias": lambda key: RelativeBias(2, bidirectional=True, key=key),
    "TokenEmbedding": lambda key: TokenEmbedding(9, 8, key=key),
}


def test_every_layer_of_the_package_is_in_these_tables():
    classes = {name for name, item in vars(layers).items() if inspect.isclass(item) and issubclass(item, eqx.Module)}
    assert classes == {*LAYERS, *NORMS_WITH_STATE, *TABLES, *DETECTOR_LAYERS}


@pytest.mark.parametrize("name", list(DETECTOR_LAYERS))
def test_layer_of_detectors_is_arrays_only(name, key):
    leaves = jax.tree.leaves(eqx.filter_eval_shape(DETECTOR_LAYERS[name], key))
    assert leaves
    assert {getattr(leaf, "dtype", None) for leaf in leaves} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", list(LAYERS))
def test_layer_is_arrays_only_and_works_with_plain_jit_and_grad(name, key):
    make, shape = LAYERS[name]
    layer, x = make(key), jnp.asarray(draw(*shape))
    assert all(eqx.is_array(leaf) for leaf in jax.tree.leaves(layer))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(layer))
    loss = jax.jit(lambda layer, x: jnp.sum(jnp.sin(layer(x))))
    gradient = jax.jit(jax.grad(loss))(layer, x)
    assert jax.tree.structure(gradient) == jax.tree.structure(layer)
    for path, leaf in jax.tree.leaves_with_path(gradient):
        assert np.isfinite(leaf).all()
        # Attention does not depend on the bias of its keys: it adds one number to all logits of a query.
        assert np.abs(leaf).max() > 0 or jax.tree_util.keystr(path).endswith(".key.bias")


@pytest.mark.parametrize("name", list(LAYERS))
def test_layer_keeps_bfloat16_and_gives_float32_gradients(name, key):
    make, shape = LAYERS[name]
    layer, x = make(key), jnp.asarray(draw(*shape), jnp.bfloat16)
    assert jax.eval_shape(layer, x).dtype == jnp.bfloat16
    gradient = jax.eval_shape(jax.grad(lambda layer: jnp.sum(layer(x).astype(jnp.float32))), layer)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("name", list(NORMS_WITH_STATE))
def test_layer_with_state_is_arrays_only_and_works_with_plain_jit_and_grad(name):
    layer, state = eqx.nn.make_with_state(NORMS_WITH_STATE[name])(8)
    assert all(eqx.is_array(leaf) for leaf in jax.tree.leaves((layer, state)))

    def loss(layer, state, x):
        y, state = layer(x, state, train=True)
        return jnp.sum(jnp.sin(y)), state

    gradient, new_state = jax.jit(jax.grad(loss, has_aux=True))(layer, state, jnp.asarray(draw(*IMAGE)))
    assert jax.tree.structure(gradient) == jax.tree.structure(layer)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("name", list(TABLES))
def test_position_table_is_arrays_only_and_works_with_plain_jit_and_grad(name, key):
    make, where = TABLES[name]
    layer = make(key)
    assert all(eqx.is_array(leaf) for leaf in jax.tree.leaves(layer))
    gradient = jax.jit(jax.grad(lambda layer: jnp.sum(jnp.sin(layer(where)))))(layer)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


# --- linear ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leading", [(), (3,), (3, 4), (2, 3, 1, 2)])
@pytest.mark.parametrize("use_bias", [True, False])
def test_linear_gradient_equals_that_of_einsum_in_float64(assert_close, key, use_bias, leading):
    with jax.enable_x64(True):
        layer = to_float64(shaken(Linear(5, 7, use_bias=use_bias, key=key)))
        x, cotangent = to_float64((jnp.asarray(draw(*leading, 5)), jnp.asarray(draw(*leading, 7, seed=1))))

        def plain(layer, x):
            y = jnp.einsum("...i,io->...o", x, layer.weight)
            return y if layer.bias is None else y + layer.bias

        def both(function):
            y, pullback = jax.vjp(function, layer, x)
            return y, pullback(cotangent)

        assert both(lambda layer, x: layer(x))[0].dtype == jnp.float64
        assert_close(both(lambda layer, x: layer(x)), both(plain), 1e-10)


def test_linear_gradient_under_scan_and_checkpoint_equals_that_of_a_loop(assert_close, getkey):
    with jax.enable_x64(True):
        linears = [to_float64(Linear(5, 5, key=getkey())) for _ in range(3)]
        x = to_float64(jnp.asarray(draw(2, 3, 5)))
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *linears)
        body = jax.checkpoint(lambda y, linear: jnp.sin(linear(y)) + y)

        def scanned(stacked, x):
            return jnp.sum(lax.scan(lambda y, linear: (body(y, linear), None), x, stacked)[0] ** 2)

        def looped(stacked, x):
            for number in range(3):
                x = jnp.sin(jnp.einsum("bni,io->bno", x, stacked.weight[number]) + stacked.bias[number]) + x
            return jnp.sum(x**2)

        gradients = [jax.jit(jax.grad(f, argnums=(0, 1)))(stacked, x) for f in (scanned, looped)]
        assert_close(*gradients, 1e-10)


# --- activations and feed-forward -----------------------------------------------------------------------------------


def torch_activation(name):
    import torch
    from torch.nn import functional as F

    return {
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "relu": F.relu,
        "silu": F.silu,
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
        "tanh": torch.tanh,
    }[name]


@pytest.mark.parity
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "relu", "silu", "quick_gelu", "tanh"])
def test_activation_equals_torch(assert_close, name):
    import torch

    x = np.linspace(-6, 6, 1001)
    x_torch = torch.from_numpy(x).requires_grad_()
    y_torch = torch_activation(name)(x_torch)
    y_torch.sum().backward()
    assert_close(activate(jnp.asarray(x, jnp.float32), name), y_torch.detach().numpy(), 1e-6)
    with jax.enable_x64(True):
        gradient = jax.grad(lambda x: jnp.sum(activate(x, name)))(jnp.asarray(x))
        assert_close(gradient, x_torch.grad.numpy(), 1e-10)


def test_exact_and_approximate_gelu_differ_as_documented():
    x = jnp.linspace(-6, 6, 10_001)
    assert 4e-4 < float(jnp.max(jnp.abs(activate(x, "gelu") - activate(x, "gelu_tanh")))) < 5e-4


def test_unknown_activation_lists_the_known_ones(unchecked):
    with pytest.raises(ValueError, match=r"'swish' is unknown; choose from \('gelu', 'gelu_tanh', 'relu'"):
        activate(jnp.ones(3), "swish")


def torch_linear(x, linear):
    import torch

    bias = None if linear.bias is None else torch.from_numpy(np.array(linear.bias))
    return torch.nn.functional.linear(x, torch.from_numpy(np.array(linear.weight).T.copy()), bias)


@pytest.mark.parity
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
def test_mlp_equals_torch(assert_close, key, activation):
    import torch

    layer, x = shaken(MLP(6, 10, out_width=4, activation=activation, key=key)), draw(2, 3, 6)
    hidden = torch_activation(activation)(torch_linear(torch.from_numpy(x), layer.fc1))
    assert_close(layer(jnp.asarray(x)), torch_linear(hidden, layer.fc2).numpy(), 1e-6)


@pytest.mark.parity
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_gated_mlp_equals_torch(assert_close, key, activation, use_bias):
    import torch

    layer, x = shaken(GatedMLP(6, 10, activation=activation, use_bias=use_bias, key=key)), draw(2, 3, 6)
    tensor = torch.from_numpy(x)
    hidden = torch_activation(activation)(torch_linear(tensor, layer.gate)) * torch_linear(tensor, layer.fc1)
    assert_close(layer(jnp.asarray(x)), torch_linear(hidden, layer.fc2).numpy(), 1e-6)


@pytest.mark.parametrize("make", [MLP, GatedMLP])
def test_mlp_drops_hidden_and_output_with_different_keys(assert_close, key, make):
    layer, x = shaken(make(6, 10, dropout=0.4, key=key)), jnp.asarray(draw(2, 3, 6))
    if make is MLP:
        hidden = activate(layer.fc1(x), "gelu")
    else:
        hidden = activate(layer.gate(x), "silu") * layer.fc1(x)
    hidden = dropout(hidden, 0.4, train=True, key=fold(key, 0))
    expected = dropout(layer.fc2(hidden), 0.4, train=True, key=fold(key, 1))
    assert_close(layer(x, train=True, key=key), expected, 1e-6)
    np.testing.assert_array_equal(layer(x, key=key), layer(x))


def test_layer_scale_multiplies_each_channel():
    layer, x = LayerScale(8, initial=0.25), jnp.asarray(draw(2, 5, 8))
    np.testing.assert_array_equal(layer(x), x * 0.25)


# --- dropout and drop-path ------------------------------------------------------------------------------------------

DROPS = {"dropout": dropout, "drop_path": drop_path}


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean(key, rate):
    y = np.asarray(dropout(jnp.ones((1000, 100)), rate, train=True, key=key))
    np.testing.assert_allclose(y[y != 0], 1 / (1 - rate), rtol=1e-6)
    assert abs(y.mean() - 1) < 5 * math.sqrt(rate / (1 - rate) / y.size)
    assert 0 < (y[0] == 0).mean() < 1  # elements, not rows


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("traced", [True, False])
def test_drop_path_drops_whole_examples_and_keeps_the_mean(key, rate, traced):
    given = jnp.float32(rate) if traced else rate
    y = np.asarray(drop_path(jnp.ones((4000, 3, 2)), given, train=True, key=key))
    assert (y == y[:, :1, :1]).all()
    per_example = y[:, 0, 0]
    np.testing.assert_allclose(per_example[per_example != 0], 1 / (1 - rate), rtol=1e-6)
    assert abs(per_example.mean() - 1) < 5 * math.sqrt(rate / (1 - rate) / per_example.size)


@pytest.mark.parametrize("name", list(DROPS))
def test_drops_are_a_function_of_the_key(name, getkey):
    x, first, second = jnp.ones((64, 4)), getkey(), getkey()

    def drop(key):
        return np.asarray(DROPS[name](x, 0.5, train=True, key=key))

    np.testing.assert_array_equal(drop(first), drop(first))
    assert (drop(first) != drop(second)).any()


@pytest.mark.parametrize("name", list(DROPS))
def test_drops_do_nothing_in_inference_or_at_rate_zero(name, key):
    x = jnp.asarray(draw(4, 3))
    assert DROPS[name](x, 0.5, train=False, key=key) is x
    assert DROPS[name](x, 0.5, train=False, key=None) is x
    assert DROPS[name](x, 0.0, train=True, key=None) is x


@pytest.mark.parametrize("name", list(DROPS))
def test_drops_keep_bfloat16(name, key):
    assert DROPS[name](jnp.ones((4, 3), jnp.bfloat16), 0.5, train=True, key=key).dtype == jnp.bfloat16


def test_training_without_a_key_says_what_to_pass(key):
    x = jnp.ones((2, 3, 8))
    message = r"is random in training and got key=None; pass key=jax\.random\.key\(\.\.\.\) to the model"
    calls = [
        (r"dropout\(0\.5\) ", lambda: dropout(x, 0.5, train=True, key=None)),
        ("drop_path ", lambda: drop_path(x, 0.5, train=True, key=None)),
        (r"dropout\(0\.1\) ", lambda: MLP(8, 16, dropout=0.1, key=key)(x, train=True)),
        (r"dropout\(0\.2\) ", lambda: Attention(8, 2, dropout=0.2, key=key)(x, train=True)),
        ("drop_path ", lambda: TransformerStack(2, 8, 2, 16, drop_path=0.1, key=key)(x, train=True)),
    ]
    for what, call in calls:
        with pytest.raises(MissingKeyError, match=what + message):
            call()
    TransformerStack(2, 8, 2, 16, key=key)(x, train=True)  # nothing random: no key needed


# --- initialisers ---------------------------------------------------------------------------------------------------

SHAPE = (3, 3, 40, 50)
INITIALISERS = {
    "normal": (lambda key, shape: layers.normal(key, shape, 0.3), 0.3),
    "truncated_normal": (lambda key, shape: layers.truncated_normal(key, shape, 0.3), 0.3 * 0.87962566),
    "uniform": (lambda key, shape: layers.uniform(key, shape, 0.3), 0.3 / math.sqrt(3)),
    "xavier_uniform": (layers.xavier_uniform, math.sqrt(2 / (9 * 90))),
    "lecun_normal": (layers.lecun_normal, math.sqrt(1 / (9 * 40))),
    "he_normal_fan_out": (layers.he_normal_fan_out, math.sqrt(2 / (9 * 50))),
}


@pytest.mark.parametrize("name", list(INITIALISERS))
def test_initialiser_has_the_documented_spread_and_is_equal_under_jit(name, key):
    init, std = INITIALISERS[name]
    values = np.asarray(init(key, SHAPE))
    assert values.shape == SHAPE
    assert abs(values.mean()) < 5 * std / math.sqrt(values.size)
    assert values.std() == pytest.approx(std, rel=0.03)
    np.testing.assert_array_equal(values, jax.jit(lambda key: init(key, SHAPE))(key))
    bound = {"truncated_normal": 0.6, "uniform": 0.3}.get(name, np.inf)
    assert np.abs(values).max() <= bound
