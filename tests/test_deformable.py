"""Deformable sampling and attention against a plain float64 loop, hand-made maps, finite differences, and torch."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import deformable as benchmark
from eqvision.layers import DeformableAttention
from eqvision.ops import multi_scale_deformable_sampling

GRID = ((3, 4), (2, 5), (1, 1))
BATCH, QUERIES, HEADS, POINTS, WIDTH = 2, 5, 2, 3, 4
apply = jax.jit(DeformableAttention.__call__)
sampling = jax.jit(multi_scale_deformable_sampling, static_argnames=("block_size", "remat"))


def random_inputs(rng, grid=GRID):
    """Float64; a third of the locations lies outside."""
    values = tuple(rng.normal(size=(BATCH, h, w, HEADS, WIDTH)) for h, w in grid)
    locations = rng.uniform(-0.25, 1.25, size=(BATCH, QUERIES, HEADS, len(grid), POINTS, 2))
    return values, locations, rng.uniform(size=locations.shape[:-1])


def to_float32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def by_loops(values, locations, weights):
    """The definition, one sample after the other, in float64."""
    result = np.zeros((*weights.shape[:3], values[0].shape[-1]))
    for b, q, head, level, point in np.ndindex(*weights.shape):
        cells = values[level][b, :, :, head]
        height, width = cells.shape[:2]
        x, y = locations[b, q, head, level, point] * (width, height) - 0.5
        for row in range(height):
            for column in range(width):
                share = max(0.0, 1 - abs(x - column)) * max(0.0, 1 - abs(y - row))
                result[b, q, head] += weights[b, q, head, level, point] * share * cells[row, column]
    return result


class TestSampling:
    # At once; head by head; head by head in blocks of two queries, the last of which is short.
    @pytest.mark.parametrize("block_size", [None, pytest.param(10, marks=pytest.mark.slow), 4])
    def test_equals_the_definition(self, rng, assert_close, block_size):
        inputs = random_inputs(rng)
        assert_close(sampling(*to_float32(inputs), block_size=block_size), by_loops(*inputs), 1e-6)

    @pytest.mark.parametrize(
        ("block_size", "remat"),
        [(4, True), *(pytest.param(*options, marks=pytest.mark.slow) for options in ((4, False), (None, True)))],
    )
    def test_gradients_are_the_differences(self, rng, assert_close, block_size, remat):
        inputs, towards = random_inputs(rng), rng.normal(size=(BATCH, QUERIES, HEADS, WIDTH))

        def dot(*inputs):
            return jnp.sum(multi_scale_deformable_sampling(*inputs, block_size=block_size, remat=remat) * towards)

        gradients = jax.jit(jax.grad(dot, argnums=(0, 1, 2)))(*to_float32(inputs))
        for number in range(3):
            direction = jax.tree.map(lambda x: rng.normal(size=x.shape), inputs[number])
            moved = [list(inputs), list(inputs)]
            for sign, copy in zip((1e-6, -1e-6), moved, strict=True):
                copy[number] = jax.tree.map(lambda x, d, sign=sign: x + sign * d, inputs[number], direction)
            expected = (np.sum(by_loops(*moved[0]) * towards) - np.sum(by_loops(*moved[1]) * towards)) / 2e-6
            parts = jax.tree.map(lambda g, d: np.sum(np.asarray(g, np.float64) * d), gradients[number], direction)
            assert_close(sum(jax.tree.leaves(parts)), expected, 1e-5)

    def test_a_ramp_gives_the_place(self):
        """One point of weight 1 on f(x, y) = 10 x + y at the cells' centres, read between them."""
        rows, columns = np.mgrid[:4, :6] + 0.5
        ramp = jnp.asarray(10 * columns + rows, jnp.float32)[None, :, :, None, None]
        at = jnp.asarray([[0.5, 0.5], [0.31, 0.77], [0.5 / 6, 0.5 / 4]]).reshape(1, 3, 1, 1, 1, 2)
        got = sampling((ramp,), at, jnp.ones(at.shape[:-1]))
        np.testing.assert_allclose(got.ravel(), [32.0, 18.6 + 3.08, 5.5], rtol=1e-6)

    def test_the_border_fades_to_zero_and_outside_is_nothing(self):
        """At the map's edge half of a sample is zeros, at its corner three quarters."""
        x = [0.0, 0.0, 0.5, -0.125, -0.124, 1.125, 7.0, -1e9, np.inf, np.nan]
        y = [0.5, 0.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
        at = jnp.asarray([x, y]).T.reshape(1, len(x), 1, 1, 1, 2)
        got = sampling((jnp.ones((1, 4, 4, 1, 1)),), at, jnp.ones(at.shape[:-1]))
        np.testing.assert_allclose(got.ravel(), [0.5, 0.25, 0.5, 0, 0.004, 0, 0, 0, 0, 0], atol=1e-6)

    def test_bfloat16_values_are_read_at_exact_places(self, rng):
        """A location in bfloat16 would be off by up to a cell on a map of 256."""
        ramp = jnp.arange(256, dtype=jnp.bfloat16).reshape(1, 1, 256, 1, 1)
        at = jnp.asarray([[200.5 / 256, 0.5], [77.5 / 256, 0.5]]).reshape(1, 2, 1, 1, 1, 2)
        got = sampling((ramp,), at, jnp.ones(at.shape[:-1]))
        assert got.dtype == jnp.bfloat16
        assert got.ravel().tolist() == [200, 77]

    @pytest.mark.slow
    def test_blocks_bound_the_memory_of_the_gradient(self):
        values = (jax.ShapeDtypeStruct((1, 32, 64, 4, 16), jnp.float32),)
        locations = jax.ShapeDtypeStruct((1, 2048, 4, 1, 4, 2), jnp.float32)
        weights = jax.ShapeDtypeStruct((1, 2048, 4, 1, 4), jnp.float32)

        def temporaries(block_size):
            def total(*inputs):
                return jnp.sum(multi_scale_deformable_sampling(*inputs, block_size=block_size) ** 2)

            compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(values, locations, weights).compile()
            return compiled.memory_analysis().temp_size_in_bytes

        assert temporaries(256) < 0.3 * temporaries(None)

    def test_errors_say_what_does_not_fit(self, rng):
        values, locations, weights = to_float32(random_inputs(rng))
        with pytest.raises(ValueError, match=r"2 maps of values, locations of 3 levels .* give one map per level"):
            multi_scale_deformable_sampling(values[:2], locations, weights)
        with pytest.raises(ValueError, match=r"block_size must be at least 1 or None, got 0"):
            multi_scale_deformable_sampling(values, locations, weights, block_size=0)

    def test_errors_without_shape_checks(self, rng, unchecked):
        values, locations, weights = to_float32(random_inputs(rng))
        wrong = (values[0], values[1][:, :, :, :1], values[2])
        with pytest.raises(ValueError, match=r"values of level 1 have shape \(2, 2, 5, 1, 4\); .* 2 heads, channels"):
            multi_scale_deformable_sampling(wrong, locations, weights)


def layer_inputs(rng, last=2, width=16, queries=QUERIES):
    """Maps with padding on the right of the second image; references as a detector gives them."""
    query = rng.normal(size=(BATCH, queries, width)).astype(np.float32)
    maps = tuple(rng.normal(size=(BATCH, h, w, width)).astype(np.float32) for h, w in GRID)
    masks = tuple(np.broadcast_to(np.arange(w) < [[[w]], [[(w + 1) // 2]]], (BATCH, h, w)) for h, w in GRID)
    reference = rng.uniform(0.1, 0.9, size=(BATCH, queries, len(GRID), last)).astype(np.float32)
    return tuple(jax.tree.map(jnp.asarray, (query, reference, maps, masks)))


def random_layer(key, width=16, num_heads=4):
    """Every parameter random."""
    layer = DeformableAttention(width, num_heads, num_levels=len(GRID), num_points=POINTS, key=key)
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.5, x.dtype), layer)


class TestLayer:
    def test_fresh_offsets_look_around(self, key):
        layer = DeformableAttention(16, 8, num_levels=2, num_points=3, key=key)
        assert not np.any(layer.sampling_offsets.weight)
        assert not np.any(layer.attention_weights.weight)
        assert not np.any(layer.value_proj.bias)
        assert np.any(layer.value_proj.weight)
        offsets = np.asarray(layer.sampling_offsets.bias).reshape(8, 2, 3, 2)
        around = [[1, 0], [1, 1], [0, 1], [-1, 1], [-1, 0], [-1, -1], [0, -1], [1, -1]]
        for level in range(2):
            for point in range(3):
                np.testing.assert_allclose(offsets[:, level, point], np.multiply(around, point + 1), atol=1e-6)

    def test_a_fresh_layer_averages_its_points(self, key, rng, assert_close):
        """On maps that are constant, and no padding in reach, only the projections are left."""
        layer = DeformableAttention(8, 2, num_levels=2, num_points=2, key=key)
        maps = tuple(jnp.broadcast_to(jnp.arange(8.0), (1, size, size, 8)) for size in (12, 8))
        masks = tuple(jnp.ones(level.shape[:3], bool) for level in maps)
        query = jnp.asarray(rng.normal(size=(1, 3, 8)), jnp.float32)
        got = apply(layer, query, jnp.full((1, 3, 2, 2), 0.5), maps, masks)
        expected = layer.output_proj(layer.value_proj(jnp.arange(8.0)[None]))
        assert_close(got, jnp.broadcast_to(expected, (1, 3, 8)), 1e-6)

    @pytest.mark.slow
    def test_what_lies_in_padding_changes_nothing(self, key, rng):
        """NaN there gives the same output and the same gradients."""
        layer = random_layer(key)
        query, reference, maps, masks = layer_inputs(rng)
        junk = tuple(jnp.where(mask[..., None], level, jnp.nan) for level, mask in zip(maps, masks, strict=True))

        @jax.jit
        def run(layer, maps):
            def total(layer):
                return jnp.sum(jnp.sin(layer(query, reference, maps, masks)))

            return jax.value_and_grad(total)(layer)

        first, second = run(layer, maps), run(layer, junk)
        assert np.isfinite(first[0])
        jax.tree.map(np.testing.assert_array_equal, first, second)

    @pytest.mark.slow
    def test_one_device_equals_several(self, key, rng, mesh, assert_close):
        """Value and gradients under ``shard_map``, in blocks."""
        layer = DeformableAttention(16, 4, num_levels=3, num_points=POINTS, block_size=4, key=key)
        inputs = jax.tree.map(lambda x: jnp.tile(x, (4,) + (1,) * (x.ndim - 1)), layer_inputs(rng))

        def total(layer, inputs):
            return jnp.sum(jnp.sin(layer(*inputs)))

        expected = jax.jit(jax.value_and_grad(total))(layer, inputs)

        def part(layer, inputs):
            value, gradient = jax.value_and_grad(total)(layer, inputs)
            return jax.lax.psum(value, "data"), gradient

        specs = (PartitionSpec(), PartitionSpec("data"))
        sharded = jax.jit(jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=PartitionSpec()))
        assert_close(sharded(layer, inputs), expected, 1e-5)

    def test_errors_say_what_was_given(self, key, rng):
        layer = random_layer(key)
        query, reference, maps, masks = layer_inputs(rng, last=3)
        with pytest.raises(ValueError, match=r"last axis of reference holds a point \(2\) or a box \(4\), got"):
            layer(query, reference, maps, masks)
        with pytest.raises(ValueError, match="built for 3 levels, and was given 2 maps, 3 masks and references to 3"):
            layer(query, reference[..., :2], maps[:2], masks)
        with pytest.raises(ValueError, match="width 10 cannot be split into 4 heads"):
            DeformableAttention(10, 4, key=key)


@pytest.mark.slow
def test_the_benchmark_compares_equal_forms(capsys):
    """It raises where they differ, and writes one row for each."""
    benchmark.main(["--rounds", "1", "--width", "16", "--image", "64", "96"])
    lines = capsys.readouterr().out.splitlines()
    assert "Command: `python benchmarks/deformable.py --rounds 1 --width 16 --image 64 96`" in lines
    rows = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    assert rows == ["form", *benchmark.forms(1)]


@pytest.mark.parity
class TestAgainstTransformers:
    @pytest.mark.parametrize("block_size", [None, 4])
    def test_sampling_and_its_gradients(self, rng, assert_close, block_size):
        import torch
        from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

        values, locations, weights = to_float32(random_inputs(rng))
        leaves = [torch.tensor(np.asarray(x)).requires_grad_() for x in (*values, locations, weights)]
        flat = torch.cat([x.flatten(1, 2) for x in leaves[:-2]], dim=1)
        theirs = MultiScaleDeformableAttention()(flat, None, GRID, None, *leaves[-2:], 64)
        theirs.sin().sum().backward()

        def total(*inputs):
            result = multi_scale_deformable_sampling(*inputs, block_size=block_size)
            return jnp.sum(jnp.sin(result)), result

        gradients, ours = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(values, locations, weights)
        assert_close(ours.reshape(BATCH, QUERIES, -1), theirs.detach().numpy(), 1e-5)
        for got, leaf in zip((*gradients[0], *gradients[1:]), leaves, strict=True):
            assert_close(got, leaf.grad.numpy(), 1e-5)

    @pytest.mark.parametrize("last", [2, 4])
    def test_the_layer(self, key, rng, assert_close, last):
        import torch

        theirs = their_layer()
        layer = random_layer(key)
        copy_parameters(layer, theirs)
        query, reference, maps, masks = layer_inputs(rng, last)
        with torch.no_grad():
            expected, _ = theirs(
                hidden_states=as_torch(query),
                attention_mask=torch.cat([as_torch(mask).flatten(1) for mask in masks], dim=1),
                encoder_hidden_states=torch.cat([as_torch(level).flatten(1, 2) for level in maps], dim=1),
                reference_points=as_torch(reference),
                spatial_shapes=torch.tensor(GRID),
                spatial_shapes_list=GRID,
            )
        assert_close(apply(layer, query, reference, maps, masks), expected.numpy(), 1e-5)

    def test_the_first_offsets(self, key, assert_close):
        theirs = their_layer()
        ours = DeformableAttention(16, 4, num_levels=len(GRID), num_points=POINTS, key=key)
        assert_close(ours.sampling_offsets.bias, theirs.sampling_offsets.bias.detach().numpy(), 1e-6)


def as_torch(x):
    import torch

    return torch.tensor(np.asarray(x))


def their_layer():
    from transformers import DeformableDetrConfig, ResNetConfig
    from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrEncoder

    config = DeformableDetrConfig(
        backbone_config=ResNetConfig(),
        use_timm_backbone=False,
        d_model=16,
        num_feature_levels=len(GRID),
        encoder_layers=1,
        encoder_attention_heads=4,
        encoder_n_points=POINTS,
    )
    return DeformableDetrEncoder(config).eval().layers[0].self_attn


def copy_parameters(ours, theirs):
    import torch

    with torch.no_grad():
        for name in ("value_proj", "sampling_offsets", "attention_weights", "output_proj"):
            linear = getattr(ours, name)
            getattr(theirs, name).weight.copy_(as_torch(linear.weight.T))
            getattr(theirs, name).bias.copy_(as_torch(linear.bias))
