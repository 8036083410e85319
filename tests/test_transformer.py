"""The transformer block against plain references, and the scanned stack against a loop."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import draw, shaken, to_float64
from jax import lax
from jax.sharding import PartitionSpec as P
from scipy.special import erf

from eqvision.layers import (
    TransformerBlock,
    TransformerStack,
    fold,
)

# --- transformer block ----------------------------------------------------------------------------------------------


def plain_norm(x, norm):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + norm.eps)
    return x * norm.weight + norm.bias


def plain_linear(x, linear):
    return x @ linear.weight + linear.bias


def plain_attention(x, layer):
    b, n, d = x.shape
    split = lambda y: y.reshape(b, n, layer.num_heads, -1).transpose(0, 2, 1, 3)  # noqa: E731
    query, key, value = (split(plain_linear(x, part)) for part in (layer.query, layer.key, layer.value))
    weights = np.exp(query @ key.transpose(0, 1, 3, 2) / math.sqrt(d // layer.num_heads))
    mixed = weights @ value / weights.sum(-1, keepdims=True)
    return plain_linear(mixed.transpose(0, 2, 1, 3).reshape(b, n, d), layer.out)


def plain_mlp(x, mlp):
    hidden = plain_linear(x, mlp.fc1)
    return plain_linear(hidden * 0.5 * (1 + erf(hidden / math.sqrt(2))), mlp.fc2)


def plain_block(x, block):
    """numpy in float64; the two equations of ViT (``pre``) and of Vaswani et al. 2017 (``post``)."""
    scale1, scale2 = (1.0 if scale is None else scale.scale for scale in (block.scale1, block.scale2))
    if block.norm_order == "pre":
        x = x + scale1 * plain_attention(plain_norm(x, block.norm1), block.attention)
        return x + scale2 * plain_mlp(plain_norm(x, block.norm2), block.mlp)
    x = plain_norm(x + scale1 * plain_attention(x, block.attention), block.norm1)
    return plain_norm(x + scale2 * plain_mlp(x, block.mlp), block.norm2)


@pytest.mark.parametrize("layer_scale", [None, 0.3])
@pytest.mark.parametrize("norm_order", ["pre", "post"])
def test_block_equals_a_plain_reference(assert_close, key, norm_order, layer_scale):
    block = shaken(TransformerBlock(8, 2, 16, norm_order=norm_order, layer_scale=layer_scale, eps=1e-4, key=key))
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), block)
    expected = plain_block(draw(3, 5, 8).astype(np.float64), wide)
    assert_close(block(jnp.asarray(draw(3, 5, 8))), expected, 1e-6)
    with jax.enable_x64(True):
        y = to_float64(block)(to_float64(jnp.asarray(draw(3, 5, 8))))
        assert y.dtype == jnp.float64
        assert_close(y, expected, 1e-10)


@pytest.mark.parity
@pytest.mark.parametrize("norm_order", ["pre", "post"])
def test_block_equals_torch_encoder_layer(assert_close, key, norm_order):
    import torch

    block = shaken(TransformerBlock(8, 2, 16, norm_order=norm_order, eps=1e-5, key=key))
    oracle = torch.nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm_order == "pre"
    )
    attend = block.attention
    joined = [attend.query, attend.key, attend.value]
    values = {
        "self_attn.in_proj_weight": np.concatenate([np.asarray(part.weight).T for part in joined]),
        "self_attn.in_proj_bias": np.concatenate([np.asarray(part.bias) for part in joined]),
        "self_attn.out_proj.weight": np.asarray(attend.out.weight).T,
        "self_attn.out_proj.bias": np.asarray(attend.out.bias),
        "linear1.weight": np.asarray(block.mlp.fc1.weight).T,
        "linear1.bias": np.asarray(block.mlp.fc1.bias),
        "linear2.weight": np.asarray(block.mlp.fc2.weight).T,
        "linear2.bias": np.asarray(block.mlp.fc2.bias),
        "norm1.weight": np.asarray(block.norm1.weight),
        "norm1.bias": np.asarray(block.norm1.bias),
        "norm2.weight": np.asarray(block.norm2.weight),
        "norm2.bias": np.asarray(block.norm2.bias),
    }
    oracle.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in values.items()})
    x = draw(3, 5, 8)
    assert_close(block(jnp.asarray(x)), oracle(torch.from_numpy(x)).detach().numpy(), 1e-6)


def test_unknown_norm_order_is_refused(unchecked, key):
    with pytest.raises(ValueError, match=r"norm_order 'sandwich' is unknown; choose from \('pre', 'post'\)"):
        TransformerBlock(8, 2, 16, norm_order="sandwich", key=key)


# --- transformer stack ----------------------------------------------------------------------------------------------

DEPTH = 3
# Rematerialisation is for training only, so inference has fewer programs to compare.
VARIANTS = {
    True: [("none", 1), ("none", 2), ("none", DEPTH), ("dots", 1), ("full", 1), ("full", 2)],
    False: [("none", 1), ("none", DEPTH)],
}


def make_stack(key, **options):
    """All that may go wrong in a scan at once: dropout, drop-path, layer scale."""
    stack = TransformerStack(DEPTH, 8, 2, 16, dropout=0.1, drop_path=0.4, layer_scale=0.5, key=key, **options)
    return to_float64(shaken(stack))


def loop(stack, x, *, train, key, **options):
    """The same blocks one after the other."""
    for number in range(stack.depth):
        block = jax.tree.map(lambda leaf: leaf[number], stack.blocks)  # noqa: B023
        rate = stack.drop_path * number / (stack.depth - 1)
        x = block(x, drop_path_rate=jnp.float32(rate), train=train, key=fold(key, number), **options)
    return x


def value_and_gradients(function, stack, x, **options):
    def both(blocks, x):
        run = lambda blocks, x: function(eqx.tree_at(lambda tree: tree.blocks, stack, blocks), x, **options)  # noqa: E731
        y, pullback = jax.vjp(run, blocks, x)
        return y, pullback(jnp.cos(y))

    return jax.jit(both)(stack.blocks, x)


def split_key_bias(blocks):
    """The gradients without that of the key's bias, and that one.

    It adds the same number to all logits of a query, so its gradient is rounding around zero and has no scale.
    """
    where = lambda tree: tree.attention.key.bias  # noqa: E731
    return eqx.tree_at(where, blocks, None), where(blocks)


def assert_equal_runs(assert_close, actual, expected, tolerance):
    """Of ``(output, (gradients of blocks, gradient of x))``."""
    (y, (blocks, g_x)), (expected_y, (expected_blocks, expected_g_x)) = actual, expected
    (blocks, key_bias), (expected_blocks, expected_key_bias) = map(split_key_bias, (blocks, expected_blocks))
    assert_close((y, blocks, g_x), (expected_y, expected_blocks, expected_g_x), tolerance)
    scale = float(jnp.max(jnp.abs(expected_blocks.attention.query.bias)))
    assert float(jnp.max(jnp.abs(key_bias - expected_key_bias))) <= tolerance * scale


@pytest.mark.parametrize("train", [pytest.param(True, marks=pytest.mark.slow), False])
def test_scanned_stack_equals_a_loop_over_its_blocks(assert_close, key, train):
    """Value and gradients, in float64, with mask and bias."""
    with jax.enable_x64(True):
        x, bias = to_float64((jnp.asarray(draw(4, 5, 8)), jnp.asarray(draw(1, 2, 5, 5))))
        mask = jnp.arange(5)[None, :] < jnp.array([[5], [4], [3], [2]])
        options = {"key_mask": mask, "bias": bias, "train": train, "key": key}
        expected = value_and_gradients(loop, make_stack(key), x, **options)
        for remat, unroll in VARIANTS[train]:
            stack = make_stack(key, remat=remat, unroll=unroll)
            actual = value_and_gradients(lambda stack, x, **options: stack(x, **options), stack, x, **options)
            assert_equal_runs(assert_close, actual, expected, 1e-10)


@pytest.mark.slow
def test_scanned_stack_equals_a_loop_to_float32_rounding(assert_close, key):
    stack, x = shaken(TransformerStack(DEPTH, 8, 2, 16, key=key)), jnp.asarray(draw(4, 5, 8))
    actual = value_and_gradients(lambda stack, x, **options: stack(x, **options), stack, x, train=False, key=None)
    assert_equal_runs(assert_close, actual, value_and_gradients(loop, stack, x, train=False, key=None), 2e-6)


def test_stack_under_shard_map_equals_one_device(assert_close, key, mesh):
    stack, x = shaken(TransformerStack(2, 8, 2, 16, remat="dots", key=key)), jnp.asarray(draw(8, 5, 8))

    def step(stack, x, axes=()):
        def loss(stack, x):
            value = jnp.sum(jnp.sin(stack(x, train=True)))
            return lax.psum(value, axes) if axes else value

        g_stack, g_x = jax.grad(loss, argnums=(0, 1))(stack, x)
        return stack(x), (g_stack.blocks, g_x)

    sharded = jax.shard_map(
        lambda *inputs: step(*inputs, axes=("data",)),
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=(P("data"), (P(), P("data"))),
    )
    assert_equal_runs(assert_close, jax.jit(sharded)(stack, x), jax.jit(step)(stack, x), 2e-6)


@pytest.mark.slow
def test_last_intermediate_is_the_output(assert_close, key):
    stack, x = shaken(TransformerStack(DEPTH, 8, 2, 16, key=key)), jnp.asarray(draw(2, 5, 8))
    outputs = stack.intermediates(x)
    assert outputs.shape == (DEPTH, 2, 5, 8)
    assert_close(outputs[-1], stack(x), 1e-6)
    first = jax.tree.map(lambda leaf: leaf[0], stack.blocks)
    assert_close(outputs[0], first(x), 1e-6)


@pytest.mark.slow
def test_drop_path_draws_differently_in_every_branch_and_rises_linearly(key):
    """Every branch adds 1 to a channel of its own, so the output shows which branches each example kept."""
    examples, depth, rate = 2000, 3, 0.6
    stack = TransformerStack(depth, 6, 1, 2, drop_path=rate, key=key)
    blocks = jax.tree.map(jnp.zeros_like, stack.blocks)
    channels = jnp.eye(6).reshape(depth, 2, 6)
    where = lambda tree: (tree.attention.out.bias, tree.mlp.fc2.bias)  # noqa: E731
    blocks = eqx.tree_at(where, blocks, (channels[:, 0], channels[:, 1]))
    stack = eqx.tree_at(lambda tree: tree.blocks, stack, blocks)
    y = np.asarray(stack(jnp.zeros((examples, 2, 6)), train=True, key=key))
    assert (y == y[:, :1]).all()  # whole examples
    kept = y[:, 0] != 0
    rates = np.repeat(np.linspace(0, rate, depth), 2)
    np.testing.assert_allclose(y[:, 0], kept / (1 - rates), rtol=1e-6)
    spread = np.sqrt(rates * (1 - rates) / examples)
    assert (np.abs(kept.mean(axis=0) - (1 - rates)) <= 5 * spread).all()
    random = kept[:, 2:].astype(float)
    correlation = np.corrcoef(random.T) - np.eye(4)
    assert np.abs(correlation).max() < 5 / math.sqrt(examples)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_compiled_program_does_not_grow_with_depth(key, remat):
    x = jnp.zeros((2, 5, 8))

    def operations(depth):
        stack = TransformerStack(depth, 8, 2, 16, dropout=0.1, drop_path=0.2, remat=remat, key=key)
        loss = lambda stack: jnp.sum(stack(x, train=True, key=key))  # noqa: E731
        return count_equations(jax.make_jaxpr(jax.grad(loss))(stack).jaxpr)

    assert operations(2) == operations(8) > 100


def count_equations(jaxpr):
    """Equations of a program and of all programs inside it."""
    parameters = jax.tree.leaves([list(equation.params.values()) for equation in jaxpr.eqns])
    inner = [getattr(part, "jaxpr", part) for part in parameters]
    return len(jaxpr.eqns) + sum(count_equations(part) for part in inner if hasattr(part, "eqns"))


def test_unknown_remat_lists_the_known_ones(unchecked, key):
    with pytest.raises(ValueError, match=r"remat 'some' is unknown; choose from \('none', 'dots', 'full'\)"):
        TransformerStack(2, 8, 2, 16, remat="some", key=key)
