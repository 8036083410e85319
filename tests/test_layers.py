"""Layers: equal to PyTorch and to plain formulas, scanned stacks equal to loops, contracts that every layer keeps."""

import inspect
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import draw, from_torch, shaken, to_float64, to_torch
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
    average_pool,
    convolve,
    drop_path,
    dropout,
    fold,
    max_pool,
    resample_grid,
    sincos_1d,
    sincos_2d,
    sincos_3d,
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


# --- convolution and pooling ----------------------------------------------------------------------------------------

CONVOLUTIONS = {
    "3x3": (3, {"padding": 1}),
    "3x3 stride 2": (3, {"padding": 1, "stride": 2}),
    "7x7 stride 2": (7, {"padding": 3, "stride": 2}),
    "valid": (3, {"padding": "VALID"}),
    "two groups": (3, {"padding": 1, "groups": 2}),
    "depthwise": (5, {"padding": 2, "groups": 8, "stride": 2}),
    "dilated": (3, {"padding": 2, "dilation": 2}),
    "dilated groups with stride": (3, {"padding": 3, "dilation": 3, "groups": 4, "stride": 2}),
    "explicit": (3, {"padding": ((1, 2), (0, 3)), "stride": 2}),
    "1x1": (1, {}),
    "1x1 stride 2": (1, {"padding": 0, "stride": 2}),
    "1x1 groups": (1, {"padding": 0, "groups": 4}),
    "1x1 padded": (1, {"padding": 1, "stride": 2}),
}


def torch_convolve(x, weight, bias=None, *, padding=0, **options):
    """torch's conv2d for our layouts, with explicit padding (top, bottom), (left, right)."""
    import torch

    if isinstance(padding, str):
        padding = 0
    if isinstance(padding, int):
        padding = ((padding, padding), (padding, padding))
    padded = torch.nn.functional.pad(to_torch(x), (*padding[1], *padding[0]))
    kernel = torch.from_numpy(np.array(weight).transpose(3, 2, 0, 1).copy())
    bias = None if bias is None else torch.from_numpy(np.array(bias))
    return from_torch(torch.nn.functional.conv2d(padded, kernel, bias, **options))


@pytest.mark.parity
@pytest.mark.parametrize("name", list(CONVOLUTIONS))
def test_convolution_equals_torch(assert_close, key, name):
    size, options = CONVOLUTIONS[name]
    layer = shaken(Conv(8, 16, size, use_bias=True, key=key, **options))
    x = draw(2, 11, 10, 8)
    assert_close(layer(jnp.asarray(x)), torch_convolve(x, layer.weight, layer.bias, **options), 1e-6)


def same_padding(length, size, stride, dilation):
    """TensorFlow's rule: enough that the output has ceil(length / stride), the odd one at the end."""
    total = max((math.ceil(length / stride) - 1) * stride + (size - 1) * dilation + 1 - length, 0)
    return total // 2, total - total // 2


SAME = [(3, 2, 1), (4, 1, 1), (7, 2, 1), (3, 3, 1), (3, 2, 2), (1, 2, 1)]


@pytest.mark.parity
@pytest.mark.parametrize(("size", "stride", "dilation"), SAME)
def test_same_padding_is_that_of_tensorflow(assert_close, key, size, stride, dilation):
    layer = Conv(3, 4, size, stride=stride, dilation=dilation, key=key)
    x = draw(2, 9, 8, 3)
    padding = tuple(same_padding(length, size, stride, dilation) for length in (9, 8))
    y = layer(jnp.asarray(x))
    assert y.shape == (2, math.ceil(9 / stride), math.ceil(8 / stride), 4)
    assert_close(y, torch_convolve(x, layer.weight, padding=padding, stride=stride, dilation=dilation), 1e-6)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", ["SAME", "VALID", 0, ((0, 0), (0, 0))])
def test_1x1_convolution_as_matrix_product_equals_xla(assert_close, stride, padding):
    """Output and gradients; sizes that the stride does not divide."""
    x, weight = jnp.asarray(draw(2, 7, 8, 5)), jnp.asarray(draw(1, 1, 5, 6, seed=1))
    explicit = ((0, 0), (0, 0)) if padding == 0 else padding

    def plain(x, weight):
        return lax.conv_general_dilated(
            x, weight, (stride, stride), explicit, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def ours(x, weight):
        return convolve(x, weight, stride=stride, padding=padding)

    cotangent = jnp.asarray(draw(*plain(x, weight).shape, seed=2))

    def both(function):
        y, pullback = jax.vjp(function, x, weight)
        return y, pullback(cotangent)

    assert_close(both(ours), both(plain), 1e-6)
    assert "dot_general" in str(jax.make_jaxpr(ours)(x, weight))


@pytest.mark.parity
@pytest.mark.parametrize(("stride", "padding", "groups"), [(1, 1, 1), (2, ((0, 1), (0, 1)), 2)])
@pytest.mark.parametrize("eps", [1e-10, 1e-5])
def test_standardized_convolution_equals_torch(assert_close, key, eps, stride, padding, groups):
    options = {"stride": stride, "padding": padding, "groups": groups}
    layer = shaken(StandardizedConv(6, 8, 3, use_bias=True, eps=eps, key=key, **options), scale=0.5)
    weight = np.asarray(layer.weight, np.float64).reshape(-1, 8)
    weight = (weight - weight.mean(axis=0)) / np.sqrt(weight.var(axis=0) + eps)
    x = draw(2, 8, 8, 6)
    weight = weight.reshape(layer.weight.shape)
    expected = torch_convolve(x.astype(np.float64), weight, np.float64(layer.bias), **options)
    assert_close(layer(jnp.asarray(x)), expected, 1e-6)


@pytest.mark.parity
@pytest.mark.parametrize(("window", "stride", "padding"), [(2, 2, 0), (3, 2, 1), (3, 1, 1)])
def test_pooling_equals_torch(assert_close, window, stride, padding):
    import torch

    x = draw(2, 9, 8, 3) - 10.0  # negative, so that padding with zeros would win
    y = max_pool(jnp.asarray(x), window, stride=stride, padding=padding)
    assert_close(y, from_torch(torch.nn.functional.max_pool2d(to_torch(x), window, stride, padding)), 0.0)
    y = average_pool(jnp.asarray(x), window, stride=stride)
    assert_close(y, from_torch(torch.nn.functional.avg_pool2d(to_torch(x), window, stride)), 1e-6)


@pytest.mark.parametrize("padding", ["SAME", ((0, 1), (1, 0))])
def test_max_pool_keeps_the_type_and_padding_never_wins(padding):
    y = max_pool(jnp.full((1, 4, 4, 1), -3.0, jnp.bfloat16), 3, stride=2, padding=padding)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y.astype(np.float32), -3.0)


@pytest.mark.parametrize(("channels", "groups"), [((6, 8), 4), ((8, 6), 4)])
def test_convolution_refuses_groups_of_unequal_size(key, channels, groups):
    with pytest.raises(ValueError, match=f"{channels[0]} -> {channels[1]} channels cannot be split into 4 groups"):
        Conv(*channels, 3, groups=groups, key=key)
    with pytest.raises(ValueError, match=f"{channels[0]} -> {channels[1]} channels cannot be split into 4 groups"):
        StandardizedConv(*channels, 3, groups=groups, key=key)


# --- patches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch_size", [4, (2, 3)])
def test_patch_embed_equals_a_strided_convolution(assert_close, key, patch_size):
    layer, x = shaken(PatchEmbed(3, 7, patch_size, key=key)), jnp.asarray(draw(2, 8, 12, 3))
    dimensions = ("NHWC", "HWIO", "NHWC")
    expected = lax.conv_general_dilated(x, layer.weight, layer.patch_size, "VALID", dimension_numbers=dimensions)
    assert_close(layer(x), expected + layer.bias, 1e-6)


def test_patch_embed_3d_equals_a_strided_convolution(assert_close, key):
    layer, x = shaken(PatchEmbed3D(3, 7, (2, 4, 3), key=key)), jnp.asarray(draw(2, 4, 8, 6, 3))
    dimensions = ("NTHWC", "THWIO", "NTHWC")
    expected = lax.conv_general_dilated(x, layer.weight, layer.patch_size, "VALID", dimension_numbers=dimensions)
    assert_close(layer(x), expected + layer.bias, 1e-6)


def test_patches_that_do_not_fit_are_refused(key):
    with pytest.raises(ValueError, match="images of 9x8 cannot be cut into patches of 4x4"):
        PatchEmbed(3, 7, 4, key=key)(jnp.zeros((1, 9, 8, 3)))
    with pytest.raises(ValueError, match="video of 5x8x8 cannot be cut into tubelets of 2x4x4"):
        PatchEmbed3D(3, 7, (2, 4, 4), key=key)(jnp.zeros((1, 5, 8, 8, 3)))


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


# --- positions ------------------------------------------------------------------------------------------------------


def plain_sincos(position, width, temperature):
    """One position: sines of position / temperature^(2 i / width) for every i, then the cosines."""
    angles = [position / temperature ** (2 * number / width) for number in range(width // 2)]
    return [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]


@pytest.mark.parametrize("temperature", [10_000.0, 100.0])
def test_sincos_tables_equal_the_formula(temperature):
    """In two dimensions the column comes first, as in MAE; in three time, row, column."""
    one = [plain_sincos(position, 12, temperature) for position in (0.0, 1.0, 2.5, 60.0)]
    table = sincos_1d(np.array([0.0, 1.0, 2.5, 60.0]), 12, temperature=temperature)
    np.testing.assert_allclose(table, one, atol=1e-6)

    def part(position):
        return plain_sincos(position, 4, temperature)

    two = [[part(column) + part(row) for column in range(5)] for row in range(3)]
    np.testing.assert_allclose(sincos_2d((3, 5), 8, temperature=temperature), two, atol=1e-6)
    three = [[[part(t) + part(row) + part(column) for column in range(5)] for row in range(3)] for t in range(2)]
    np.testing.assert_allclose(sincos_3d((2, 3, 5), 12, temperature=temperature), three, atol=1e-6)
    np.testing.assert_allclose(SinCos2D(8, temperature=temperature)((3, 5)), two, atol=1e-6)


def test_sincos_width_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="needs an even width, got 7"):
        sincos_1d(np.arange(3.0), 7)
    with pytest.raises(ValueError, match="2-D sin-cos embedding needs a width divisible by 4, got 6"):
        sincos_2d((2, 2), 6)
    with pytest.raises(ValueError, match="3-D sin-cos embedding needs a width divisible by 6, got 16"):
        sincos_3d((2, 2, 2), 16)


def test_resampling_to_the_same_grid_is_the_identity(key):
    layer = PositionEmbedding2D((4, 6), 3, key=key)
    np.testing.assert_array_equal(layer((4, 6)), layer.weight)


@pytest.mark.parametrize("method", ["nearest", "linear", "cubic", "lanczos3"])
@pytest.mark.parametrize("grid", [(6, 4), (8, 12), (2, 3), (5, 7)])
def test_resampling_has_the_asked_shape_and_keeps_a_constant(assert_close, key, grid, method):
    layer = PositionEmbedding2D((4, 6), 3, method=method, key=key)
    assert layer(grid).shape == (*grid, 3)
    constant = jnp.broadcast_to(jnp.array([1.0, -2.0, 0.5]), (4, 6, 3))
    assert_close(resample_grid(constant, grid, method=method), jnp.broadcast_to(constant[0, 0], (*grid, 3)), 1e-6)


@pytest.mark.parity
@pytest.mark.parametrize("grid", [(8, 12), (7, 9), (3, 2)])
@pytest.mark.parametrize(("method", "mode", "antialias"), [("linear", "bilinear", False), ("cubic", "bicubic", True)])
def test_resampling_equals_torch(assert_close, grid, method, mode, antialias):
    """torch's antialiased bicubic has a = -0.5, as ours; the one without antialiasing has -0.75."""
    import torch

    table = draw(4, 6, 3)
    resized = torch.nn.functional.interpolate(to_torch(table[None]), grid, mode=mode, antialias=antialias)
    ours = resample_grid(jnp.asarray(table), grid, method=method, antialias=antialias)
    assert_close(ours, from_torch(resized)[0], 1e-5)


def test_shorter_sequences_use_the_first_positions_and_longer_ones_are_refused(key):
    layer = PositionEmbedding1D(6, 4, key=key)
    np.testing.assert_array_equal(layer(4), layer.weight[:4])
    with pytest.raises(ValueError, match="sequence of 7 is longer than the 6 learned positions"):
        layer(7)


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
