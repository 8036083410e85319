"""RoIAlign against a plain port of the published loop in float64, closed forms, and torch's bilinear sampling."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from roi_references import align_by_loops, sample

from eqvision.ops import fpn_levels, roi_align

STRIDES = (4, 8, 16)
STATIC = ("strides", "bins", "sampling_ratio", "aligned", "max_samples", "block_size")
apply = jax.jit(roi_align, static_argnames=STATIC)


def expected_values(features, boxes, levels, **options):
    """``align_by_loops`` of every box."""
    rows = []
    for image, (row, chosen) in enumerate(zip(boxes, levels, strict=True)):
        pairs = zip(row, chosen, strict=True)
        rows.append([align_by_loops(features[n][image], box, stride=STRIDES[n], **options) for box, n in pairs])
    return np.array(rows)


def random_case(rng, channels=3):
    """Boxes inside, across the border, outside, empty, thin, inverted, and covering all."""
    features = tuple(rng.normal(size=(2, h, w, channels)) for h, w in ((12, 16), (6, 8), (3, 4)))
    corners = rng.uniform(-10, 60, size=(2, 4, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(0, 40, size=corners.shape)], axis=-1)
    special = [[-90, -90, -60, -60], [20, 20, 20, 20], [3, 20, 60, 20.5], [30, 30, 24, 28], [0, 0, 64, 48]]
    boxes = np.concatenate([boxes, np.broadcast_to(special, (2, 5, 4))], axis=1)
    return features, boxes, rng.integers(0, 3, size=(2, 9))


def to_jax(features, boxes, levels):
    return tuple(jnp.asarray(x, jnp.float32) for x in features), jnp.asarray(boxes, jnp.float32), jnp.asarray(levels)


def run(features, boxes, levels, valid=None, *, sampling_ratio=0, aligned=True):
    """One program for most tests: shapes of ``random_case``, 3 bins, blocks of 4 boxes."""
    valid = np.ones(levels.shape, bool) if valid is None else valid
    inputs = (*to_jax(features, boxes, levels), jnp.asarray(valid))
    options = {"sampling_ratio": sampling_ratio, "aligned": aligned}
    return compiled(*inputs, **options)


@functools.partial(jax.jit, static_argnames=("sampling_ratio", "aligned"))
def compiled(features, boxes, levels, valid, *, sampling_ratio, aligned):
    options = {"strides": STRIDES, "bins": 3, "block_size": 4}
    return roi_align(features, boxes, levels, valid=valid, sampling_ratio=sampling_ratio, aligned=aligned, **options)


def filled(*boxes):
    """These boxes, and empty ones behind, for both images; all are read from the finest map."""
    rows = np.zeros((2, 9, 4))
    rows[:, : len(boxes)] = boxes
    return rows, np.zeros((2, 9), int)


class TestValues:
    @pytest.mark.parametrize(
        ("sampling_ratio", "aligned"),
        [(0, True), (2, False), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((2, True), (0, False)))],
    )
    def test_equals_the_definition(self, rng, assert_close, sampling_ratio, aligned):
        case, options = random_case(rng), {"sampling_ratio": sampling_ratio, "aligned": aligned}
        got = run(*case, **options)
        assert_close(got.values, expected_values(*case, bins=3, **options), 2e-6)
        assert not got.overflow.any()

    @pytest.mark.parametrize(("sampling_ratio", "aligned", "moved"), [(0, True, 0.5), (2, False, 0.0)])
    def test_a_ramp_gives_the_bin_centres(self, rng, sampling_ratio, aligned, moved):
        """Half a cell less where aligned, for coordinates count from the centre of the first cell."""
        features = [np.array(level) for level in random_case(rng)[0]]
        rows, columns = np.mgrid[:12, :16]
        features[0][:] = (10.0 * columns + rows)[None, :, :, None]
        got = run(features, *filled([8, 12, 56, 36]), sampling_ratio=sampling_ratio, aligned=aligned).values
        centres_x, centres_y = 2 + (np.arange(3) + 0.5) * 4, 3 + (np.arange(3) + 0.5) * 2
        expected = 10 * (centres_x[None] - moved) + centres_y[:, None] - moved
        np.testing.assert_allclose(got[0, 0, :, :, 0], expected, rtol=1e-6)

    def test_a_constant_stays_and_far_outside_is_zero(self, rng):
        """A box more than a cell outside reads zeros, one that only reaches out the border; infinite ones nothing."""
        features = tuple(np.full(level.shape, 3.0) for level in random_case(rng)[0])
        odd = [np.nan, 0, 8, 8], [0, 0, np.inf, 8], [0, 0, 2000, 8]
        boxes = filled([-3.9, -3.9, 20, 20], [-30, 0, -12, 20], [5, 5, 5, 5], *odd)
        got = run(features, *boxes)
        np.testing.assert_allclose(got.values[0, :6, 0, 0, 0], [3, 0, 0, 0, 0, 3 * 6 / 64], atol=1e-6)
        assert got.overflow[0].tolist() == [False] * 5 + [True] + [False] * 3  # 500 cells in 3 bins
        fixed = run(features, *boxes, sampling_ratio=2, aligned=False)
        np.testing.assert_allclose(fixed.values[0, :5, 0, 0, 0], [3, 0, 3, 0, 0], atol=1e-6)

    def test_junk_in_rows_that_are_not_valid_changes_nothing(self, rng):
        features, boxes, levels = random_case(rng)
        valid = np.arange(9) < [[5], [9]]
        junk = np.where(valid[..., None], boxes, [np.nan, np.inf, -np.inf, 1e30]), np.where(valid, levels, -77)
        clean = np.where(valid[..., None], boxes, 0.0), np.where(valid, levels, 0)
        got, expected = run(features, *junk, valid), run(features, *clean, valid)
        jax.tree.map(np.testing.assert_array_equal, got, expected)
        assert not np.any(got.values[0, 5:])
        assert np.any(got.values[1, 8])

    @pytest.mark.slow
    def test_the_limit_of_samples_is_kept(self, rng, assert_close):
        features = rng.normal(size=(1, 12, 12, 2))
        boxes = np.array([[[0.0, 0, 48, 8], [0, 0, 16, 16]]])
        options = {"strides": (4,), "bins": 2, "aligned": True}
        got = apply(*to_jax((features,), boxes, np.zeros((1, 2), int)), max_samples=3, **options)
        assert got.overflow.tolist() == [[True, False]]
        # 3 of the 6 samples along x, spread over the bin; along y the one that is asked for.
        expected = np.zeros((2, 2, 2))
        for p, q, j in np.ndindex(2, 2, 3):
            expected[p, q] += sample(features[0], p + 0.5 - 0.5, (q + (j + 0.5) / 3) * 6 - 0.5) / 3
        assert_close(got.values[0, 0], expected, 2e-6)

    @pytest.mark.slow
    def test_types(self, rng):
        features, boxes, levels = to_jax(*random_case(rng))
        exact = apply(features, boxes, levels, strides=STRIDES, bins=2)
        half = apply(tuple(x.astype(jnp.bfloat16) for x in features), boxes, levels, strides=STRIDES, bins=2)
        assert half.values.dtype == jnp.bfloat16
        np.testing.assert_allclose(half.values.astype(jnp.float32), exact.values, atol=0.03)

    def test_no_boxes(self):
        got = apply((jnp.ones((2, 4, 4, 3)),), jnp.zeros((2, 0, 4)), jnp.zeros((2, 0), int), strides=(4,), bins=2)
        assert got.values.shape == (2, 0, 2, 2, 3)


class TestGradients:
    @pytest.mark.parametrize("sampling_ratio", [0, pytest.param(2, marks=pytest.mark.slow)])
    def test_they_are_the_transpose(self, rng, assert_close, sampling_ratio):
        """RoIAlign is linear in the maps: <g, align(d)> = <gradient, d> for every direction d."""
        features, boxes, levels = random_case(rng)
        options = {"bins": 3, "sampling_ratio": sampling_ratio, "aligned": True}
        towards = rng.normal(size=(2, 9, 3, 3, 3))

        def dot(features, boxes, levels, valid):
            values = roi_align(features, boxes, levels, strides=STRIDES, block_size=4, valid=valid, **options).values
            return jnp.sum(values * towards)

        gradient = jax.jit(jax.grad(dot, argnums=(0, 1)))
        gradients, to_boxes = gradient(*to_jax(features, boxes, levels), np.ones((2, 9), bool))
        direction = tuple(rng.normal(size=x.shape) for x in features)
        expected = np.sum(expected_values(direction, boxes, levels, **options) * towards)
        got = sum(np.sum(np.asarray(g, np.float64) * d) for g, d in zip(gradients, direction, strict=True))
        assert_close(got, expected, 1e-5)
        assert not np.any(to_boxes)
        valid = np.arange(9) < [[5], [9]]
        junk = np.where(valid[..., None], boxes, np.nan), np.where(valid, levels, 99)
        clean = np.where(valid[..., None], boxes, 0.0), np.where(valid, levels, 0)
        pair = [gradient(*to_jax(features, *each), valid) for each in (junk, clean)]
        jax.tree.map(np.testing.assert_array_equal, *pair)

    @pytest.mark.slow
    def test_shares_sum_to_one(self):
        """The gradient of the mean over bins, inside the map."""
        boxes = jnp.asarray([[[5.0, 6.0, 25.0, 27.0]]])

        def mean(features):
            return jnp.mean(roi_align(features, boxes, jnp.zeros((1, 1), int), strides=(4,), bins=3).values)

        gradient = jax.jit(jax.grad(mean))((jnp.zeros((1, 8, 8, 1)),))
        np.testing.assert_allclose(np.sum(gradient[0]), 1, rtol=1e-6)

    @pytest.mark.slow
    def test_one_device_equals_several(self, rng, mesh, assert_close):
        features, boxes, levels = jax.tree.map(
            lambda x: jnp.tile(x, (4,) + (1,) * (x.ndim - 1)), to_jax(*random_case(rng))
        )

        def gradient(features, boxes, levels):
            def total(features):
                return jnp.sum(
                    jnp.sin(roi_align(features, boxes, levels, strides=STRIDES, bins=3, block_size=4).values)
                )

            return jax.grad(total)(features)

        expected = jax.jit(gradient)(features, boxes, levels)
        data = PartitionSpec("data")
        sharded = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=data, out_specs=data))
        assert_close(sharded(features, boxes, levels), expected, 1e-6)
        constant = jax.jit(
            jax.shard_map(gradient, mesh=mesh, in_specs=(PartitionSpec(), data, data), out_specs=PartitionSpec())
        )
        same = tuple(x[:1] for x in features)
        summed = constant(same, boxes[:8].reshape(8, 9, 4)[:, :2], levels[:8, :2])
        alone = gradient(tuple(jnp.tile(x, (8, 1, 1, 1)) for x in same), boxes[:8, :2], levels[:8, :2])
        assert_close(summed, tuple(x.sum(axis=0, keepdims=True) for x in alone), 1e-6)

    @pytest.mark.slow
    def test_memory_stays_within_the_budget(self):
        """512 boxes on the pyramid of a 1024 x 1024 image: 89 MB are the table, and 89 the gradient of it."""
        features = tuple(jax.ShapeDtypeStruct((1, n, n, 256), jnp.float32) for n in (256, 128, 64, 32))
        boxes, levels = jax.ShapeDtypeStruct((1, 512, 4), jnp.float32), jax.ShapeDtypeStruct((1, 512), jnp.int32)

        def total(features, boxes, levels, ratio):
            pooled = roi_align(features, boxes, levels, strides=(4, 8, 16, 32), bins=7, sampling_ratio=ratio)
            return jnp.sum(pooled.values**2)

        def temporaries(function, ratio):
            compiled = jax.jit(function, static_argnums=3).lower(features, boxes, levels, ratio).compile()
            return compiled.memory_analysis().temp_size_in_bytes

        for ratio in (0, 2):
            assert temporaries(total, ratio) < 0.2e9
            assert temporaries(jax.grad(total), ratio) < 0.35e9


def test_levels():
    """Sides of 112, 224 and 448 are the first of their levels; area decides; odd boxes go to the finest.

    Just below 224 the rules differ: 1e-6 of the logarithm lifts it over the border, a part of the quotient does not.
    """
    sides = np.array([1, 111.9, 112, 223.9, 224, 447.9, 448, 3000])
    squares = np.stack([0 * sides + 5, 0 * sides + 9, 5 + sides, 9 + sides], axis=-1)
    odd = [0, 0, 1344, 9.4], [7, 7, 7, 7], [9, 9, 2, 700], [0, 0, np.inf, 3], [np.nan, 0, 1, 1]
    near = 224 * (1 - 4e-7)
    boxes = jnp.asarray(np.concatenate([squares, odd, [[0, 0, near, near]]]), jnp.float32)
    levels = jax.jit(fpn_levels, static_argnames=("num_levels", "finest", "rule"))
    for rule, last in (("torchvision", 2), ("detectron2", 1), ("mmdet", 1)):
        expected = [0, 0, 1, 1, 2, 2, 3, 3, 1, 0, 0, 0, 0, last]
        assert levels(boxes, num_levels=4, rule=rule).tolist() == expected
    expected = [0, 0, 0, 0, 1, 1, 2, 2, 0, 0, 0, 0, 0, 1]
    assert levels(boxes, num_levels=3, finest=3, rule="torchvision").tolist() == expected


def test_errors_say_what_does_not_fit(rng, unchecked):
    features, boxes, levels = to_jax(*random_case(rng))
    with pytest.raises(ValueError, match="3 maps with 2 strides; give one stride for each map"):
        roi_align(features, boxes, levels, strides=(4, 8), bins=2)
    with pytest.raises(ValueError, match="bins must be at least 1, got 0"):
        roi_align(features, boxes, levels, strides=STRIDES, bins=0)
    with pytest.raises(ValueError, match="sampling_ratio must be at least 0, got -1"):
        roi_align(features, boxes, levels, strides=STRIDES, bins=2, sampling_ratio=-1)
    with pytest.raises(ValueError, match="fpn_levels: rule 'Torchvision' does not exist; nearest: torchvision"):
        fpn_levels(boxes, num_levels=4, rule="Torchvision")


@pytest.mark.parity
def test_inside_it_is_torch_grid_sample(rng, assert_close):
    """At the samples' places, on a box that keeps a cell away from the border."""
    torch = pytest.importorskip("torch")
    level = rng.normal(size=(1, 20, 24, 5))
    box, bins, ratio = np.array([13.0, 9.5, 71.3, 60.1]), 4, 3
    at_x, at_y = (
        (box[i] + (np.arange(bins * ratio) + 0.5) * (box[i + 2] - box[i]) / (bins * ratio)) / 4 for i in range(2)
    )
    grid = np.stack(np.meshgrid(at_x / 24 * 2 - 1, at_y / 20 * 2 - 1), axis=-1)[None]
    maps = torch.tensor(level).permute(0, 3, 1, 2)
    samples = torch.nn.functional.grid_sample(maps, torch.tensor(grid), align_corners=False)
    expected = torch.nn.functional.avg_pool2d(samples, ratio)[0].permute(1, 2, 0).numpy()
    got = apply(
        *to_jax((level,), box[None, None], np.zeros((1, 1), int)), strides=(4,), bins=bins, sampling_ratio=ratio
    )
    assert_close(got.values[0, 0], expected, 5e-6)  # float32 places of samples, up to 20 cells from the origin
