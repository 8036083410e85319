"""Attention: every implementation equals a plain softmax in float64; masks, memory, extreme inputs, messages."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from eqvision.layers import Attention, attention

BLOCK = 4
LENGTHS = {"more keys": (5, 9), "more queries": (9, 6), "whole blocks": (8, 8)}
IMPLEMENTATIONS = ["xla", "blocked"]


def draw(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def make_inputs(queries, keys, dtype=np.float32, batch=2, heads=3, width=4, value_width=5):
    """Query, key and value, all different; values have another width than keys."""
    shapes = (queries, heads, width), (keys, heads, width), (keys, heads, value_width)
    return tuple(jnp.asarray(draw(batch, *shape, seed=seed, dtype=dtype)) for seed, shape in enumerate(shapes))


def reference(query, key, value, bias=None, key_mask=None, causal=False):
    """Plain softmax over visible keys; zeros where no key is visible."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1])
    if bias is not None:
        logits = logits + bias
    visible = jnp.ones(logits.shape, bool)
    if key_mask is not None:
        visible &= key_mask[:, None, None, :]
    if causal:
        visible &= jnp.tril(visible, key.shape[1] - query.shape[1])
    any_visible = jnp.any(visible, axis=-1, keepdims=True)
    weights = jax.nn.softmax(jnp.where(any_visible, jnp.where(visible, logits, -jnp.inf), 0.0), axis=-1)
    return jnp.einsum("bhqk,bkhe->bqhe", jnp.where(any_visible, weights, 0.0), value)


def run(implementation):
    if implementation == "reference":
        return reference
    return lambda q, k, v, bias=None, **options: attention(
        q, k, v, bias=bias, implementation=implementation, block_size=BLOCK, **options
    )


def value_and_gradients(implementation, inputs, cotangent, **options):
    """Output and gradients of query, key, value and, where there is one, bias."""

    def both(*inputs):
        y, pullback = jax.vjp(lambda *i: run(implementation)(*i, **options), *inputs)
        return y, pullback(cotangent)

    return jax.jit(both)(*inputs)


# --- equal numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("lengths", list(LENGTHS.values()), ids=list(LENGTHS))
def test_attention_equals_a_plain_softmax_in_float64(assert_close, lengths, masked, causal):
    """Where ``more queries`` meets ``causal``, the first queries see no key; so does example 1 under ``masked``."""
    queries, keys = lengths
    with jax.enable_x64(True):
        bias = jnp.asarray(draw(2, 3, queries, keys, seed=3, dtype=np.float64))
        inputs = (*make_inputs(queries, keys, np.float64), bias)
        cotangent = jnp.asarray(draw(2, queries, 3, 5, seed=4, dtype=np.float64))
        key_mask = jnp.arange(keys)[None, :] < jnp.array([[keys - 2], [0]]) if masked else None
        options = {"key_mask": key_mask, "causal": causal}
        expected = value_and_gradients("reference", inputs, cotangent, **options)
        for implementation in IMPLEMENTATIONS:
            assert_close(value_and_gradients(implementation, inputs, cotangent, **options), expected, 1e-10)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bias_shape", [(1, 1, 7, 9), (1, 3, 1, 9), (2, 1, 7, 1), (1, 1, 1, 1), (2, 3, 1, 1)])
def test_broadcast_bias_equals_a_plain_softmax_in_float64(assert_close, bias_shape, implementation):
    with jax.enable_x64(True):
        inputs = (*make_inputs(7, 9, np.float64), jnp.asarray(draw(*bias_shape, seed=3, dtype=np.float64)))
        cotangent = jnp.asarray(draw(2, 7, 3, 5, seed=4, dtype=np.float64))
        y, gradients = value_and_gradients(implementation, inputs, cotangent)
        expected, expected_gradients = value_and_gradients("reference", inputs, cotangent)
        assert_close(y, expected, 1e-10)
        assert_close(gradients[:3], expected_gradients[:3], 1e-10)
        # A bias that is equal for all keys changes nothing: its gradient is rounding around zero, so no scale.
        assert float(jnp.max(jnp.abs(gradients[3] - expected_gradients[3]))) < 1e-10


@pytest.mark.parametrize("block_size", [1, 3, 7, 64])
def test_every_block_size_gives_equal_numbers(assert_close, block_size):
    inputs, key_mask = make_inputs(7, 9), jnp.arange(9)[None, :] < jnp.array([[9], [4]])
    y = attention(*inputs, key_mask=key_mask, causal=True, implementation="blocked", block_size=block_size)
    assert_close(y, attention(*inputs, key_mask=key_mask, causal=True), 1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_narrow_inputs_give_narrow_outputs_from_float32_logits(assert_close, implementation, dtype):
    inputs = tuple(part.astype(dtype) for part in make_inputs(7, 9))
    y = run(implementation)(*inputs)
    assert y.dtype == dtype
    # Two roundings, of the scaled query and of the weights, and that of the output.
    assert_close(y, reference(*(part.astype(jnp.float32) for part in inputs)), 3 * float(jnp.finfo(dtype).eps))


@pytest.mark.parity
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "additive"])
def test_attention_equals_torch(assert_close, mask, implementation):
    import torch

    inputs = make_inputs(7, 7 if mask == "causal" else 9)
    cotangent, additive = draw(2, 7, 3, 5, seed=4), draw(2, 3, 7, inputs[1].shape[1], seed=5)
    key_mask = np.arange(9)[None, :] < np.array([[8], [3]])
    options = {
        "none": {},
        "causal": {"causal": True},
        "bool": {"key_mask": jnp.asarray(key_mask)},
        "additive": {"bias": jnp.asarray(additive)},
    }[mask]
    theirs = {
        "none": {},
        "causal": {"is_causal": True},
        "bool": {"attn_mask": torch.from_numpy(key_mask[:, None, None, :])},
        "additive": {"attn_mask": torch.from_numpy(additive)},
    }[mask]
    tensors = [torch.from_numpy(np.array(part)).requires_grad_() for part in inputs]
    y = torch.nn.functional.scaled_dot_product_attention(*(part.transpose(1, 2) for part in tensors), **theirs)
    y = y.transpose(1, 2)
    y.backward(torch.from_numpy(cotangent))
    actual, gradients = value_and_gradients(implementation, inputs, cotangent, **options)
    assert_close(actual, y.detach().numpy(), 1e-6)
    assert_close(gradients, tuple(part.grad.numpy() for part in tensors), 1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_attention_under_shard_map_equals_one_device(assert_close, mesh, implementation):
    """The bias is shared by all devices, the rest is split."""
    inputs = (*make_inputs(7, 9, batch=8), jnp.asarray(draw(1, 3, 7, 9, seed=3)))
    cotangent, key_mask = draw(8, 7, 3, 5, seed=4), jnp.arange(9)[None, :] < jnp.arange(1, 9)[:, None]

    def step(inputs, cotangent, key_mask, axes=()):
        def loss(inputs):
            y = run(implementation)(*inputs, key_mask=key_mask)
            total = jnp.vdot(y, cotangent)
            return (lax.psum(total, axes) if axes else total), y

        gradients, y = jax.grad(loss, has_aux=True)(inputs)
        return y, gradients

    split = P("data"), P("data"), P("data"), P()
    sharded = jax.shard_map(
        lambda *inputs: step(*inputs, axes=("data",)),
        mesh=mesh,
        in_specs=(split, P("data"), P("data")),
        out_specs=(P("data"), split),
    )
    expected = jax.jit(step)(inputs, cotangent, key_mask)
    assert_close(jax.jit(sharded)(inputs, cotangent, key_mask), expected, 1e-6)


# --- masks and extremes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_queries_that_see_no_key_give_zeros_and_finite_gradients(implementation):
    inputs, cotangent = make_inputs(7, 9), draw(2, 7, 3, 5, seed=4)
    key_mask = jnp.arange(9)[None, :] < jnp.array([[9], [0]])
    y, gradients = value_and_gradients(implementation, inputs, cotangent, key_mask=key_mask)
    np.testing.assert_array_equal(y[1], 0)
    assert np.abs(y[0]).min() > 0
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient[1], 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_junk_in_padded_keys_changes_nothing(implementation):
    query, key, value = make_inputs(7, 9)
    cotangent = draw(2, 7, 3, 5, seed=4)
    key_mask = jnp.arange(9)[None, :] < jnp.array([[6], [3]])
    junk = lambda part: jnp.where(key_mask[:, :, None, None], part, 1e9)  # noqa: E731
    clean, clean_gradients = value_and_gradients(implementation, (query, key, value), cotangent, key_mask=key_mask)
    inputs = query, junk(key), junk(value)
    y, gradients = value_and_gradients(implementation, inputs, cotangent, key_mask=key_mask)
    np.testing.assert_array_equal(y, clean)
    for gradient, expected in zip(gradients, clean_gradients, strict=True):
        np.testing.assert_array_equal(gradient, expected)
    np.testing.assert_array_equal(np.asarray(gradients[1])[~np.asarray(key_mask)], 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_appending_padded_keys_changes_nothing(assert_close, implementation):
    query, key, value = make_inputs(7, 6)
    longer = lambda part: jnp.pad(part, ((0, 0), (0, 3), (0, 0), (0, 0)), constant_values=1e9)  # noqa: E731
    key_mask = jnp.broadcast_to(jnp.arange(9) < 6, (2, 9))
    y = run(implementation)(query, longer(key), longer(value), key_mask=key_mask)
    assert_close(y, run(implementation)(query, key, value), 1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_order_of_keys_does_not_matter(assert_close, implementation):
    query, key, value = make_inputs(7, 9)
    key_mask, bias = jnp.asarray(draw(2, 9, seed=5) > -0.5), jnp.asarray(draw(1, 3, 7, 9, seed=6))
    order = np.random.default_rng(0).permutation(9)
    y = run(implementation)(query, key, value, bias, key_mask=key_mask)
    shuffled = run(implementation)(query, key[:, order], value[:, order], bias[..., order], key_mask=key_mask[:, order])
    assert_close(shuffled, y, 1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_causal_attention_does_not_see_the_future(implementation):
    """Changing key j changes the queries from j on, and the last query is aligned with the last key."""
    query, key, value = make_inputs(5, 9)
    y = run(implementation)(query, key, value, causal=True)
    changed = run(implementation)(query, key.at[:, 6].add(3.0), value.at[:, 6].add(3.0), causal=True)
    np.testing.assert_array_equal(changed[:, :2], y[:, :2])
    assert np.abs(changed[:, 2:] - y[:, 2:]).min() > 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_logits_do_not_overflow(implementation, dtype):
    """Logits of 1e8 select the largest key."""
    query, key, value = (part.astype(dtype) for part in make_inputs(7, 9))
    inputs = query * 1e4, key * 1e4, value
    y, gradients = value_and_gradients(implementation, inputs, jnp.ones((2, 7, 3, 5), dtype))
    logits = jnp.einsum("bqhd,bkhd->bhqk", *(part.astype(jnp.float32) for part in inputs[:2]))
    winner = jnp.swapaxes(jnp.argmax(logits, axis=-1), 1, 2)
    expected = jnp.take_along_axis(value, winner[..., None], axis=1)
    np.testing.assert_array_equal(y, expected)
    assert all(np.isfinite(np.asarray(gradient, np.float32)).all() for gradient in gradients)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bias_of_minus_infinity_hides_a_key(assert_close, implementation):
    query, key, value = make_inputs(7, 9)
    bias = jnp.where(jnp.arange(9) < 6, 0.0, -jnp.inf)[None, None, None, :]
    cotangent = draw(2, 7, 3, 5, seed=4)
    y, gradients = value_and_gradients(implementation, (query, key, value), cotangent, bias=bias)
    assert_close(y, run(implementation)(query, key[:, :6], value[:, :6]), 1e-6)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


# --- memory ---------------------------------------------------------------------------------------------------------


def temporary_bytes(implementation, length):
    """Of the compiled forward and backward pass; nothing is run."""

    def loss(query, key, value):
        return jnp.sum(attention(query, key, value, implementation=implementation, block_size=128))

    shape = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(shape, shape, shape).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_of_blocked_grows_with_length_and_that_of_xla_with_its_square():
    sizes = {name: [temporary_bytes(name, length) for length in (1024, 2048, 4096)] for name in IMPLEMENTATIONS}
    for shorter, longer in itertools.pairwise(sizes["blocked"]):
        assert longer < 2.1 * shorter
    # Not 16 times: XLA needs four buffers of length x length at 1024 and 2048, and three at 4096.
    assert sizes["xla"][2] > 10 * sizes["xla"][0]
    assert sizes["blocked"][2] < sizes["xla"][2] / 20


# --- the layer ------------------------------------------------------------------------------------------------------


def project(linear, x):
    return x @ linear.weight + (0.0 if linear.bias is None else linear.bias)


def layer_reference(layer, query, key_input, value_input, **options):
    split = lambda x: x.reshape(*x.shape[:2], layer.num_heads, -1)  # noqa: E731
    parts = (layer.query, query), (layer.key, key_input), (layer.value, value_input)
    mixed = reference(*(split(project(linear, x)) for linear, x in parts), **options)
    return project(layer.out, mixed.reshape(query.shape))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("use_bias", [True, False])
def test_layer_equals_its_plain_formula(assert_close, key, use_bias, implementation):
    layer = Attention(12, 3, kv_width=8, use_bias=use_bias, implementation=implementation, key=key)
    if use_bias:
        biases = lambda tree: [linear.bias for linear in (tree.query, tree.key, tree.value, tree.out)]  # noqa: E731
        layer = eqx.tree_at(biases, layer, [jnp.asarray(draw(12, seed=seed)) for seed in range(4)])
    assert (layer.query.bias is not None) == use_bias
    query, key_input, value_input = draw(2, 5, 12), draw(2, 7, 8, seed=1), draw(2, 7, 8, seed=2)
    query, key_input, value_input = map(jnp.asarray, (query, key_input, value_input))
    key_mask = jnp.arange(7)[None, :] < jnp.array([[7], [3]])
    options = {"key_mask": key_mask, "bias": jnp.asarray(draw(1, 3, 5, 7, seed=3))}
    y = layer(query, key_input, value_input, **options)
    assert_close(y, layer_reference(layer, query, key_input, value_input, **options), 1e-6)
    expected = layer_reference(layer, query, key_input, key_input, causal=True)
    assert_close(layer(query, key_input, causal=True), expected, 1e-6)


def test_self_attention_uses_the_query_as_key_and_value(assert_close, key):
    layer, x = Attention(12, 3, key=key), jnp.asarray(draw(2, 5, 12))
    assert_close(layer(x), layer_reference(layer, x, x, x), 1e-6)


@pytest.mark.parity
def test_layer_equals_torch_multihead_attention(assert_close, key):
    import torch

    layer = Attention(12, 3, key=key)
    oracle = torch.nn.MultiheadAttention(12, 3, batch_first=True)
    weights = np.concatenate([np.asarray(part.weight).T for part in (layer.query, layer.key, layer.value)])
    with torch.no_grad():
        oracle.in_proj_weight.copy_(torch.from_numpy(weights))
        oracle.out_proj.weight.copy_(torch.from_numpy(np.array(layer.out.weight).T.copy()))
    x, other = draw(2, 5, 12), draw(2, 7, 12, seed=1)
    key_mask = np.arange(7)[None, :] < np.array([[7], [3]])
    expected, _ = oracle(*map(torch.from_numpy, (x, other, other)), key_padding_mask=torch.from_numpy(~key_mask))
    y = layer(jnp.asarray(x), jnp.asarray(other), key_mask=jnp.asarray(key_mask))
    assert_close(y, expected.detach().numpy(), 1e-6)


def test_dropout_acts_on_the_output_in_training_only(key):
    layer, x = Attention(12, 3, dropout=0.5, key=key), jnp.asarray(draw(8, 16, 12))
    y, dropped = layer(x), layer(x, train=True, key=key)
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], 2 * y[kept], rtol=1e-6)
    assert 0.4 < kept.mean() < 0.6
    np.testing.assert_array_equal(layer(x, key=key), y)


# --- messages -------------------------------------------------------------------------------------------------------


def test_cudnn_in_float32_says_what_to_do():
    message = "cudnn needs float16 or bfloat16, got float32; set compute_dtype or use 'xla'"
    with pytest.raises(ValueError, match=message):
        attention(*make_inputs(7, 9), implementation="cudnn")


def test_unknown_implementation_lists_the_known_ones(unchecked):
    with pytest.raises(ValueError, match=r"'flash' is unknown; choose from \('xla', 'cudnn', 'blocked'\)"):
        attention(*make_inputs(7, 9), implementation="flash")


def test_width_that_heads_do_not_divide_is_refused(key):
    with pytest.raises(ValueError, match="width 10 cannot be split into 3 heads"):
        Attention(10, 3, key=key)
