"""OWL-ViT's parts: boxes and scores, questions, mosaics, and the loss."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from coco_files import HEIGHT, WIDTH, annotation, content, image_row, write_set

from eqvision import UnknownNameError
from eqvision.data.detection import (
    CocoDetection,
    DetectionExample,
    Mosaic,
    Questions,
    canonical,
    federated_absent,
    merged,
)
from eqvision.detectors import batch_extent, decode_queried, owlvit
from eqvision.heads import box_bias
from eqvision.losses import OpenVocabularyLossConfig, open_vocabulary_loss
from eqvision.metrics import CocoMetric
from eqvision.ops import hungarian
from eqvision.problems.detection_evaluator import DetectionEvaluator, lvis_frequencies
from eqvision.problems.open_vocabulary_data import label_frequencies, rare_labels
from eqvision.types import (
    DetectionBatch,
    Detections,
    DetectionTargets,
    QueriedPredictions,
    QueriedTargets,
    TextTokens,
)

# XLA at its full level takes longer for these than the runs gain.
quickly = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


# Boxes


def test_boxes_of_a_head_that_says_nothing():
    """Of a cell's size, around its lower right corner, kept off the image's edge by the published 1e-4."""
    boxes = 1 / (1 + np.exp(-box_bias(2, 4)))
    np.testing.assert_allclose(boxes[:, 0], [0.25, 0.5, 0.75, 1] * 2, atol=2e-4)
    np.testing.assert_allclose(boxes[:, 1], [0.5] * 4 + [1] * 4, atol=2e-4)
    np.testing.assert_allclose(boxes[:, 2:], [[0.25, 0.5]] * 8, atol=2e-4)


def test_extents_of_padded_and_of_squeezed_images():
    """A wide image of 400 x 300 padded to a square spans 400 pixels both ways; squeezed it spans itself."""
    sizes, originals = jnp.array([[72, 96], [96, 96]]), jnp.array([[300, 400], [300, 400]])
    np.testing.assert_allclose(batch_extent((96, 96), sizes, originals), [[400, 400], [300, 400]])


def some_predictions():
    """Two places and three queries, of which the last asks for nothing."""
    logits = jnp.array([[[2.0, 1.0, -1e6], [0.0, 3.0, -1e6]]])
    boxes = jnp.array([[[0.5, 0.5, 0.2, 0.4], [0.5, 0.5, 0.2, 0.36]]])
    return QueriedPredictions(logits, boxes, jnp.zeros((1, 2, 4)))


@pytest.mark.parametrize(
    ("options", "labels", "scores"),
    [
        ({}, [1, 0, 1, 0], [3.0, 2.0, 1.0, 0.0]),
        ({"exclusive": True}, [1, 0], [3.0, 2.0]),
        pytest.param({"nms_threshold": 0.5}, [1, 0], [3.0, 2.0], marks=pytest.mark.slow),
        pytest.param({"nms_threshold": 0.95}, [1, 0, 1, 0], [3.0, 2.0, 1.0, 0.0], marks=pytest.mark.slow),
    ],
)
def test_decoding(options, labels, scores):
    """Best pairs first; a query that asks for nothing finds nothing, and suppression is within a query."""
    decode = quickly(functools.partial(decode_queried, count=6, **options))
    found = jax.tree.map(np.asarray, decode(some_predictions(), jnp.array([[100, 200]])))
    assert found.valid[0].tolist() == [True] * len(labels) + [False] * (6 - len(labels))
    assert found.labels[0, : len(labels)].tolist() == labels
    np.testing.assert_allclose(found.scores[0, : len(labels)], 1 / (1 + np.exp(-np.array(scores))), rtol=1e-5)
    np.testing.assert_allclose(found.boxes[0, 0], [80, 32, 120, 68], rtol=1e-5)


def test_an_unknown_size_is_named():
    with pytest.raises(UnknownNameError, match=r"OWL-ViT size 'b61' does not exist; nearest: b16"):
        owlvit("b61", key=jax.random.key(0))


# Questions


class Letters:
    """A tokenizer of letters."""

    def encode_batch(self, texts, length):
        rows = [[ord(letter) for letter in text[:length]] for text in texts]
        ids = np.array([row + [0] * (length - len(row)) for row in rows], np.int32)
        return TextTokens(ids, ids > 0)


NAMES = ("cat", "hot_dog", "Bow (weapon)", "zebra", "tie")


def questions(**options):
    return Questions(NAMES, ("{}", "a {}."), Letters(), 12, **{"max_queries": 4, "num_negatives": 2} | options)


def batch(labels, boxes=None):
    """One image for each list of labels."""
    count, rows = len(labels), max(map(len, labels), default=0) + 1
    valid = np.array([[i < len(each) for i in range(rows)] for each in labels])
    filled = np.array([[*each, *[3] * (rows - len(each))] for each in labels], np.int32)
    placed = np.full((count, rows, 4), np.nan, np.float32)  # what is not valid may hold anything
    for row, each in enumerate(labels):
        corner = 20 * np.arange(len(each))[:, None]
        placed[row, : len(each)] = corner + [0, 0, 10, 10] if boxes is None else boxes[row]
    sizes = np.full((count, 2), 96, np.int32)
    targets = DetectionTargets(placed, filled, valid)
    images = np.zeros((count, 96, 96, 1), np.uint8)
    return DetectionBatch(images, sizes, sizes, targets, np.ones(count, np.float32), np.arange(count, dtype=np.int32))


def texts(queries, row):
    return ["".join(map(chr, ids[mask])) for ids, mask in zip(queries.ids[row], queries.mask[row], strict=True)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("hot_dog", "hot dog"), ("Bow (weapon)", "bow weapon"), ("T--shirt  ", "t-shirt"), ("Grüße", "grüße")],
)
def test_names_as_they_are_asked(name, expected):
    assert canonical(name) == expected


def test_labels_become_columns():
    """Each object answers the question of its own name, whatever the sentence; the rest is asked for in vain."""
    asked = questions()(batch([[1, 4, 1], []]), step=5)
    found = texts(asked.queries, 0)
    for column, name in ((0, "hot dog"), (1, "tie")):
        assert found[column] in (name, f"a {name}")
    assert asked.targets.answers[0].astype(int).tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0] * 4]
    assert asked.targets.valid.tolist() == [[True, True, True, False], [False] * 4]
    assert not any(name in text for text in found[2:] for name in ("hot dog", "tie"))
    assert np.isfinite(asked.targets.boxes).all()
    assert all(texts(asked.queries, 1)[:1])  # an image of nothing is asked all the same


def test_questions_depend_on_seed_step_and_image_alone():
    rows, reverse = [[0], [1, 2], [4]], [[4], [1, 2], [0]]
    one = questions(seed=3)(batch(rows), step=7)
    other = batch(reverse)._replace(indices=np.array([2, 1, 0], np.int32))
    two = questions(seed=3)(other, step=7)
    np.testing.assert_array_equal(one.queries.ids, two.queries.ids[::-1])
    np.testing.assert_array_equal(one.targets.boxes[0, 0], two.targets.boxes[2, 0])
    later, seeded = questions(seed=3)(batch(rows), step=8), questions(seed=4)(batch(rows), step=7)
    assert not np.array_equal(one.queries.ids, later.queries.ids)
    assert not np.array_equal(one.queries.ids, seeded.queries.ids)


def test_known_hidden_frequent_and_too_many():
    known = questions(absent=lambda index: np.array([3, 0]), num_negatives=0)(batch([[0]]), 0)
    assert [text.removeprefix("a ") for text in texts(known.queries, 0)] == ["cat", "zebra", "", ""]
    hidden = questions(hidden=frozenset({0, 3}), num_negatives=4)(batch([[0, 1]]), 0)
    assert hidden.targets.valid.tolist() == [[False, True, False]]
    assert not any("cat" in text or "zebra" in text for text in texts(hidden.queries, 0))
    frequent = questions(frequencies=np.array([0, 0, 0, 0, 1.0]))(batch([[0]]), 0)
    assert [text.removeprefix("a ") for text in texts(frequent.queries, 0)] == ["cat", "tie", "", ""]
    many = questions(max_queries=2)(batch([[0, 1, 2, 3]]), 0)
    assert many.targets.answers.sum() == many.targets.valid.sum() == 2


def test_near_boxes_become_one_with_both_names(rng):
    boxes = np.array([[0, 0, 10, 10], [50, 50, 60, 60], [0, 0, 10, 9.5]], np.float32)
    kept, names = merged(boxes, np.array([1, 2, 4]), 0.9, rng)
    assert names == [{1, 4}, {2}]
    assert kept[0].tolist() in (boxes[0].tolist(), boxes[2].tolist())
    assert len(merged(boxes, np.array([1, 2, 4]), 0.96, rng)[0]) == 3
    asked = questions()(batch([[1, 2, 4]], boxes[None]), 0)
    assert asked.targets.answers[0].sum(axis=1).tolist() == [2, 1, 0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_queries": 0}, "max_queries=0, num_negatives=2; expected 1 or more, and 0 or more"),
        ({"frequencies": np.ones(3)}, "3 frequencies for 5 names"),
    ],
)
def test_questions_that_cannot_be_asked(options, message):
    with pytest.raises(ValueError, match=message):
        questions(**options)


# LVIS


def lvis(root, absent=7):
    """Two images; of the classes "hot_dog" is rare. In the first, ``absent`` (zebras) is not, and not all ties are
    marked."""
    lists = {"neg_category_ids": [absent], "not_exhaustive_category_ids": [3]}
    images = [image_row(10) | lists, image_row(20)]
    names = ((1, "hot_dog", "r"), (3, "tie", "f"), (7, "zebra", "c"))
    categories = [{"id": number, "name": name, "frequency": f} for number, name, f in names]
    objects = [annotation(1, 10, 3), annotation(2, 20, 3), annotation(3, 20, 1)]
    return CocoDetection(write_set(root, content(images, objects, categories)))


def test_what_lvis_says_of_its_classes(tmp_path):
    """Known absences are asked for first, rare classes can be kept back, frequent ones are drawn more often."""
    source = lvis(tmp_path)
    np.testing.assert_allclose(label_frequencies(source), [1 / 3, 2 / 3, 0])
    assert rare_labels(source) == {0}
    assert federated_absent(source)(0).tolist() == [2]
    assert label_frequencies(Plates()) is federated_absent(Plates()) is None


@pytest.mark.parametrize(("absent", "rare"), [(7, 1.0), (1, 0.5)])
def test_figures_of_lvis_follow_its_rules(absent, rare, tmp_path):
    """A hot dog that is found where nobody looked for one counts in no way; where it is known to be absent, it does."""
    source = lvis(tmp_path, absent)
    assert lvis_frequencies(source) == ("r", "f", "c")
    evaluator = object.__new__(DetectionEvaluator)
    evaluator._problem = types.SimpleNamespace(test_source=source, paste=None)
    coco = CocoMetric(source.class_names, frequencies=lvis_frequencies(source))
    for index in range(2):
        truth, wrong = source.truth(index), index == 0
        boxes = np.concatenate([truth.boxes, truth.boxes[:wrong]]).astype(np.float32)
        labels = np.array([*truth.labels, *[0] * wrong], np.int32)
        scores = np.where(np.arange(len(labels)) < len(truth.labels), 0.5, 0.9).astype(np.float32)
        found = Detections(boxes, scores, labels, np.ones(len(labels), bool))
        evaluator._score(coco, index, truth, found, (HEIGHT, WIDTH))
    figures = coco.compute()
    assert (figures["APr"], figures["APf"]) == pytest.approx((rare, 1.0))


# Mosaics


class Plates:
    """Grey images of 40 x 20 pixels; the object of image i is of class i, in the left half."""

    class_names = ("a", "b", "c")
    num_skipped = 0
    sizes = np.array([[20, 40]] * 3)

    def __len__(self):
        return 3

    def __getitem__(self, index):
        image = np.full((20, 40, 3), 10 * (index + 1), np.uint8)
        boxes = np.array([[0, 0, 20, 20]], np.float32)
        return DetectionExample(image, boxes, np.array([index], np.int32), None, index, index, (20, 40))

    def describe(self, index):
        return f"plate {index}"


def mosaic(**options):
    return Mosaic(Plates(), **{"size": 24, "flip": 0.0, "crop": None} | options)


def test_a_mosaic_holds_each_image_in_its_tile(rng):
    source = Plates()
    made = mosaic(grids=(2,), probabilities=(1.0,), fill=7)(source[1], rng)
    assert made.image.shape == (24, 24, 3)
    assert made.boxes.tolist() == [[0, 0, 6, 6], [12, 0, 18, 6], [0, 12, 6, 18], [12, 12, 18, 18]]
    assert made.labels[0] == 1
    for (left, top, _, _), label in zip(made.boxes.astype(int), made.labels, strict=True):
        assert (made.image[top : top + 6, left : left + 12] == 10 * (label + 1)).all()
        assert (made.image[top + 6 : top + 12, left : left + 12] == 7).all()
    squeezed = mosaic(grids=(1,), probabilities=(1.0,), pad=False)(source[2], rng)
    assert squeezed.boxes.tolist() == [[0, 0, 12, 24]]


def test_mosaics_are_as_frequent_as_asked(rng):
    made = [len(mosaic()(Plates()[0], rng).labels) for _ in range(100)]
    assert [made.count(grid) / 100 for grid in (1, 4, 9)] == pytest.approx([0.4, 0.3, 0.3], abs=0.15)
    assert set(made) == {1, 4, 9}


def test_objects_that_are_cut_are_dropped(rng):
    """Of an object at least the share that was asked for is left, or it is gone."""
    transform = mosaic(grids=(1,), probabilities=(1.0,), crop=(0.3, 0.5), least_left=0.6, pad=False)
    found = [transform(Plates()[0], rng) for _ in range(40)]
    assert {len(each.boxes) for each in found} == {0, 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 25}, "a mosaic of 25 pixels cannot be cut into 2 equal tiles"),
        ({"probabilities": (0.5, 0.5)}, "expected sides of 1 or more, and for each a probability, of sum 1"),
        ({"crop": (0.0, 1.0)}, "expected shares of the area"),
    ],
)
def test_mosaics_that_cannot_be_made(options, message):
    with pytest.raises(ValueError, match=message):
        mosaic(**options)


# The loss


def case(rng, b=2, n=9, q=4, g=3):
    """Two images; the last object of each is not valid, the last query of the second asks for nothing."""
    logits = rng.normal(size=(b, n, q)).astype(np.float32)
    boxes = rng.uniform(0.2, 0.5, (b, n, 4)).astype(np.float32)
    corners = rng.uniform(0, 40, (b, g, 2))
    targets = np.concatenate([corners, corners + rng.uniform(8, 40, (b, g, 2))], axis=-1).astype(np.float32)
    answers = rng.random((b, g, q)) < 0.4
    answers[:, :, 0] |= ~answers.any(axis=-1)
    valid, asked = np.ones((b, g), bool), np.ones((b, q), bool)
    valid[:, -1], asked[1, -1] = False, False
    logits[1, :, -1] = -1e6
    predictions = QueriedPredictions(jnp.asarray(logits), jnp.asarray(boxes), jnp.zeros((b, n, 2)))
    return predictions, QueriedTargets(jnp.asarray(targets), jnp.asarray(answers), jnp.asarray(valid)), asked


@quickly
def loss_and_gradient(predictions, targets, asked, weights):
    size = jnp.full((len(asked), 2), 96)

    def total(predictions):
        config = OpenVocabularyLossConfig(class_weight=2.0, l1_weight=3.0)
        return open_vocabulary_loss(predictions, targets, asked, size, weights, weights.sum(), config)

    (loss, terms), gradient = jax.value_and_grad(total, has_aux=True)(predictions)
    return loss, terms, gradient


def test_the_loss_by_hand(rng):
    """Written out for one image, with the assignment that the matcher gives."""
    predictions, targets, asked = case(rng)
    loss, terms, _ = loss_and_gradient(predictions, targets, asked, jnp.array([1.0, 0.0]))
    logits, boxes = (np.asarray(x[0], np.float64) for x in predictions[:2])
    answers, wanted = np.asarray(targets.answers[0, :2], float), np.asarray(targets.boxes[0, :2], np.float64) / 96
    p = 1 / (1 + np.exp(-logits))
    positive, negative = -0.3 * (1 - p) ** 2 * np.log(p), -0.7 * p**2 * np.log(1 - p)
    found = np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1)
    cxcywh = np.concatenate([(wanted[:, :2] + wanted[:, 2:]) / 2, wanted[:, 2:] - wanted[:, :2]], axis=1)
    giou = np.array([[giou_of(a, b) for b in wanted] for a in found])
    cost = 2 * (positive - negative) @ answers.T - giou
    cost += 3 * np.abs(boxes[:, None] - cxcywh[None]).sum(axis=-1)
    places = np.asarray(hungarian(jnp.asarray(cost, jnp.float32), jnp.ones(2, bool)))
    labels = np.zeros_like(logits)
    labels[places] = answers
    expected = {
        "class": (labels * positive + (1 - labels) * negative).sum() / answers.sum(),
        "l1": np.abs(found[places] - wanted).sum() / 2,
        "giou": (1 - giou[places, [0, 1]]).sum() / 2,
    }
    for name, value in expected.items():
        assert float(terms[name]) == pytest.approx(value, rel=1e-4), name
    assert float(loss) == pytest.approx(2 * expected["class"] + 3 * expected["l1"] + expected["giou"], rel=1e-4)


def giou_of(a, b):
    overlap = np.prod(np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0))
    union = np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - overlap
    hull = np.prod(np.maximum(a[2:], b[2:]) - np.minimum(a[:2], b[:2]))
    return overlap / union - (hull - union) / hull


def test_what_does_not_count_changes_nothing(rng, assert_close):
    """Junk in invalid objects, answers of queries that ask for nothing, the order of queries, images of weight 0."""
    predictions, targets, asked = case(rng)
    weights = jnp.array([1.0, 1.0])
    one = loss_and_gradient(predictions, targets, asked, weights)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(one))
    junk = targets._replace(
        boxes=targets.boxes.at[:, -1].set(jnp.nan), answers=targets.answers.at[:, -1].set(True).at[1, :, -1].set(True)
    )
    assert_close(loss_and_gradient(predictions, junk, asked, weights), one, 0)
    order = np.array([2, 0, 3, 1])
    shuffled = predictions._replace(logits=predictions.logits[..., order])
    others = loss_and_gradient(
        shuffled, targets._replace(answers=targets.answers[..., order]), asked[:, order], weights
    )
    assert_close(others[:2], one[:2], 1e-6)
    alone = loss_and_gradient(predictions, targets, asked, jnp.array([1.0, 0.0]))
    spoiled = predictions._replace(logits=predictions.logits.at[1].set(jnp.nan))
    assert_close(loss_and_gradient(spoiled, junk, asked, jnp.array([1.0, 0.0])), alone, 0)
    assert not np.asarray(alone[2].logits[1]).any()


def test_images_count_alike_and_may_be_empty(rng, assert_close):
    """The loss of a batch is the mean of those of its images; one without objects has only places to silence."""
    predictions, targets, asked = case(rng)
    empty = targets._replace(valid=targets.valid.at[1].set(False))
    loss, terms, gradient = loss_and_gradient(predictions, empty, asked, jnp.ones(2))
    each = [loss_and_gradient(predictions, empty, asked, jnp.eye(2)[i]) for i in range(2)]
    assert float(loss) == pytest.approx((float(each[0][0]) + float(each[1][0])) / 2, rel=1e-5)
    assert float(each[1][1]["l1"]) == float(each[1][1]["giou"]) == 0 < float(each[1][1]["class"])
    assert not np.asarray(gradient.boxes_cxcywh[1]).any()
    assert np.isfinite(float(terms["giou"]))


@pytest.mark.slow
def test_an_object_without_a_place_is_not_passed_over(rng):
    predictions, targets, asked = case(rng, n=1)
    loss, _, _ = loss_and_gradient(predictions, targets, asked, jnp.ones(2))
    assert np.isnan(loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"focal_alpha": 1.5}, "focal_alpha is 1.5; expected a value in"), ({"l1_weight": -1.0}, "l1_weight is -1.0")],
)
def test_losses_that_are_none(options, message):
    with pytest.raises(ValueError, match=message):
        OpenVocabularyLossConfig(**options)


def test_predictions_of_other_queries_are_refused(rng):
    predictions, targets, asked = case(rng)
    with pytest.raises(ValueError, match="of 2 images and 4 queries, and targets of 2 and 3; expected the same"):
        loss_and_gradient(predictions, targets._replace(answers=targets.answers[..., :3]), asked, jnp.ones(2))
