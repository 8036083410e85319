"""Samples: exact counts, rows of the right kind only, equal chances, and nothing from padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvision.ops import Sample, drawn_rows, sample_balanced

SIZE = 48


one = functools.partial(jax.jit, static_argnames=("count", "positive_fraction"))(sample_balanced)


@functools.cache
def sampler(count, fraction):
    """Samples for many keys at once."""

    def sample(key, label):
        return one(label, count=count, positive_fraction=fraction, key=key)

    return jax.jit(jax.vmap(sample, (0, None)))


def labels(positives, negatives, rng=None):
    """Among ``SIZE`` rows; the others are ignored."""
    label = np.array([1] * positives + [0] * negatives + [-1] * (SIZE - positives - negatives))
    return jnp.asarray(label if rng is None else rng.permutation(label))


def draw(label, key, count=16, fraction=0.25):
    sample = sampler(count, fraction)(key[None], label)
    return tuple(np.asarray(x)[0] for x in sample)


@pytest.mark.parametrize(
    ("positives", "negatives", "expected"),
    [
        (20, 20, (4, 12)),  # plenty of both
        (2, 40, (2, 14)),  # few positives: negatives fill up
        (0, 40, (0, 16)),
        (40, 3, (4, 3)),  # few negatives: the sample is smaller
        (40, 0, (4, 0)),
        (1, 2, (1, 2)),
        (0, 0, (0, 0)),
    ],
)
def test_counts(rng, key, positives, negatives, expected):
    label = labels(positives, negatives, rng)
    indices, positive, valid = draw(label, key)
    kinds = np.asarray(label)[indices]
    assert (kinds[positive] == 1).all()
    assert (kinds[valid & ~positive] == 0).all()
    assert (positive.sum(), (valid & ~positive).sum()) == expected
    assert len(set(indices[valid])) == valid.sum()  # no row twice
    assert (indices[~valid] == 0).all()
    assert not (positive & ~valid).any()
    assert valid.tolist() == sorted(valid.tolist(), reverse=True)


@pytest.mark.slow
def test_more_than_there_are_rows(key):
    sample = one(jnp.array([0, 1, -1]), count=8, positive_fraction=0.5, key=key)
    assert sample.indices.tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    assert sample.valid.tolist() == [True] * 2 + [False] * 6
    assert drawn_rows(sample, 3).tolist() == [True, True, False]
    none = one(jnp.zeros(0, int), count=2, positive_fraction=0.5, key=key)
    assert none.valid.tolist() == [False, False]


def test_drawn_rows_leave_out_what_is_not_valid():
    sample = Sample(jnp.array([1, 0]), jnp.array([True, False]), jnp.array([True, False]))
    assert drawn_rows(sample, 3).tolist() == [False, True, False]


def test_the_key_alone_decides(rng, key):
    label = labels(20, 20, rng)
    first, again, other = (draw(label, k)[0].tolist() for k in (key, key, jax.random.key(1)))
    assert first == again != other


def test_padding_behind_changes_nothing(rng, key):
    label = labels(20, 20, rng)
    plain = one(label, count=16, positive_fraction=0.25, key=key)
    padded = one(jnp.pad(label, (0, 99), constant_values=-1), count=16, positive_fraction=0.25, key=key)
    assert [x.tolist() for x in padded] == [x.tolist() for x in plain]


def test_every_row_has_the_same_chance(rng):
    """Chi squared over 4000 keys: below its 99.9th percentile for the rows of each kind, and pairs are no fewer."""
    label = labels(8, 24, rng)
    keys = jax.random.split(jax.random.key(0), 4000)
    indices, _, valid = (np.asarray(x) for x in sampler(8, 0.5)(keys, label))
    assert valid.all()
    drawn = np.zeros((len(keys), SIZE), bool)
    np.put_along_axis(drawn, indices, True, axis=1)
    for kind, rows, limit in ((1, 8, 24.3), (0, 24, 49.7)):
        counts = drawn[:, np.asarray(label) == kind].sum(0)
        expected = 4 * len(keys) / rows
        # Drawn without replacement, counts vary less than independent ones: by (rows - 4) / (rows - 1).
        assert ((counts - expected) ** 2 / expected).sum() * (rows - 1) / (rows - 4) < limit
    pairs = drawn[:, np.flatnonzero(np.asarray(label) == 1)][:, :2].all(1).mean()
    assert abs(pairs - 4 * 3 / (8 * 7)) < 0.03


def test_errors(key):
    with pytest.raises(ValueError, match="count 0: expected at least 1 row"):
        sample_balanced(jnp.zeros(3, int), count=0, positive_fraction=0.5, key=key)
    with pytest.raises(ValueError, match=r"positive_fraction 25\.0: expected a share between 0 and 1"):
        sample_balanced(jnp.zeros(3, int), count=2, positive_fraction=25.0, key=key)
