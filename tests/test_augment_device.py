"""Mixup, CutMix and random erasing against their definitions in numpy, and what must hold for every key."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from eqvision.data import augment_batch, cutmix, mix_batch, mixup, random_erasing
from eqvision.data.device_augment import cutmix_shares, draw_shares
from eqvision.losses import softmax_cross_entropy, weighted_mean
from eqvision.recipes import AugmentConfig

CLASSES = 5
BOTH = AugmentConfig(mixup=0.8, cutmix=1.0)


def batch(b=6, h=12, w=10, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((b, h, w, 3)).astype(np.float32)
    labels = rng.integers(0, CLASSES, b).astype(np.int32)
    return jnp.asarray(images), jnp.asarray(labels), jnp.ones(b)


def one_hot(labels):
    return jnp.eye(CLASSES)[labels]


def keys(count, seed=1):
    return jax.random.split(jax.random.key(seed), count)


@pytest.fixture(scope="module")
def many():
    """2000 draws of the shares of CutMix and of mixup, at 12 x 10 pixels."""
    cut = jax.jit(jax.vmap(lambda k: draw_shares(k, (12, 10), mixup=0.0, cutmix=1.0)))(keys(2000))
    mix = jax.jit(jax.vmap(lambda k: draw_shares(k, (12, 10), mixup=0.8, cutmix=0.0)))(keys(2000))
    return jax.device_get((cut, mix))


# Shares


def test_cutmix_share_of_the_label_is_the_area_of_a_rectangle(many):
    (pixels, label), _ = many
    assert set(np.unique(pixels)) == {0.0, 1.0}
    np.testing.assert_allclose(label, pixels.mean(axis=(1, 2)), atol=1e-6)
    rows, columns = pixels.any(axis=2), pixels.any(axis=1)
    np.testing.assert_array_equal(pixels, rows[:, :, None] * columns[:, None, :])
    for spans in (rows, columns):  # one run of neighbours each
        assert (np.abs(np.diff(np.pad(spans.astype(int), ((0, 0), (1, 1))), axis=1)).sum(axis=1) <= 2).all()
    assert label.min() == 0
    assert label.max() == pytest.approx(10 * 8 / 120)  # sides are even and stay below the whole
    assert (rows.mean(axis=0) > 0.2).all()


def cutmix_area(rng, height, width):
    """Yun et al. 2019, section 3 and algorithm 1, as timm computes it."""
    side = np.sqrt(1 - rng.beta(1.0, 1.0))
    spans = []
    for length in (height, width):
        half, centre = int(length * side) // 2, rng.integers(length)
        spans.append(min(centre + half, length) - max(centre - half, 0))
    return spans[0] * spans[1] / (height * width)


def test_cutmix_areas_are_distributed_as_the_reference(many):
    rng = np.random.default_rng(0)
    expected = np.array([cutmix_area(rng, 12, 10) for _ in range(20000)])
    actual = many[0].label
    assert abs(actual.mean() - expected.mean()) < 0.015
    for quantile in (0.25, 0.5, 0.75, 0.95):
        assert abs(np.quantile(actual, quantile) - np.quantile(expected, quantile)) < 0.035


@pytest.mark.parametrize(
    ("ratio", "row", "column", "expected"),
    [
        (0.75, 0.5, 0.5, (slice(3, 9), slice(3, 7))),  # half of 12 x 10, odd sides made even, about (6, 5)
        (0.75, 0.0, 0.99, (slice(0, 3), slice(7, 10))),  # clipped at two edges
        (1.0, 0.5, 0.5, (slice(0, 0), slice(0, 0))),
        (0.0, 0.5, 0.5, (slice(0, 12), slice(0, 10))),
    ],
)
def test_cutmix_rectangles_by_hand(ratio, row, column, expected):
    pixels, label = cutmix_shares(*map(jnp.float32, (ratio, row, column)), (12, 10))
    wanted = np.zeros((12, 10))
    wanted[expected] = 1
    np.testing.assert_array_equal(pixels, wanted)
    assert float(label) == pytest.approx(wanted.mean())


def test_mixup_shares_follow_the_beta_distribution(many):
    stats = pytest.importorskip("scipy.stats")
    pixels, label = many[1]
    np.testing.assert_array_equal(pixels, np.broadcast_to(label[:, None, None], pixels.shape))
    assert stats.kstest(label, stats.beta(0.8, 0.8).cdf).pvalue > 1e-3


# Mixing


@pytest.mark.parametrize("b", [1, 5, 6])
def test_mixup_is_its_formula(b, key, assert_close):
    images, labels, _ = batch(b)
    rows = one_hot(labels)
    mixed, soft = mixup(images, rows, key, alpha=0.8)
    share = np.asarray(draw_shares(key, (12, 10), mixup=0.8, cutmix=0.0).label)
    assert 0.02 < share < 0.98
    assert_close(mixed, (1 - share) * images + share * images[::-1], 1e-6)
    assert_close(soft, (1 - share) * rows + share * rows[::-1], 1e-6)
    inside = (mixed >= np.minimum(images, images[::-1]) - 1e-6) & (mixed <= np.maximum(images, images[::-1]) + 1e-6)
    assert inside.all()


def test_cutmix_copies_pixels_exactly(assert_close):
    images, labels, _ = batch()
    for key in keys(4):
        pixels, share = draw_shares(key, (12, 10), mixup=0.0, cutmix=1.0)
        mixed, soft = cutmix(images, one_hot(labels), key, alpha=1.0)
        np.testing.assert_array_equal(mixed, np.where(pixels[None, :, :, None] == 1, images[::-1], images))
        assert_close(soft, (1 - share) * one_hot(labels) + share * one_hot(labels)[::-1], 1e-6)


def test_alpha_zero_is_identity(key):
    images, labels, weights = batch()
    for mix in (mixup, cutmix):
        same, rows = mix(images, one_hot(labels), key, alpha=0.0)
        np.testing.assert_array_equal(same, images)
        np.testing.assert_array_equal(rows, one_hot(labels))
    same, rows = mix_batch(images, labels, weights, key, config=AugmentConfig(), num_classes=CLASSES)
    np.testing.assert_array_equal(same, images)
    np.testing.assert_array_equal(rows, one_hot(labels))


def test_label_rows_sum_to_one_and_pixels_stay_within():
    images, labels, weights = batch()
    mix = jax.jit(jax.vmap(lambda k: mix_batch(images, labels, weights, k, config=BOTH, num_classes=CLASSES)))
    mixed, rows = mix(keys(100))
    np.testing.assert_allclose(rows.sum(axis=2), 1, atol=1e-6)
    assert rows.min() >= 0
    low, high = np.minimum(images, images[::-1]), np.maximum(images, images[::-1])
    assert (mixed >= low - 1e-6).all()
    assert (mixed <= high + 1e-6).all()
    assert len({draw.tobytes() for draw in np.asarray(mixed)}) > 70  # a small rectangle may be empty


def test_share_of_batches_that_take_cutmix():
    images, labels, weights = batch(2, 6, 6)
    config = AugmentConfig(mixup=0.8, cutmix=1.0, cutmix_share=0.3)
    mix = jax.jit(jax.vmap(lambda k: mix_batch(images, labels, weights, k, config=config, num_classes=CLASSES)[0]))
    mixed = np.asarray(mix(keys(1000)))
    cut = ((mixed == images) | (mixed == images[::-1])).all(axis=(1, 2, 3, 4))
    assert abs(cut.mean() - 0.3) < 0.05


# Rows that count for nothing


@pytest.mark.parametrize(
    ("config", "dtype"),
    [(AugmentConfig(mixup=0.8), jnp.float32), (AugmentConfig(cutmix=1.0), jnp.float32), (BOTH, jnp.bfloat16)],
)
def test_rows_of_weight_0_enter_nothing(config, dtype):
    images, labels, _ = batch(8)
    images = images.astype(dtype)
    weights = jnp.array([1, 0, 1, 1, 1, 0, 1, 1.0])  # pairs: 0-7, 1-6, 2-5, 3-4
    junk = images.at[1].set(jnp.nan).at[5].set(jnp.inf)
    junk_labels = labels.at[1].set(-1).at[5].set(1000)
    mix = jax.jit(functools.partial(mix_batch, config=config, num_classes=CLASSES))
    for key in keys(5):
        mixed, rows = jax.device_get(mix(junk, junk_labels, weights, key))
        clean, clean_rows = jax.device_get(mix(images, labels, jnp.ones(8), key))
        unmixed, both = [2, 6], [0, 3, 4, 7]
        np.testing.assert_array_equal(mixed[both], clean[both])
        np.testing.assert_array_equal(rows[both], clean_rows[both])
        np.testing.assert_array_equal(mixed[unmixed], np.asarray(images)[unmixed])
        np.testing.assert_array_equal(rows[unmixed], np.asarray(one_hot(labels))[unmixed])
        assert np.isnan(mixed[1].astype(np.float32)).all()


def test_gradients_are_finite_beside_junk(key):
    images, labels, _ = batch(8)
    weights = jnp.array([1, 0, 1, 1, 1, 0, 1, 1.0])
    images = images.at[1].set(jnp.nan)
    config = AugmentConfig(mixup=0.8, cutmix=1.0, random_erasing=0.5)

    def loss(kernel, images):
        mixed, rows = augment_batch(images, labels, weights, key, config=config, num_classes=CLASSES)
        used = jnp.where(weights[:, None, None, None] > 0, mixed, 0)
        return weighted_mean(softmax_cross_entropy(used.mean(axis=(1, 2)) @ kernel, rows), weights)

    value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(jnp.ones((3, CLASSES)) * 0.1, images)
    assert np.isfinite(value)
    assert all(np.isfinite(grad).all() for grad in grads)
    assert not grads[1][1].any()


def test_all_weights_0_is_identity(key):
    images, labels, _ = batch()
    mixed, rows = mix_batch(images, labels, jnp.zeros(6), key, config=BOTH, num_classes=CLASSES)
    np.testing.assert_array_equal(mixed, images)
    np.testing.assert_array_equal(rows, one_hot(labels))


# Types and labels


def test_bfloat16_is_the_rounded_float32(key):
    images, labels, weights = batch()
    rounded = images.astype(jnp.bfloat16)
    low = mix_batch(rounded, labels, weights, key, config=BOTH, num_classes=CLASSES)
    high = mix_batch(rounded.astype(jnp.float32), labels, weights, key, config=BOTH, num_classes=CLASSES)
    assert low[0].dtype == jnp.bfloat16
    assert low[1].dtype == jnp.float32
    np.testing.assert_array_equal(low[0], high[0].astype(jnp.bfloat16))
    np.testing.assert_array_equal(low[1], high[1])
    erased = random_erasing(rounded, key, probability=1.0)
    assert erased.dtype == jnp.bfloat16
    assert jnp.isfinite(erased).all()


def test_labels_of_every_kind(key, assert_close):
    images, labels, weights = batch()
    mix = functools.partial(mix_batch, images, weights=weights, key=key, config=BOTH)
    from_indices = mix(labels=labels, num_classes=CLASSES)
    from_rows = mix(labels=one_hot(labels).astype(jnp.int32), num_classes=CLASSES)
    jax.tree.map(np.testing.assert_array_equal, from_indices, from_rows)
    real = jnp.linspace(0.0, 1.0, 6)
    _, mixed = mix(labels=real, num_classes=1)
    assert mixed.shape == (6, 1)
    assert_close(mixed.sum(), real.sum(), 1e-6)
    assert (mixed[:, 0] != real).any()
    _, rows = mix(labels=labels.at[2].set(CLASSES), num_classes=CLASSES)  # trains as NaN, not in silence
    assert jnp.isnan(rows[2]).all()
    with pytest.raises(ValueError, match=r"labels have shape \(6, 5\).*Expected integer class indices"):
        mix(labels=one_hot(labels), num_classes=7)


def test_whole_numbers_are_refused(key, unchecked):
    images, labels, weights = batch()
    pixels = jnp.zeros(images.shape, jnp.uint8)
    with pytest.raises(TypeError, match=r"images are uint8; .* call normalize first"):
        mix_batch(pixels, labels, weights, key, config=BOTH, num_classes=CLASSES)
    with pytest.raises(TypeError, match=r"images are uint8; .* call normalize first"):
        random_erasing(pixels, key, probability=0.5)


# Erasing


def test_erasing_probability_0_and_1():
    images, _, _ = batch(64, 24, 20)
    assert random_erasing(images, jax.random.key(0), probability=0.0) is images
    some = np.asarray(random_erasing(images, jax.random.key(0), probability=0.25) != images).any(axis=(1, 2, 3))
    assert 0.1 < some.mean() < 0.4
    assert np.asarray(random_erasing(images, jax.random.key(0), probability=1.0) != images).any(axis=(1, 2, 3)).all()


def test_erased_rectangles():
    h, w = 48, 64
    erase = jax.jit(functools.partial(random_erasing, probability=1.0))
    images = np.full((1000, h, w, 3), 100.0, np.float32)
    erased = np.asarray(erase(images, jax.random.key(3)))
    inside = (erased != 100).all(axis=3)
    np.testing.assert_array_equal(inside, (erased != 100).any(axis=3))
    rows, columns = inside.any(axis=2), inside.any(axis=1)
    np.testing.assert_array_equal(inside, rows[:, :, None] & columns[:, None, :])
    heights, widths = rows.sum(axis=1), columns.sum(axis=1)
    area, aspect = heights * widths / (h * w), heights / widths
    assert (heights < h).all()
    assert (widths < w).all()
    assert 0.015 < area.min() < 0.03
    assert 0.31 < area.max() < 0.345
    assert 0.24 < aspect.min() < 0.4  # the sides are rounded
    assert 2.5 < aspect.max() < 4.2
    for spans in (rows, columns):
        assert spans[:, 0].any()
        assert spans[:, -1].any()
        assert (np.abs(np.diff(np.pad(spans.astype(int), ((0, 0), (1, 1))), axis=1)).sum(axis=1) == 2).all()
    noise = erased[inside]
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    assert len({image.tobytes() for image in inside}) > 990


def erased_area(rng, height, width):
    """Zhong et al. 2020, algorithm 1, with timm's ten attempts."""
    for _ in range(10):
        area = rng.uniform(0.02, 1 / 3) * height * width
        aspect = np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3)))
        rows, columns = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if rows < height and columns < width:
            return rows * columns / (height * width)
    return 0.0


@pytest.mark.parametrize("shape", [(24, 24), (8, 40)])
def test_erased_areas_are_distributed_as_the_reference(shape):
    rng = np.random.default_rng(0)
    expected = np.array([erased_area(rng, *shape) for _ in range(10000)])
    images = np.full((2000, *shape, 1), 100.0, np.float32)
    erased = np.asarray(jax.jit(functools.partial(random_erasing, probability=1.0))(images, jax.random.key(5)))
    area = (erased != 100).mean(axis=(1, 2, 3))
    assert abs(area.mean() - expected.mean()) < 0.008
    assert abs(np.median(area) - np.median(expected)) < 0.012


def test_an_image_too_small_to_erase_stays_whole(key):
    images = jnp.full((4, 1, 1, 3), 100.0)
    np.testing.assert_array_equal(random_erasing(images, key, probability=1.0), images)


# In a training step


def test_inside_shard_map_each_device_mixes_its_own_rows(mesh, key):
    images, labels, weights = batch(16)
    config = AugmentConfig(mixup=0.8, cutmix=1.0, random_erasing=0.5)

    def local(images, labels, weights):
        own = jax.random.fold_in(key, jax.lax.axis_index("data"))
        return augment_batch(images, labels, weights, own, config=config, num_classes=CLASSES)

    sharded = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P("data")))
    mixed, rows = jax.device_get(sharded(images, labels, weights))
    np.testing.assert_allclose(rows.sum(axis=1), 1, atol=1e-6)
    for device in (0, 5):
        part = slice(2 * device, 2 * device + 2)
        own = jax.random.fold_in(key, device)
        expected = augment_batch(images[part], labels[part], weights[part], own, config=config, num_classes=CLASSES)
        np.testing.assert_allclose(mixed[part], expected[0], atol=1e-6)
        np.testing.assert_allclose(rows[part], expected[1], atol=1e-6)


def test_one_compilation_for_every_key():
    images, labels, weights = batch()
    step = jax.jit(functools.partial(augment_batch, config=BOTH, num_classes=CLASSES))
    for key in keys(4):
        step(images, labels, weights, key)
    assert step._cache_size() == 1
