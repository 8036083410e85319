"""Segment Anything without a reference: prompts, sizes, predictor, masks of everything, loss, rounds, names."""

import itertools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sam_references as source

import eqvision
from eqvision.data.detection.rle import encode_uncompressed
from eqvision.layers import mask_prompts
from eqvision.losses import mask_iou, prompted_mask_loss
from eqvision.ops import resize_bilinear
from eqvision.pretrained import LAYOUTS, WeightsError, to_layout
from eqvision.segmenters import sam as segment
from eqvision.segmenters.sam import predictor as predictor_module
from eqvision.types import MaskPredictions
from eqvision.zoo import DETECTORS

# Prompts


def test_slots_of_prompts():
    points, labels = np.ones((1, 2, 1, 2)), np.array([[[1], [0]]])
    boxes = np.arange(8.0).reshape(1, 2, 4)
    alone = mask_prompts(points, labels, slots=4)
    assert np.asarray(alone.labels).tolist() == [[[1, -1, -2, -2], [0, -1, -2, -2]]]
    both = mask_prompts(points, labels, boxes, slots=4)
    assert np.asarray(both.labels).tolist() == [[[1, 2, 3, -2], [0, 2, 3, -2]]]
    assert np.asarray(both.points)[0, 1, 1:3].tolist() == [[4, 5], [6, 7]]
    assert mask_prompts(count=(2, 3)).labels.shape == (2, 3, 0)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": None}, "with a label for each point; got points"),
        ({"boxes": np.zeros((1, 3, 4))}, r"of the same images, .* boxes \(1, 3, 4\)"),
        ({"labels": np.full((1, 2, 1), 3)}, r"labels must be 1 \(inside\), 0 \(outside\) or -1"),
        ({"slots": 1}, "2 points, corners and signs of no box for each prompt do not fit into 1 slots"),
    ],
)
def test_prompts_that_do_not_fit(arguments, message):
    given = {"points": np.ones((1, 2, 1, 2)), "labels": np.ones((1, 2, 1), int)} | arguments
    with pytest.raises(ValueError, match=message):
        mask_prompts(**given)


def test_masks_of_another_size():
    model = jax.eval_shape(lambda: source.toy_sam(key=jax.random.key(0)))
    prompts = mask_prompts(masks=np.zeros((1, 1, 64, 64), np.float32))
    with pytest.raises(ValueError, match="prompt masks of 64x64 do not fit features of 8x8; expected 32x32"):
        jax.eval_shape(lambda m: m.decode(jnp.zeros((1, 8, 8, source.OUT)), prompts), model)


# Sizes


@pytest.mark.parametrize(
    ("size", "inner"),
    [((1365, 2048), (683, 1024)), ((2048, 3), (1024, 2)), ((3, 4096), (1, 1024)), ((5, 5), (1024,) * 2)],
)
def test_sizes(size, inner):
    assert segment.geometry(size).inner == inner


def test_an_image_is_normalised_before_it_is_padded():
    image = np.full((30, 60, 3), 255, np.uint8)
    prepared = segment.prepare_image(image, 64)
    white = (1 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(prepared[:32], np.broadcast_to(white, (32, 64, 3)), rtol=1e-5)
    assert not prepared[32:].any()


@pytest.mark.parametrize("size", [(50, 23), (7, 64)])
def test_logits_are_resized_twice(assert_close, rng, size):
    logits, sizes = rng.normal(size=(2, 16, 16)).astype(np.float32), segment.geometry(size, 64)
    padded = resize_bilinear(jnp.asarray(logits)[..., None], (64, 64))[:, : sizes.inner[0], : sizes.inner[1]]
    expected = resize_bilinear(padded, size)[..., 0]
    assert_close(segment.resize_logits(logits, sizes), expected, 1e-6)
    assert np.array_equal(segment.resize_masks(logits, sizes, threshold=0.3), np.asarray(expected) > 0.3)


# The model and its weights


@pytest.mark.parametrize(("size", "count"), [("b", 93_735_472), ("l", 312_342_832), ("h", 641_090_608)])
def test_parameter_counts(size, count):
    """Those of the official models, in which the 2 x 128 matrix of positions is a buffer."""
    model = jax.eval_shape(lambda: segment.sam(size, key=jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == count + 256


@pytest.mark.usefixtures("unchecked")
def test_refused_options():
    with pytest.raises(ValueError, match="size 'g' does not exist; choose from b, l, h"):
        segment.sam("g", key=jax.random.key(0))
    with pytest.raises(ValueError, match="width 20 must be divisible by 8"):
        jax.eval_shape(lambda: segment.sam("b", width=20, key=jax.random.key(0)))


@pytest.mark.parametrize(("name", "names"), [("official_sam", source.official_names), ("hf_sam", source.hf_names)])
def test_every_tensor_there_and_back(name, names, tmp_path, rng, monkeypatch):
    monkeypatch.setitem(DETECTORS, "toy_sam", source.toy_sam)
    tensors = {each: rng.normal(size=shape).astype(np.float32) for each, shape in names()}
    np.savez(tmp_path / "sam.npz", **tensors)
    model, state = eqvision.load("toy_sam", tmp_path / "sam.npz")
    assert model.head.transformer.blocks[0].norm1.eps == (1e-5 if name == "official_sam" else 1e-6)
    assert model.head.transformer.norm.eps == 1e-5
    again = to_layout(model, state, LAYOUTS[name])
    assert set(again) == set(tensors)
    for each, tensor in tensors.items():
        np.testing.assert_array_equal(again[each], tensor, err_msg=each)


def test_the_matrix_of_positions_under_two_names(tmp_path, rng, monkeypatch):
    monkeypatch.setitem(DETECTORS, "toy_sam", source.toy_sam)
    tensors = {each: rng.normal(size=shape).astype(np.float32) for each, shape in source.hf_names()}
    matrix = tensors["shared_image_embedding.positional_embedding"]
    tied = "prompt_encoder.shared_embedding.positional_embedding"
    np.savez(tmp_path / "same.npz", **tensors, **{tied: matrix})
    model, _ = eqvision.load("toy_sam", tmp_path / "same.npz")
    np.testing.assert_array_equal(model.prompts.position.matrix, matrix)
    np.savez(tmp_path / "other.npz", **tensors, **{tied: matrix + 1})
    with pytest.raises(WeightsError, match="are one matrix in SamModel, and differ in this file"):
        eqvision.load("toy_sam", tmp_path / "other.npz")


# The predictor


@pytest.fixture(scope="module")
def predictor():
    predictor = segment.Predictor(source.noisy_sam(), source.STATE, prompts_per_batch=2, max_points=2)
    predictor.set_image(np.random.default_rng(4).integers(0, 256, (48, 90, 3), dtype=np.uint8))
    return predictor


def test_one_program_for_every_kind_of_prompt(predictor, assert_close, rng):
    points, labels = rng.uniform(0, 48, (5, 2, 2)), rng.integers(0, 2, (5, 2))
    boxes = np.tile([[3.0, 4, 60, 40]], (5, 1))
    every = predictor.predict(points, labels, boxes)
    programs = predictor_module._decode._cache_size()
    assert (every.masks.shape, every.logits.shape, every.iou.shape) == ((5, 3, 48, 90), (5, 3, 32, 32), (5, 3))
    alone = [predictor.predict(points[i : i + 1], labels[i : i + 1], boxes[i : i + 1]) for i in range(5)]
    assert_close(every.logits, np.concatenate([each.logits for each in alone]), 1e-5)
    assert_close(every.iou, np.concatenate([each.iou for each in alone]), 1e-5)
    one = predictor.predict(points, labels, multimask=False)
    assert one.masks.shape == (5, 1, 48, 90)
    again = predictor.predict(points[:, :1], labels[:, :1], masks=one.logits[:, 0])
    for kind in (one, again, predictor.predict(boxes=boxes), predictor.predict()):
        assert np.abs(kind.logits[0, 0] - every.logits[0, 0]).max() > 1e-3
    assert predictor_module._decode._cache_size() == programs


@pytest.mark.slow
def test_absent_points_change_nothing(predictor, assert_close, rng):
    points, labels = rng.uniform(0, 48, (2, 1, 2)), np.array([[1], [0]])
    wide = segment.Predictor(predictor.model, source.STATE, prompts_per_batch=2, max_points=3)
    wide._image = predictor._image
    assert_close(wide.predict(points, labels).logits, predictor.predict(points, labels).logits, 1e-5)
    junk = np.concatenate([points, np.full((2, 1, 2), np.nan)], axis=1)
    absent = np.concatenate([labels, [[-1], [-1]]], axis=1)
    assert np.isfinite(predictor.predict(junk, absent).logits).all()


BOX, ONE = np.array([[1.0, 1, 9, 9]]), np.ones((1, 1), int)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"points": np.ones((1, 2))}, r"points must be \(p, n, 2\) for p prompts, got \(1, 2\)"),
        ({"points": np.ones((1, 1, 2))}, "points need labels"),
        (
            {"points": np.array([[[10.0, 60]]]), "labels": ONE},
            r"\[10.0, 60.0\] is outside the image of 48x90",
        ),
        ({"points": np.ones((1, 3, 2)), "labels": np.ones((1, 3), int)}, "3 points for a prompt, and max_points is 2"),
        ({"boxes": BOX[:, [2, 1, 0, 3]]}, r"the box \[9.0, 1.0, 1.0, 9.0\] is empty, or outside"),
        (
            {"boxes": BOX, "masks": np.zeros((1, 48, 90))},
            r"masks must be \(p, 32, 32\) for p prompts, got \(1, 48, 90\)",
        ),
        ({"boxes": np.tile(BOX, (2, 1)), "masks": np.zeros((1, 32, 32))}, "all parts must be of the same prompts"),
        ({"boxes": np.zeros((0, 4))}, "one or more"),
    ],
)
def test_refused_prompts(predictor, arguments, message):
    with pytest.raises(ValueError, match=message):
        predictor.predict(**arguments)


@pytest.mark.usefixtures("unchecked")
def test_refused_images():
    fresh = segment.Predictor(source.noisy_sam(), source.STATE)
    with pytest.raises(segment.NoImageError, match="no image yet; call set_image first"):
        fresh.predict(boxes=BOX)
    with pytest.raises(ValueError, match=r"must be RGB \(height, width, 3\) of uint8, got \(8, 8\) uint8"):
        fresh.set_image(np.zeros((8, 8), np.uint8))
    with pytest.raises(ValueError, match="max_points must be at least 1, got 0"):
        segment.Predictor(source.noisy_sam(), source.STATE, max_points=0)


# Masks of everything


def test_crops_and_grids():
    assert segment.crop_boxes((300, 400), 0) == [((0, 0, 400, 300), 0)]
    layers = segment.crop_boxes((300, 400), 2)
    assert [layer for _, layer in layers] == [0] + [1] * 4 + [2] * 16
    # 512 / 1500 of 300 are 102 pixels shared; (400 + 102) / 2 and (300 + 102) / 2 pixels a crop
    assert [box for box, layer in layers if layer == 1] == [
        (0, 0, 251, 201), (0, 99, 251, 300), (149, 0, 400, 201), (149, 99, 400, 300)
    ]  # fmt: skip
    np.testing.assert_allclose(segment.point_grid(2), [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]])


def test_stability_by_hand():
    logits = np.array([[2.0, 0.5, -0.5, -2.0]])
    assert segment.stability_score(logits, 1.0) == pytest.approx(1 / 3)
    assert math.isnan(segment.stability_score(np.full((2, 2), -5.0)))


class Planted(segment.Predictor):
    """Gives masks that were made beforehand: at full size for images of ``side`` pixels, whatever the crop."""

    def __init__(self, planted):
        super().__init__(source.noisy_sam(), source.STATE, prompts_per_batch=2)
        self.planted, self.calls = planted, []

    def set_image(self, image):
        self._image = jnp.zeros((1, 8, 8, source.OUT)), segment.geometry(image.shape[:2], self.side)
        self.calls.append(image.shape[:2])

    def logits(self, points, labels):
        logits, iou = self.planted
        assert points.shape == (len(logits), 1, 2)
        assert labels.all()
        for first in range(0, len(logits), self.prompts_per_batch):
            rows = slice(first, first + self.prompts_per_batch)
            yield predictor_module.SmallMasks(logits[rows], iou[rows])


def rectangle(x1, y1, x2, y2, height=5.0):
    logits = np.full((64, 64), -height, np.float32)
    logits[y1:y2, x1:x2] = height
    return logits


def planted(rows):
    """Four points, of which the first masks are given: (logits, iou); all others are poor."""
    logits, iou = np.full((4, 4, 64, 64), -5.0, np.float32), np.zeros((4, 4), np.float32)
    for place, (mask, quality) in zip(itertools.product(range(4), range(1, 4)), rows, strict=False):
        logits[place], iou[place] = mask, quality
    return logits, iou


ROWS = [
    (rectangle(4, 6, 20, 30), 0.95),
    (rectangle(4, 6, 20, 31), 0.97),  # nearly the same, and better
    (rectangle(40, 40, 50, 50), 0.9),
    (rectangle(40, 40, 50, 50), 0.88),  # not above
    (rectangle(30, 0, 50, 12, height=0.5), 0.99),  # not stable
    (rectangle(0, 0, 64, 64), 0.91),
    (np.full((64, 64), -5.0, np.float32), 0.99),  # empty
]


def test_masks_of_everything():
    predictor = Planted(planted(ROWS))
    image = np.zeros((64, 64, 3), np.uint8)
    found = segment.find_masks(predictor, image, segment.MaskSearch(points_per_side=2))
    assert [round(each.iou, 2) for each in found] == [0.97, 0.91, 0.9]
    assert [each.box for each in found] == [(4, 6, 20, 31), (0, 0, 64, 64), (40, 40, 50, 50)]
    expected = encode_uncompressed(ROWS[1][0] > 0)
    assert found[0].run_lengths.size == (64, 64)
    assert found[0].run_lengths.counts.tolist() == expected.counts.tolist()
    assert [each.point for each in found] == [(16, 16), (48, 16), (16, 16)]
    assert {each.stability for each in found} == {1.0}


def test_masks_in_crops():
    """A mask at the inner edge of a crop is cut off; others come back at their place in the image."""
    rows = [(rectangle(24, 24, 40, 40, 50.0), 0.95), (rectangle(0, 20, 30, 40, 50.0), 0.96)]
    predictor = Planted(planted(rows))
    image = np.zeros((321, 321, 3), np.uint8)
    search = segment.MaskSearch(points_per_side=2, crop_layers=1)
    found = segment.find_masks(predictor, image, search)
    assert predictor.calls == [(321, 321)] + [(215, 215)] * 4
    by_crop = {crop: [each for each in found if each.crop == crop] for crop in {each.crop for each in found}}
    # at the left edge of an inner crop the second mask is dropped
    assert {crop: len(masks) for crop, masks in by_crop.items()} == {
        (0, 0, 321, 321): 2, (0, 0, 215, 215): 2, (0, 106, 215, 321): 2, (106, 0, 321, 215): 1, (106, 106, 321, 321): 1
    }  # fmt: skip
    inner = by_crop[(106, 106, 321, 321)][0]
    x1, y1, x2, y2 = inner.box
    assert np.allclose([x1, y1, x2, y2], 106 + np.array([24, 24, 40, 40]) * 215 / 64, atol=1)
    assert inner.run_lengths.size == (321, 321)
    assert inner.run_lengths.counts[1::2].sum() == (x2 - x1) * (y2 - y1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points_per_side": 0}, "0 points per side, divided by 1 in each of 0 layers"),
        ({"crop_points_divisor": 8, "crop_layers": 2}, "must leave one or more"),
        ({"most_overlap": 1.5}, "most_overlap must be in 0..1, got 1.5"),
    ],
)
def test_refused_searches(options, message):
    with pytest.raises(ValueError, match=message):
        segment.MaskSearch(**options)


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
