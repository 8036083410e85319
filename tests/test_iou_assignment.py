"""Assignment by overlap: by hand, against plain loops of the three references' rules, and with padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from eqvision.ops import ROI_RULES, RPN_RULES, IouRule, assign_by_iou, matched_boxes

TARGET = [0.0, 0, 12, 12]
FAR = [90.0, 90, 99, 99]
HALVES = [[0.0, 0, 12, 6], [0, 6, 12, 12]]  # both overlap TARGET by a half
BAND, POOR = [0.0, 0, 12, 5], [0.0, 0, 12, 3]  # by 5/12 and a quarter


def assign(boxes, targets, rule, valid=None, **options):
    """Up to 70 boxes and 40 targets, padded to these with junk so that each rule is compiled once; 3 blocks."""
    boxes, targets = np.reshape(boxes, (-1, 4)), np.reshape(targets, (-1, 4))
    n, g = len(boxes), len(targets)

    def pad(x, size):
        return jnp.float32(np.pad(x, ((0, size - len(x)), (0, 0)), constant_values=np.nan))

    valid = np.pad(np.ones(g, bool) if valid is None else np.array(valid, bool), (0, 40 - g))
    options = {"boxes_valid": jnp.arange(70) < n, "block_size": 32} | options
    found = assign_by_iou(pad(boxes, 70), pad(targets, 40), jnp.asarray(valid), rule=rule, **options)
    assert (found.label[n:] == -1).all()
    return tuple(np.asarray(x)[:n] for x in found)


def overlaps(boxes, targets):
    """In float32, boxes of whole pixels."""
    boxes, targets = np.asarray(boxes, np.float32)[:, None], np.asarray(targets, np.float32)[None]
    size = np.clip(np.minimum(boxes[..., 2:], targets[..., 2:]) - np.maximum(boxes[..., :2], targets[..., :2]), 0, None)

    def area(b):
        return (b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1])

    common = size[..., 0] * size[..., 1]
    return common / (area(boxes) + area(targets) - common)


def detectron2(iou, rule):
    """Labels and targets as its matcher gives them, torchvision's alike: the best boxes keep their own target."""
    label = np.where(iou.max(1) >= rule.high, 1, np.where(iou.max(1) < rule.low, 0, -1))
    if rule.low_quality:
        label[(iou == iou.max(0)).any(1)] = 1
    return label, iou.argmax(1)


def mmdet(iou, rule):
    """As its assigner does it: one target after the other takes its best boxes, from other targets too."""
    label, target = detectron2(iou, rule._replace(low_quality=False))
    for column in range(iou.shape[1]):
        if rule.low_quality and iou[:, column].max() >= rule.smallest_best:
            best = iou[:, column] == iou[:, column].max()
            label[best], target[best] = 1, column
    return label, target


def example(rng, n, g):
    """Boxes of few sizes on a coarse grid: many overlap a target equally. Every target touches a box."""
    targets = 4 * rng.integers(0, 12, (g, 2))
    targets = np.concatenate([targets, targets + 4 * rng.integers(1, 5, (g, 2))], -1)
    boxes = 4 * rng.integers(0, 12, (n, 2))
    boxes = np.concatenate([boxes, boxes + 4 * rng.integers(1, 5, (n, 2))], -1)
    boxes[:g] = targets + [0, 0, 4, 0]
    return boxes[rng.permutation(n)].astype(np.float32), targets.astype(np.float32)


class TestByHand:
    boxes = (*HALVES, BAND, POOR, FAR)

    def test_both_of_two_equally_good_boxes_are_positive(self):
        """A half is in the band that is ignored, and so is 5/12; a quarter is below it."""
        label, target, iou = assign(self.boxes, [TARGET], RPN_RULES["detectron2"])
        assert label.tolist() == [1, 1, -1, 0, 0]
        assert target.tolist() == [0] * 5
        np.testing.assert_allclose(iou, [0.5, 0.5, 5 / 12, 0.25, 0], rtol=1e-6)

    def test_without_low_quality_matches(self):
        assert assign(self.boxes, [TARGET], ROI_RULES["torchvision"])[0].tolist() == [1, 1, 0, 0, 0]

    def test_thresholds_are_inclusive_from_below(self):
        rule = IouRule(low=0.25, high=0.5)
        assert assign(self.boxes, [TARGET], rule)[0].tolist() == [1, 1, -1, -1, 0]

    def test_a_best_box_keeps_its_own_target_but_in_mmdet(self):
        """The box overlaps the first target by 0.75, and is the only one that touches the second (by 0.3)."""
        box, targets = [0.0, 0, 12, 12], [[0, 0, 12, 9], [0, 8.4, 12, 12]]
        for dialect, expected in (("torchvision", 0), ("detectron2", 0), ("mmdet", 1)):
            label, target, _ = assign([box], targets, RPN_RULES[dialect])
            assert (label.tolist(), target.tolist()) == ([1], [expected])

    def test_mmdet_asks_for_a_smallest_overlap_of_the_best(self):
        for dialect, expected in (("torchvision", 1), ("mmdet", 0)):
            assert assign([POOR], [TARGET], RPN_RULES[dialect])[0].tolist() == [expected]

    @pytest.mark.parametrize("dialect", RPN_RULES)
    def test_no_targets_make_every_box_negative(self, dialect):
        for targets, valid in (([], []), ([TARGET], [False])):
            label, target, iou = assign([TARGET, FAR], targets, RPN_RULES[dialect], valid)
            assert (label.tolist(), target.tolist(), iou.tolist()) == ([0, 0], [0, 0], [0, 0])

    def test_arrays_without_rows(self):
        some, none = jnp.array([TARGET]), jnp.zeros((0, 4))
        one, no = jnp.ones(1, bool), jnp.zeros(0, bool)
        assert assign_by_iou(some, none, no, rule=RPN_RULES["mmdet"]).label.tolist() == [0]
        assert assign_by_iou(some, none, no, rule=RPN_RULES["mmdet"], boxes_valid=~one).label.tolist() == [-1]
        assert assign_by_iou(none, some, one, rule=RPN_RULES["mmdet"]).label.shape == (0,)

    def test_a_target_that_touches_nothing_has_no_best_box(self):
        """An empty one, or one outside: all boxes overlap it equally, by 0."""
        for lost in (FAR, [3.0, 3, 3, 3]):
            label = assign([TARGET, POOR], [TARGET, lost], RPN_RULES["detectron2"])[0]
            assert label.tolist() == [1, 0]

    def test_boxes_that_do_not_count_are_nobodys_best(self):
        keep = jnp.arange(70) == 2
        label = assign(self.boxes, [TARGET], RPN_RULES["detectron2"], boxes_valid=keep)[0]
        assert label.tolist() == [-1, -1, 1, -1, -1]

    @pytest.mark.slow
    def test_crowds(self):
        """The first box lies in a crowd as a whole, the second by half, which is not more than a half."""
        crowds = jnp.array([[0.0, 0, 12, 6], [90, 90, 99, 94.5], [jnp.nan] * 4])
        options = {"crowds": crowds, "crowds_valid": jnp.array([True, True, False])}
        label = assign(self.boxes, [TARGET], RPN_RULES["mmdet"], **options)[0]
        assert label.tolist() == [-1, 1, -1, -1, 0]
        label = assign(self.boxes, [], RPN_RULES["mmdet"], **options, crowd_overlap=0.4)[0]
        assert label.tolist() == [-1, 0, -1, -1, -1]

    def test_errors(self):
        arrays = jnp.zeros((1, 4)), jnp.zeros((1, 4)), jnp.ones(1, bool)
        with pytest.raises(ValueError, match=r"low 0\.7 and high 0\.3: expected 0 <= low <= high <= 1"):
            assign_by_iou(*arrays, rule=IouRule(low=0.7, high=0.3))
        with pytest.raises(ValueError, match=r"block_size 0: expected at least 1 box"):
            assign_by_iou(*arrays, rule=ROI_RULES["mmdet"], block_size=0)


class TestAgainstLoops:
    @pytest.mark.parametrize("dialect", RPN_RULES)
    def test_equals_the_reference(self, rng, dialect):
        """Three blocks, and targets in two words of bits."""
        reference, rule = mmdet if dialect == "mmdet" else detectron2, RPN_RULES[dialect]
        for n, g in ((70, 37), (70, 3), (40, 12), (20, 1)):
            boxes, targets = example(rng, n, g)
            label, target, iou = assign(boxes, targets, rule)
            expected = overlaps(boxes, targets)
            expected_label, expected_target = reference(expected, rule)
            assert label.tolist() == expected_label.tolist()
            assert target.tolist() == expected_target.tolist()
            assert iou.tolist() == expected.max(1).tolist()

    @pytest.mark.slow
    @pytest.mark.parametrize("dialect", ROI_RULES)
    def test_equals_the_reference_on_proposals(self, rng, dialect):
        reference, rule = mmdet if "mmdet" in dialect else detectron2, ROI_RULES[dialect]
        boxes, targets = example(rng, 70, 9)
        label, target, _ = assign(boxes, targets, rule)
        expected_label, expected_target = reference(overlaps(boxes, targets), rule)
        assert label.tolist() == expected_label.tolist()
        assert target.tolist() == expected_target.tolist()

    def test_padding_and_its_place_change_nothing(self, rng):
        boxes, targets = example(rng, 70, 20)
        rule = RPN_RULES["detectron2"]
        label, target, iou = assign(boxes, targets, rule)
        place = np.sort(rng.permutation(40)[:20])
        padded, valid = np.full((40, 4), np.inf), np.zeros(40, bool)
        padded[place], valid[place] = targets, True
        again = assign(boxes, padded, rule, valid)
        assert again[0].tolist() == label.tolist()
        assert np.where(iou > 0, again[1], place[0]).tolist() == place[np.where(iou > 0, target, 0)].tolist()
        assert again[2].tolist() == iou.tolist()

    @pytest.mark.slow
    def test_real_coordinates_in_any_blocks(self, rng):
        """The best box of a target is found though overlaps round differently in different programs."""
        low = rng.uniform(0, 500, (70, 2))
        boxes = np.concatenate([low, low + rng.uniform(5, 300, (70, 2))], -1)
        rule = IouRule(low=0.3, high=1.0, low_quality=True)
        found = [assign(boxes, boxes[:9] + 7.3, rule, block_size=size)[0] for size in (32, 70)]
        assert found[0].tolist() == found[1].tolist()
        assert 1 <= (found[0] == 1).sum() <= 9

    @pytest.mark.slow
    def test_under_vmap_and_shard_map(self, rng, mesh):
        """Anchors shared by all images."""
        boxes, _ = example(rng, 70, 9)
        targets = jnp.asarray(np.stack([example(rng, 70, 9)[1] for _ in range(8)]))
        valid = jnp.asarray(rng.random((8, 9)) < 0.7)
        one = functools.partial(assign_by_iou, rule=RPN_RULES["mmdet"], block_size=32)

        def run(targets, valid):
            return jax.vmap(one, in_axes=(None, 0, 0))(jnp.asarray(boxes), targets, valid)

        split = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P("data"), out_specs=P("data")))
        for image, row in enumerate(zip(*split(targets, valid), strict=True)):
            alone = one(jnp.asarray(boxes), targets[image], valid[image])
            assert [x.tolist() for x in row] == [x.tolist() for x in alone]

    @pytest.mark.slow
    def test_memory_of_all_anchors_of_an_image(self):
        """A table of all overlaps would take 107 MB, and one of all pairs of corners 430."""
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((268_569, 4), (100, 4))]
        run = functools.partial(assign_by_iou, rule=RPN_RULES["detectron2"])
        program = jax.jit(run).lower(*shapes, jax.ShapeDtypeStruct((100,), bool)).compile()
        assert program.memory_analysis().temp_size_in_bytes < 25e6


class TestMatchedBoxes:
    def test_nothing_of_padding_gets_through(self):
        boxes, targets = jnp.array([TARGET, FAR]), jnp.array([[jnp.nan] * 4, TARGET])
        found = assign_by_iou(boxes, targets, jnp.array([False, True]), rule=ROI_RULES["detectron2"])
        assert matched_boxes(targets, found).tolist() == [TARGET, [0] * 4]
        found = assign_by_iou(boxes, targets, jnp.array([False, False]), rule=ROI_RULES["detectron2"])
        assert matched_boxes(targets, found).tolist() == [[0] * 4] * 2
