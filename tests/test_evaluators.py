"""Fits on frozen features against scikit-learn and numpy: ridge, logistic regression, few-shot, nearest neighbours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier

from eqvision.data import digits
from eqvision.evaluators import (
    L2S,
    SHOTS,
    class_ranks,
    few_shot,
    knn,
    knn_votes,
    linear_probe,
    logistic_regression,
    rarest_class,
    ridge_system,
    shot_rows,
    validation_rows,
)
from eqvision.evaluators.knn import _nearest

CLASSES = 4


def problem(count: int, width: int, seed: int = 0):
    """Overlapping clouds with a mean far from zero and scales that differ, as features of networks have."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(CLASSES, width))
    labels = rng.integers(0, CLASSES, count).astype(np.int32)
    features = (0.7 * centres[labels] + rng.normal(size=(count, width))) * np.geomspace(0.1, 10, width) + 5
    return features.astype(np.float32), labels


@pytest.fixture(scope="module")
def digit_pixels():
    """Real features of width 64, with columns that never change."""
    train, test = digits("train"), digits("test")
    flat = [source.images.reshape(len(source), -1).astype(np.float32) / 255 for source in (train, test)]
    return flat[0], train.labels, flat[1], test.labels


def one_hot(labels, classes):
    return np.eye(classes)[labels]


# Which examples


def test_ranks_count_each_class_from_zero():
    labels = np.array([5, 0, 5, 2, 0, 5])
    ranks = class_ranks(labels, seed=3)
    assert {each: sorted(ranks[labels == each].tolist()) for each in (0, 2, 5)} == {0: [0, 1], 2: [0], 5: [0, 1, 2]}


def test_ranks_are_a_function_of_the_seed():
    labels = np.repeat(np.arange(5), 30)
    assert np.array_equal(class_ranks(labels, 1), class_ranks(labels, 1))
    assert not np.array_equal(class_ranks(labels, 1), class_ranks(labels, 2))


def test_a_fifth_of_each_class_is_held_out():
    labels = np.repeat([0, 1, 2, 3], [50, 12, 3, 1])
    held = validation_rows(labels, 0)
    assert [int(held[labels == each].sum()) for each in range(4)] == [10, 2, 1, 0]


def test_large_data_hold_out_no_more_than_is_useful():
    labels = np.repeat(np.arange(4), 20_000)
    assert validation_rows(labels, 0).sum() == 10_000


def test_nothing_to_hold_out():
    with pytest.raises(ValueError, match="3 training examples of 3 classes: no class has two"):
        validation_rows(np.array([0, 1, 2]), 0)


def test_shots_are_nested_equal_in_number_and_never_held_out():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 4], [40, 50, 60]))
    held, before = validation_rows(labels, 7), np.zeros(len(labels), bool)
    for shots in (1, 5, 25):
        rows = shot_rows(labels, shots, 7)
        assert np.bincount(labels[rows]).tolist() == [shots, shots, 0, 0, shots]
        assert not (rows & held).any()
        assert (rows | before == rows).all()
        before = rows


def test_shots_must_be_positive():
    with pytest.raises(ValueError, match="shots=0; expected 1 or more"):
        shot_rows(np.array([0, 0, 1, 1]), 0, 0)


def test_the_rarest_class_is_among_those_that_occur():
    assert rarest_class(np.repeat([1, 3, 6], [50, 10, 30]), 0) == (3, 8)


# Ridge


@pytest.mark.parametrize(("count", "width"), [(200, 12), (30, 50), (5000, 7)])
@pytest.mark.parametrize("l2", [2.0**-10, 1.0, 2.0**10, 2.0**20])
def test_ridge_equals_scikit_learn(count, width, l2, assert_close):
    features, labels = problem(count, width)
    weight, bias = ridge_system(features, labels, CLASSES).solve(l2)
    expected = Ridge(alpha=l2).fit(features.astype(np.float64), one_hot(labels, CLASSES))
    assert_close((weight, bias), (expected.coef_.T, expected.intercept_), 1e-7)


def test_ridge_scores_are_those_of_each_solution(assert_close):
    features, labels = problem(100, 20)
    other, _ = problem(13, 20, seed=1)
    system = ridge_system(features, labels, CLASSES)
    for l2, scores in zip((0.5, 8.0), system.scores(other, (0.5, 8.0)), strict=True):
        weight, bias = system.solve(l2)
        assert_close(scores, other @ weight + bias, 1e-10)


@pytest.mark.parametrize("l2", [0.0, -1.0, float("nan")])
def test_ridge_needs_a_positive_strength(l2):
    features, labels = problem(20, 3)
    with pytest.raises(ValueError, match=r"l2=.*; expected a positive"):
        ridge_system(features, labels, CLASSES).solve(l2)


# Logistic regression


def objective(features, labels, weight, bias, l2):
    logits = features.astype(np.float64) @ weight + bias
    highest = logits.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(logits - highest).sum(axis=1)) + highest[:, 0]
    return (log_sum - logits[np.arange(len(labels)), labels]).sum() + l2 / 2 * np.square(weight).sum()


@pytest.mark.parametrize(("count", "width"), [(300, 10), (40, 60)])
def test_logistic_regression_reaches_the_optimum_of_scikit_learn(count, width):
    features, labels = problem(count, width)
    l2s = (256.0, 1.0, 1 / 16)
    for l2, fit in zip(l2s, logistic_regression(features, labels, CLASSES, l2s), strict=True):
        best = LogisticRegression(C=1 / l2, solver="newton-cholesky", tol=1e-8).fit(features.astype(np.float64), labels)
        expected = objective(features, labels, best.coef_.T, best.intercept_, l2)
        assert objective(features, labels, fit.weight, fit.bias, l2) == pytest.approx(expected, rel=1e-4)
        assert fit.num_steps < 1000


def test_logistic_regression_of_constant_features_learns_the_frequencies(assert_close):
    labels = np.repeat(np.arange(CLASSES), [10, 20, 30, 40]).astype(np.int32)
    fit = logistic_regression(np.full((100, 3), 7.0, np.float32), labels, CLASSES, (1.0,))[0]
    assert_close(jax.nn.softmax(7 * fit.weight.sum(axis=0) + fit.bias), np.array([0.1, 0.2, 0.3, 0.4]), 1e-4)


def test_logistic_regression_needs_positive_strengths():
    features, labels = problem(20, 3)
    with pytest.raises(ValueError, match=r"expected positive strengths"):
        logistic_regression(features, labels, CLASSES, (1.0, 0.0))


# Linear probe and few-shot


def test_the_linear_probe_is_scikit_learns_ridge_on_all_digits(digit_pixels, assert_close):
    train, labels, test, test_labels = digit_pixels
    result = linear_probe(*digit_pixels, num_classes=10)
    expected = Ridge(alpha=result.l2).fit(train.astype(np.float64), one_hot(labels, 10))
    assert_close((result.weight, result.bias), (expected.coef_.T, expected.intercept_), 1e-4)
    assert result.accuracy == np.mean(expected.predict(test).argmax(axis=1) == test_labels)
    assert 0.9 < result.accuracy < 1
    assert result.l2 in L2S


@pytest.mark.parametrize("shots", SHOTS)
def test_few_shot_is_scikit_learns_ridge_on_the_shots_of_digits(shots, digit_pixels, assert_close):
    train, labels, test, test_labels = digit_pixels
    result = few_shot(*digit_pixels, num_classes=10, shots=shots, seed=5)
    rows = shot_rows(labels, shots, 5)
    assert rows.sum() == 10 * shots
    expected = Ridge(alpha=result.l2).fit(train[rows].astype(np.float64), one_hot(labels[rows], 10))
    assert_close((result.weight, result.bias), (expected.coef_.T, expected.intercept_), 1e-4)
    assert result.accuracy == np.mean(expected.predict(test).argmax(axis=1) == test_labels)


def test_more_shots_are_better(digit_pixels):
    found = [few_shot(*digit_pixels, num_classes=10, shots=shots).accuracy for shots in (1, 5, 25)]
    assert found == sorted(found)
    assert found[0] > 0.3


def test_the_logistic_probe_on_digits(digit_pixels):
    train, labels, test, test_labels = digit_pixels
    result = linear_probe(*digit_pixels, num_classes=10, kind="logistic", l2s=(0.1, 1.0, 10.0))
    expected = LogisticRegression(C=1 / result.l2, max_iter=5000).fit(train, labels)
    assert result.accuracy == pytest.approx(expected.score(test, test_labels), abs=2 / len(test))


@pytest.mark.parametrize("fit", [linear_probe, lambda *a, **k: few_shot(*a, shots=10, **k)])
def test_test_examples_choose_nothing(fit, digit_pixels):
    train, labels, test, test_labels = digit_pixels
    first = fit(train, labels, test, test_labels, num_classes=10)
    other = fit(train, labels, test[:50], (test_labels[:50] + 1) % 10, num_classes=10)
    assert first.l2 == other.l2
    assert np.array_equal(first.weight, other.weight)


def test_the_strength_is_the_middle_one_of_the_best_on_the_held_out_examples():
    features, labels = problem(400, 30)
    l2s = (2.0**-10, 2.0**6, 2.0**20)
    result = linear_probe(features, labels, *problem(50, 30, seed=1), num_classes=CLASSES, l2s=l2s, seed=2)
    held = validation_rows(labels, 2)
    accuracies = {
        l2: Ridge(alpha=l2).fit(features[~held], one_hot(labels[~held], CLASSES)).predict(features[held]).argmax(axis=1)
        for l2 in l2s
    }
    accuracies = {l2: np.mean(found == labels[held]) for l2, found in accuracies.items()}
    best = sorted(l2 for l2, value in accuracies.items() if value == max(accuracies.values()))
    assert result.l2 == best[len(best) // 2]
    assert result.validation_accuracy == max(accuracies.values())
    assert len(set(accuracies.values())) > 1


def test_probes_are_deterministic(digit_pixels):
    for kind in ("ridge", "logistic"):
        one, two = (linear_probe(*digit_pixels, num_classes=10, kind=kind, l2s=(1.0, 4.0)) for _ in range(2))
        assert np.array_equal(one.weight, two.weight)
        assert one[:3] == two[:3]


def test_a_class_with_fewer_examples_than_shots():
    labels = np.repeat(np.arange(3), [30, 30, 7]).astype(np.int32)
    features = np.random.default_rng(0).normal(size=(67, 4)).astype(np.float32)
    with pytest.raises(ValueError, match=r"class 2 has 6 training examples beside those held out .* 10 shots needs 10"):
        few_shot(features, labels, features, labels, num_classes=3, shots=10)


@pytest.mark.usefixtures("unchecked")
def test_features_and_labels_that_do_not_fit():
    features, labels = problem(40, 6)
    good = {"num_classes": CLASSES}
    with pytest.raises(ValueError, match=r"training labels are 0\.\.3; expected 0\.\.2"):
        linear_probe(features, labels, features, labels, num_classes=3)
    with pytest.raises(ValueError, match="training features are 6 wide and test features 5"):
        linear_probe(features, labels, features[:, :5], labels, **good)
    with pytest.raises(ValueError, match=r"test features have shape \(39, 6\) and there are 40 labels"):
        linear_probe(features, labels, features[1:], labels, **good)
    broken = features.copy()
    broken[7, 2] = np.nan
    with pytest.raises(ValueError, match="test features of 1 examples are not finite, the first in row 7"):
        knn(features, labels, broken, labels, **good)
    with pytest.raises(ValueError, match="training features of 1 examples are not finite"):
        few_shot(broken, labels, features, labels, shots=1, **good)


@pytest.mark.usefixtures("unchecked")
def test_labels_of_several_values_are_refused():
    features, _ = problem(8, 3)
    with pytest.raises(ValueError, match=r"labels have shape \(8, 2\).* need one class index per example"):
        linear_probe(features, np.zeros((8, 2), np.float32), features, np.zeros(8, np.int32), num_classes=2)
    with pytest.raises(ValueError, match="kind='lasso'; expected 'ridge' or 'logistic'"):
        linear_probe(*problem(8, 3), *problem(8, 3), num_classes=CLASSES, kind="lasso")


# Nearest neighbours


def direct_votes(train, labels, test, k, temperature):
    """The definition, in float64."""
    unit = [x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True) for x in (train, test)]
    similarity = unit[1] @ unit[0].T
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    near = np.take_along_axis(similarity, order, axis=1)
    weight = np.ones_like(near) if temperature is None else np.exp((near - near[:, :1]) / temperature)
    return np.stack([(weight * (labels[order] == c)).sum(axis=1) for c in range(CLASSES)], axis=1)


@pytest.mark.parametrize("temperature", [0.07, None])
@pytest.mark.parametrize("block", [1, 16, 1000])
def test_votes_equal_the_definition_for_any_block(temperature, block, assert_close):
    train, labels = problem(70, 9)
    test, _ = problem(33, 9, seed=1)
    votes = knn_votes(train, labels, test, num_classes=CLASSES, k=11, temperature=temperature, block=block)
    assert_close(votes, direct_votes(train, labels, test, 11, temperature), 1e-4)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_equal_votes_are_scikit_learns(k, digit_pixels):
    train, labels, test, _ = digit_pixels
    expected = KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(train.astype(np.float64), labels)
    votes = knn_votes(train, labels, test, num_classes=10, k=k, temperature=None, block=100)
    assert np.array_equal(votes.argmax(axis=1), expected.predict(test.astype(np.float64)))


def test_equally_near_examples_count_in_their_order():
    train = np.ones((7, 3), np.float32)
    labels = np.array([2, 2, 1, 1, 1, 0, 0], np.int32)
    test = np.full((2, 3), 0.5, np.float32)
    for block in (2, 3, 64):
        votes = knn_votes(train, labels, test, num_classes=3, k=4, block=block)
        assert votes.tolist() == [[0, 2, 2], [0, 2, 2]]
    assert knn(train, labels, test, np.array([1, 2], np.int32), num_classes=3, k=4) == 0.5  # the lower class wins


def test_all_training_examples_may_vote():
    train, labels = problem(50, 4)
    votes = knn_votes(train, labels, train[:3], num_classes=CLASSES, k=50, temperature=None, block=8)
    assert votes.tolist() == [np.bincount(labels, minlength=CLASSES).tolist()] * 3


def test_similarities_never_exist_all_at_once():
    rows, train = jnp.zeros((16, 8)), jnp.zeros((500, 16, 8))
    compiled = _nearest.lower(rows, train, jnp.int32(8000), 5).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 16 * 8000 * 4 / 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k=0; expected 1 to 20, the number of training examples"),
        ({"k": 21}, "k=21; expected 1 to 20"),
        ({"k": 3, "temperature": 0.0}, r"temperature=0\.0; expected a positive number, or None"),
        ({"k": 3, "block": 0}, "block=0; expected a positive number"),
    ],
)
def test_options_of_the_vote_that_cannot_be(options, message):
    features, labels = problem(20, 3)
    with pytest.raises(ValueError, match=message):
        knn(features, labels, features, labels, num_classes=CLASSES, **options)
