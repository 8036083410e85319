"""Segment Anything's training: the loss term by term, and rounds of prompts that correct the last mask."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sam_references as source

from eqvision.losses import mask_iou, prompted_mask_loss
from eqvision.segmenters import sam as segment
from eqvision.types import MaskPredictions

# Loss


def plain_loss(logits, iou, target):
    """One prompt, term by term."""
    best = None
    for mask, expected in zip(logits.astype(np.float64), iou, strict=True):
        p = 1 / (1 + np.exp(-mask))
        right, share = np.where(target == 1, p, 1 - p), np.where(target == 1, 0.25, 0.75)
        focal = np.mean(-share * (1 - right) ** 2 * np.log(right))
        dice = 1 - (2 * (p * target).sum() + 1) / (p.sum() + target.sum() + 1)
        both, either = ((mask > 0) & (target == 1)).sum(), ((mask > 0) | (target == 1)).sum()
        actual = both / either if either else 1.0
        if best is None or 20 * focal + dice < best[0]:
            best = 20 * focal + dice, focal, dice, (expected - actual) ** 2, actual
    return (best[0] + best[3], *best[1:])


def test_loss_term_by_term(assert_close, rng):
    logits, iou = rng.normal(0, 3, (2, 2, 3, 5, 6)).astype(np.float32), rng.uniform(size=(2, 2, 3)).astype(np.float32)
    masks, valid = rng.integers(0, 2, (2, 2, 5, 6)), np.array([[True, True], [True, False]])
    masks[0, 0], logits[0, 0, 1] = 0, -9.0  # nothing wanted, nothing found
    junk = logits.copy(), iou.copy()
    junk[0][1, 1], junk[1][1, 1] = np.nan, np.nan
    predictions = MaskPredictions(*map(jnp.asarray, junk))
    losses = source.quickly(prompted_mask_loss)(predictions, jnp.asarray(masks), jnp.asarray(valid))
    expected = np.zeros((2, 2, 5))
    for i, j in ((0, 0), (0, 1), (1, 0)):
        expected[i, j] = plain_loss(logits[i, j], iou[i, j], masks[i, j])
    ours = (losses.total, losses.focal, losses.dice, losses.iou, losses.actual_iou)
    assert_close(np.stack(ours, axis=-1), expected, 1e-5)
    assert int(losses.best[0, 0]) == 1


@pytest.mark.slow
def test_only_the_best_mask_has_a_gradient(rng):
    predictions = MaskPredictions(jnp.asarray(rng.normal(size=(1, 1, 3, 4, 4))), jnp.full((1, 1, 3), 0.5))
    masks, valid = jnp.ones((1, 1, 4, 4)), jnp.ones((1, 1), bool)

    @source.quickly
    def gradients(predictions):
        losses = prompted_mask_loss(predictions, masks, valid)
        return losses.best, jax.grad(lambda p: prompted_mask_loss(p, masks, valid).total.sum())(predictions)

    best, gradient = gradients(predictions)
    used = np.asarray(gradient.logits).any(axis=(3, 4))[0, 0]
    assert used.tolist() == [i == int(best[0, 0]) for i in range(3)]
    assert (np.asarray(gradient.iou)[0, 0] != 0).tolist() == used.tolist()
    assert np.asarray(mask_iou(jnp.array([[[1.0, -1]]]), jnp.array([[[1.0, 1]]]))).tolist() == [0.5]


def test_masks_and_logits_of_different_sizes():
    predictions = MaskPredictions(jnp.zeros((1, 1, 3, 4, 4)), jnp.zeros((1, 1, 3)))
    with pytest.raises(ValueError, match=r"expected \(1, 1, 4, 4\) \(resize the masks, or the logits\)"):
        prompted_mask_loss(predictions, jnp.zeros((1, 1, 8, 8)), jnp.ones((1, 1), bool))


# Rounds


def test_points_are_drawn_from_the_error():
    masks = jnp.zeros((1, 4, 8, 8)).at[0, :3, 2:5, 1:4].set(1)
    logits = jnp.full((1, 4, 8, 8), -1.0).at[0, 1, 2:6, 1:4].set(1).at[0, 2, 2:5, 1:4].set(1).at[0, 3].set(1)
    valid = jnp.array([[True, True, True, False]])

    @source.quickly
    def draw(keys):
        return jax.vmap(lambda key: segment.error_points(logits, masks, valid, stride=4, key=key))(keys)

    points, labels = map(np.asarray, draw(jax.random.split(jax.random.key(0), 900)))
    assert (labels[:, 0, 0] == 1).all()  # missed
    assert (labels[:, 0, 1] == 0).all()  # too much
    assert (labels[:, 0, 2:] == -2).all()  # right; not valid
    cells = (points[:, 0] - 1.5) / 4
    assert np.array_equal(cells, np.round(cells))
    assert set(cells[:, 1, 1]) == {5}
    counts = np.unique(cells[:, 0] @ np.array([1, 8]), return_counts=True)[1]
    assert len(counts) == 9
    assert np.square(counts - 100).sum() / 100 < 30  # chi squared of 8 degrees: 0.02 % lie beyond


@pytest.mark.slow
def test_first_prompts():
    masks = jnp.zeros((1, 200, 16, 16)).at[0, :, 4:8, 2:12].set(1).at[0, 0].set(0)
    valid = jnp.ones((1, 200), bool).at[0, 1].set(False)

    @source.quickly
    def draw(key):
        return segment.first_prompts(masks, valid, stride=4, slots=5, key=key)

    prompts = draw(jax.random.key(1))
    points, labels = np.asarray(prompts.points)[0], np.asarray(prompts.labels)[0]
    assert (labels[:2] == -2).all()
    assert (labels[:, 2:] == -2).all()
    boxes, clicks = labels[2:, 0] == 2, labels[2:, 0] == 1
    assert (labels[2:][boxes, 1] == 3).all()
    assert (labels[2:][clicks, 1] == -1).all()
    assert 60 < boxes.sum() < 140
    assert boxes.sum() + clicks.sum() == 198
    x, y = ((points[2:][clicks, 0] - 1.5) / 4).T
    assert ((x >= 2) & (x < 12) & (y >= 4) & (y < 8)).all()
    corners = points[2:, :2][boxes].reshape(-1, 4)
    difference = corners - np.array([8, 16, 48, 32])
    assert np.abs(difference).max() <= 20
    np.testing.assert_allclose(difference.std(axis=0), [4, 1.6, 4, 1.6], rtol=0.35)


@pytest.mark.slow
def test_rounds_train_prompts_and_decoder():
    model, rng = source.noisy_sam(), np.random.default_rng(2)
    model = eqx.tree_at(
        lambda m: m.head.transformer.blocks, model, model.head.transformer.blocks[:1]
    )  # compiles faster
    masks = np.zeros((1, 2, 32, 32), np.float32)
    masks[0, 0, 4:20, 8:30], masks[0, 1] = 1, np.nan
    features = jnp.asarray(rng.normal(size=(1, 8, 8, source.OUT)), jnp.float32)
    valid = jnp.array([[True, False]])

    @source.quickly
    def run(parts, key):
        def loss(parts):
            trained = eqx.tree_at(lambda m: (m.prompts, m.head), model, parts)
            rounds = segment.train_rounds(trained, features, jnp.asarray(masks), valid, key=key, points=2)
            return rounds.losses.total.mean(), rounds

        return jax.value_and_grad(loss, has_aux=True)(parts)

    (value, rounds), gradient = run((model.prompts, model.head), jax.random.key(3))
    assert np.isfinite(value)
    assert rounds.losses.total.shape == (5, 1, 2)
    assert not np.asarray(rounds.losses.total)[:, 0, 1].any()
    labels = np.asarray(rounds.prompts.labels)[0]
    assert (labels[0, 2:] != -2).all()
    assert (labels[1] == -2).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
    still = [jax.tree_util.keystr(path) for path, x in jax.tree_util.tree_leaves_with_path(gradient) if not x.any()]
    # The matrix of positions is never trained, and the sign of no box only where the first prompt was a point.
    assert set(still) - {"[0].no_point"} == {"[0].position.matrix"}
