"""Suppression against plain greedy loops in numpy, on random, tied, clustered and padded boxes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from eqvision.names import UnknownNameError
from eqvision.ops import CLASS_RULES, matrix_nms, nms, select_best, soft_nms

THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)
KINDS = ("random", "tied", "clustered", "grid", "equal", "empty")
CHAIN = [[1.0, 0, 11, 10], [6, 0, 16, 10], [11, 0, 21, 10]]  # neighbours overlap by a third


def overlap(a, b):
    """IoU of one box with many, in float32; 0 where there is no area."""
    size = np.clip(np.minimum(a[2:], b[:, 2:]) - np.maximum(a[:2], b[:, :2]), 0, None)
    common = size[:, 0] * size[:, 1]

    def area(box):
        return np.clip(box[..., 2] - box[..., 0], 0, None) * np.clip(box[..., 3] - box[..., 1], 0, None)

    union = area(a) + area(b) - common
    return np.where(union > 0, common / np.where(union > 0, union, 1), 0).astype(np.float32)


def greedy(boxes, scores, threshold, labels=None, valid=None):
    """The definition: rows by score, each kept unless one kept before it, of its class, overlaps it too much."""
    boxes, scores = np.asarray(boxes, np.float32), np.asarray(scores, np.float32)
    labels = np.zeros(len(scores), int) if labels is None else np.asarray(labels)
    valid = np.ones(len(scores), bool) if valid is None else np.asarray(valid)
    keep = np.zeros(len(scores), bool)
    for row in np.argsort(-scores, kind="stable"):
        others = boxes[keep & (labels == labels[row])]
        keep[row] = valid[row] and not (overlap(boxes[row], others) > np.float32(threshold)).any()
    return keep


def suppress(boxes, scores, *, labels=None, valid=None, **options):
    """``nms`` of up to 150 rows in tiles of 64, the last one not full: padded to one shape, which is compiled once."""
    n = len(scores)
    boxes, scores = (
        np.pad(x, [(0, 150 - n)] + [(0, 0)] * (np.ndim(x) - 1), constant_values=np.nan) for x in (boxes, scores)
    )
    labels = None if labels is None else jnp.asarray(np.pad(labels, (0, 150 - n)), jnp.int32)
    valid = np.arange(150) < n if valid is None else np.pad(valid, (0, 150 - n))
    arrays = {"labels": labels, "valid": jnp.asarray(valid)}
    kept = np.asarray(nms(jnp.float32(boxes), jnp.float32(scores), tile=64, **arrays, **options))
    assert not kept[n:].any()
    return kept[:n]


def example(rng, n, kind):
    """Boxes on whole pixels, on both sides of 0, so that every overlap is the same in numpy and XLA."""
    low = rng.integers(-60, 60, (n, 2))
    size = rng.integers(0 if kind == "empty" else 1, 60, (n, 2))
    if kind == "clustered":
        low, size = rng.integers(-60, 60, (6, 2))[rng.integers(0, 6, n)] + rng.integers(-4, 5, (n, 2)), size // 8 + 20
    if kind == "grid":  # overlaps of exactly 1/2, 1/3, 1/5 ...
        low, size = 10 * rng.integers(-3, 3, (n, 2)), 10 * rng.integers(1, 4, (n, 2))
    if kind == "equal":
        low, size = np.zeros((n, 2)), np.full((n, 2), 7)
    scores = rng.integers(0, 5, n) / 4 if kind != "random" else rng.normal(size=n)
    return np.concatenate([low, low + size], -1).astype(np.float32), scores.astype(np.float32)


class TestNms:
    @pytest.mark.parametrize("kind", KINDS)
    def test_equals_greedy(self, rng, kind):
        for threshold in THRESHOLDS:
            boxes, scores = example(rng, 150, kind)
            kept = suppress(boxes, scores, threshold=threshold)
            assert kept.tolist() == greedy(boxes, scores, threshold).tolist(), threshold

    @pytest.mark.slow
    @pytest.mark.parametrize("tile", [1, 7, 256])
    def test_equals_greedy_on_many_real_boxes(self, rng, tile):
        for threshold in THRESHOLDS:
            low = rng.uniform(-100, 400, (1000, 2))
            boxes = np.concatenate([low, low + rng.uniform(10, 150, (1000, 2))], -1).astype(np.float32)
            scores = rng.random(1000).astype(np.float32)
            kept = nms(jnp.asarray(boxes), jnp.asarray(scores), threshold=threshold, tile=tile)
            assert kept.tolist() == greedy(boxes, scores, threshold).tolist(), threshold

    def test_a_suppressed_box_suppresses_nothing(self):
        """The chain of boxes at which a published implementation keeps only the first."""
        assert suppress(CHAIN, [0.9, 0.8, 0.7], threshold=0.3).tolist() == [True, False, True]

    def test_an_overlap_of_just_the_threshold_stays_and_ties_go_by_row(self):
        boxes = [[0.0, 0, 10, 20], [0, 0, 10, 10], [0, 0, 10, 20]]
        assert suppress(boxes, [1.0, 1, 1], threshold=0.5).tolist() == [True, True, False]

    def test_padding_changes_nothing(self, rng):
        boxes, scores = example(rng, 110, "clustered")
        expected = greedy(boxes, scores, 0.5)
        place = np.sort(rng.permutation(150)[:110])  # padding stands anywhere
        padded, padded_scores, valid = np.full((150, 4), np.nan), np.full(150, np.inf), np.zeros(150, bool)
        padded[place], padded_scores[place], valid[place] = boxes, scores, True
        kept = suppress(padded, padded_scores, threshold=0.5, valid=valid)
        assert kept[place].tolist() == expected.tolist()
        assert not kept[~valid].any()
        # A score of -inf marks padding as well, and so does a coordinate that is no number.
        marked = np.where(valid, padded_scores, -np.inf)
        assert suppress(np.nan_to_num(padded), marked, threshold=0.5).tolist() == kept.tolist()
        assert suppress(padded, np.where(valid, padded_scores, 9.0), threshold=0.5).tolist() == kept.tolist()

    def test_the_best_few_are_those_of_the_full_search(self, rng):
        boxes, scores = example(rng, 150, "random")
        full = greedy(boxes, scores, 0.5)
        best = np.argsort(-np.where(full, scores, -np.inf))[:20]
        assert np.flatnonzero(suppress(boxes, scores, threshold=0.5, max_kept=20)).tolist() == sorted(best)

    def test_no_rows(self):
        assert nms(jnp.zeros((2, 0, 4)), jnp.zeros((2, 0)), threshold=0.5).shape == (2, 0)
        assert not suppress(np.zeros((0, 4)), np.zeros(0), threshold=0.5).any()

    @pytest.mark.slow
    def test_problems_side_by_side_and_under_vmap(self, rng):
        boxes, scores = (np.stack(x) for x in zip(*(example(rng, 150, k) for k in ("tied", "equal")), strict=True))
        expected = [greedy(*pair, 0.5).tolist() for pair in zip(boxes, scores, strict=True)]
        run = functools.partial(nms, threshold=0.5, tile=64)
        assert run(jnp.asarray(boxes), jnp.asarray(scores)).tolist() == expected
        assert jax.jit(jax.vmap(run))(jnp.asarray(boxes), jnp.asarray(scores)).tolist() == expected

    @pytest.mark.slow
    def test_boxes_may_carry_a_gradient(self):
        def value(boxes):
            return jnp.sum(jnp.where(nms(boxes, boxes[:, 0], threshold=0.5), boxes[:, 0], 0.0))

        assert jax.grad(value)(jnp.array([[0.0, 0, 1, 1], [9, 0, 10, 1]]))[:, 0].tolist() == [1, 1]

    @pytest.mark.slow
    def test_under_shard_map_equals_one_device(self, rng, mesh):
        boxes, scores = (np.stack(x) for x in zip(*(example(rng, 40, "tied") for _ in range(8)), strict=True))
        run = functools.partial(nms, threshold=0.5, tile=16)
        split = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P("data"), out_specs=P("data")))
        expected = [greedy(*pair, 0.5).tolist() for pair in zip(boxes, scores, strict=True)]
        assert split(boxes, scores).tolist() == expected

    @pytest.mark.slow
    def test_memory_does_not_grow_with_all_pairs(self):
        shapes = jax.ShapeDtypeStruct((4000, 4), jnp.float32), jax.ShapeDtypeStruct((4000,), jnp.float32)
        memory = jax.jit(functools.partial(nms, threshold=0.5)).lower(*shapes).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 2e6  # a table of all pairs has 64 MB

    def test_errors(self):
        boxes, scores = jnp.zeros((1, 4)), jnp.zeros(1)
        with pytest.raises(ValueError, match=r"threshold 70.0: expected an overlap between 0 and 1"):
            nms(boxes, scores, threshold=70.0)
        with pytest.raises(ValueError, match=r"max_kept 0: expected at least 1, or None for all"):
            nms(boxes, scores, threshold=0.5, max_kept=0)
        with pytest.raises(ValueError, match=r"tile 0: expected at least 1 row"):
            nms(boxes, scores, threshold=0.5, tile=0)
        with pytest.raises(UnknownNameError, match=r"class rule 'torchvison' does not exist; nearest: torchvision"):
            nms(boxes, scores, threshold=0.5, class_rule="torchvison")


class TestClasses:
    @pytest.mark.parametrize("kind", ["tied", "clustered", "grid"])
    def test_equals_one_run_for_each_class(self, rng, kind):
        """Boxes on both sides of 0."""
        boxes, scores = example(rng, 150, kind)
        labels = rng.integers(0, 5, 150)
        for threshold in THRESHOLDS:
            expected = np.zeros(150, bool)
            for label in range(5):
                expected[labels == label] = greedy(boxes[labels == label], scores[labels == label], threshold)
            assert suppress(boxes, scores, threshold=threshold, labels=labels).tolist() == expected.tolist(), threshold

    @pytest.mark.parametrize("rule", CLASS_RULES)
    def test_shifted_boxes_give_the_same_where_none_is_negative(self, rng, rule):
        boxes, scores = example(rng, 150, "clustered")
        boxes, labels = boxes + 64, rng.integers(0, 5, 150)
        kept = suppress(boxes, scores, threshold=0.5, labels=labels, class_rule=rule)
        assert kept.tolist() == greedy(boxes, scores, 0.5, labels).tolist()

    def test_shifted_boxes_collide_where_one_is_negative(self):
        """Class 1 moves by 10 + 1, and its box at -11 lands upon class 0: torchvision's result, not the default one."""
        boxes, scores, labels = [[0.0, 0, 10, 10], [-11, -11, -1, -1]], [0.9, 0.8], [0, 1]
        assert suppress(boxes, scores, threshold=0.5, labels=labels).tolist() == [True, True]
        for rule in ("coordinate_trick", "torchvision", "torchvision_gpu", "detectron2", "mmdet"):
            assert suppress(boxes, scores, threshold=0.5, labels=labels, class_rule=rule).tolist() == [True, False]

    @pytest.mark.slow
    def test_torchvision_compares_classes_above_1000_boxes(self):
        boxes = jnp.array([[0.0, 0, 10, 10], [-11, -11, -1, -1], *[[2, 2, 3, 3]] * 999])
        labels = (jnp.arange(1001) == 1).astype(int)
        scores = 1001 - jnp.arange(1001.0)
        run = functools.partial(nms, boxes, scores, threshold=0.5, labels=labels, class_rule="torchvision")
        assert run()[1]
        assert not run(valid=jnp.arange(1001) < 1000)[1]


class TestSelectBest:
    def test_best_first_and_ties_by_row(self):
        keep, scores = jnp.array([True, True, False, True]), jnp.array([0.1, 0.5, 0.9, 0.5])
        best = select_best(keep, scores, 2)
        assert (best.indices.tolist(), best.valid.tolist()) == ([1, 3], [True, True])

    def test_more_than_there_are(self):
        best = select_best(jnp.array([[False, True]]), jnp.array([[jnp.nan, -3.0]]), 4)
        assert (best.indices.tolist(), best.valid.tolist()) == ([[1, 0, 0, 0]], [[True, False, False, False]])
        assert select_best(jnp.zeros((2, 0), bool), jnp.zeros((2, 0)), 3).valid.tolist() == [[False] * 3] * 2


def softened(boxes, scores, labels, valid, factor, smallest, steps):
    """Figure 2 of the paper in plain numpy."""
    scores, final = np.asarray(scores, np.float64).copy(), np.zeros(len(scores))
    left = valid & (scores >= smallest)
    for _ in range(steps):
        if not left.any():
            break
        best = int(np.argmax(np.where(left, scores, -np.inf)))
        final[best], left[best] = scores[best], False
        touched = left & (labels == labels[best])
        scores[touched] *= factor(overlap(boxes[best], boxes))[touched]
        left &= scores >= smallest
    return final


class TestSoftNms:
    @pytest.mark.slow
    @pytest.mark.parametrize("method", ["linear", "gaussian"])
    def test_equals_the_published_loop(self, rng, assert_close, method):
        boxes, _ = example(rng, 60, "clustered")
        scores, labels, valid = rng.random(60), rng.integers(0, 2, 60), rng.random(60) < 0.9

        def linear(iou):
            return np.where(iou > 0.3, 1 - iou, 1)

        factor = linear if method == "linear" else lambda iou: np.exp(-(iou**2) / 0.5)
        boxes_with_junk = jnp.float32(np.where(valid[:, None], boxes, np.nan))
        arrays = {"labels": jnp.asarray(labels), "valid": jnp.asarray(valid)}
        for steps in (60, 9):
            actual = soft_nms(boxes_with_junk, jnp.float32(scores), method=method, max_kept=steps, **arrays)
            assert_close(actual, softened(boxes, scores, labels, valid, factor, 1e-3, steps), 1e-5)

    def test_by_hand(self):
        """A third of overlap: 1 - 1/3 of the score is left."""
        scores = soft_nms(jnp.array([CHAIN, CHAIN]), jnp.array([[0.9, 0.8, 0.7], [0.9, 0.0, 0.7]]), method="linear")
        np.testing.assert_allclose(scores, [[0.9, 0.8 * 4 / 9, 0.7], [0.9, 0, 0.7]], rtol=1e-6)

    def test_names_the_methods(self):
        with pytest.raises(
            UnknownNameError, match=r"method of suppression 'gausian' does not exist; nearest: gaussian"
        ):
            soft_nms(jnp.zeros((1, 4)), jnp.zeros(1), method="gausian")


class TestMatrixNms:
    @pytest.mark.slow
    @pytest.mark.parametrize("method", ["linear", "gaussian"])
    def test_equals_the_published_matrices(self, rng, assert_close, method):
        boxes, _ = example(rng, 60, "clustered")
        scores, labels = rng.permutation(60) / 60 + 0.01, rng.integers(0, 2, 60)
        order = np.argsort(-scores)
        iou = np.stack([overlap(box, boxes[order]) for box in boxes[order]]).astype(np.float64)
        iou = np.triu(iou * (labels[order][:, None] == labels[order]), 1)
        factor = (lambda x: 1 - x) if method == "linear" else (lambda x: np.exp(-2 * x**2))
        before = factor(iou.max(0))[:, None]
        share = np.where(before > 0, factor(iou) / np.where(before > 0, before, 1), 1)
        expected = np.zeros(60)
        expected[order] = scores[order] * share.min(0)
        valid = jnp.arange(70) < 60  # and rows of junk behind
        padded = jnp.pad(jnp.float32(boxes), ((0, 10), (0, 0)), constant_values=jnp.nan)
        arrays = {"labels": jnp.pad(jnp.asarray(labels), (0, 10)), "valid": valid}
        padded_scores = jnp.pad(jnp.float32(scores), (0, 10), constant_values=2.0)
        actual = matrix_nms(padded, padded_scores, method=method, tile=32, **arrays)
        assert_close(actual, np.pad(expected, (0, 10)), 1e-5)

    def test_by_hand(self):
        """Overlaps of a third: the third box is lowered by the second, which is itself lowered by the first."""
        scores = matrix_nms(jnp.array(CHAIN), jnp.array([0.9, 0.8, 0.7]), method="linear")
        np.testing.assert_allclose(scores, [0.9, 0.8 * 2 / 3, 0.7], rtol=1e-6)

    def test_no_rows(self):
        assert matrix_nms(jnp.zeros((3, 0, 4)), jnp.zeros((3, 0))).shape == (3, 0)
        assert soft_nms(jnp.zeros((3, 0, 4)), jnp.zeros((3, 0))).shape == (3, 0)
