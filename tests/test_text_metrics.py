"""Figures of text: agreement with labels (GLUE), perplexity, word error rate, captions."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from eqvision.metrics import (
    GLUE_TASKS,
    CaptionMetric,
    GlueMetric,
    Perplexity,
    bleu,
    caption_words,
    cider,
    compute,
    edit_distance,
    f1_score,
    glue_task,
    matthews_correlation,
    merge,
    pearson_correlation,
    rouge_l,
    spearman_correlation,
    word_errors,
)
from eqvision.metrics.glue import METRICS
from eqvision.names import UnknownNameError

# --- agreement ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3])
def test_agreement_equals_scikit_learn(classes, rng):
    sklearn = pytest.importorskip("sklearn.metrics")
    for size in (7, 200):
        predicted, labels = rng.integers(0, classes, (2, size))
        expected = sklearn.matthews_corrcoef(labels, predicted)
        assert matthews_correlation(predicted, labels) == pytest.approx(expected, abs=1e-12)
        expected = sklearn.f1_score(labels == 1, predicted == 1, zero_division=0.0)
        assert f1_score(predicted, labels) == pytest.approx(expected, abs=1e-12)


def test_correlations_equal_scipy_with_ties_and_without(rng):
    stats = pytest.importorskip("scipy.stats")
    for labels in (rng.normal(size=50), rng.integers(0, 6, 50) / 1.0):
        predicted = labels + rng.normal(size=50)
        predicted[:10] = predicted[10:20]
        for ours, theirs in ((pearson_correlation, stats.pearsonr), (spearman_correlation, stats.spearmanr)):
            assert ours(predicted, labels) == pytest.approx(theirs(predicted, labels).statistic, abs=1e-12)


def test_what_is_undefined_is_nan_and_one_class_alone_has_no_correlation():
    same, other = np.ones(4), np.arange(4.0)
    assert math.isnan(pearson_correlation(same, other))
    assert math.isnan(spearman_correlation(other, same))
    assert math.isnan(spearman_correlation(other, np.array([0.0, math.nan, 1.0, 2.0])))
    assert math.isnan(pearson_correlation(other[:1], other[:1]))
    none = np.zeros(0, int)
    assert all(math.isnan(METRICS[name](none, none)) for name in METRICS)
    assert matthews_correlation(np.array([1, 1, 1]), np.array([0, 1, 1])) == 0
    assert f1_score(np.array([0, 0]), np.array([0, 0])) == 0
    with pytest.raises(ValueError, match="2 predictions and 3 labels"):
        f1_score(np.zeros(2, int), np.zeros(3, int))


# --- GLUE -----------------------------------------------------------------------------------------------------------


def test_every_task_reports_figures_that_exist():
    assert len(GLUE_TASKS) == 11
    assert {name for task in GLUE_TASKS.values() for name in task.metrics} == set(METRICS)
    assert glue_task("stsb").num_outputs == 1
    assert glue_task("mnli_matched").num_outputs == 3
    with pytest.raises(UnknownNameError, match="mrpc"):
        glue_task("mrcp")


def test_a_task_is_measured_over_batches_without_their_padding():
    first, second = GlueMetric("mrpc"), GlueMetric("mrpc")
    outputs = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.4], [math.nan, 0.0]], np.float32)
    first.update(outputs, np.array([1, 1, 0, 7]), np.array([1.0, 1.0, 1.0, 0.0]))
    second.update(outputs[:1], np.array([1]), np.ones(1))
    # predicted 1 0 1 1 of 1 1 0 1: two hits of class 1, six mentions
    assert first.merge(second).compute() == {"accuracy": 0.5, "f1": pytest.approx(4 / 6)}
    similarity = GlueMetric("stsb")
    similarity.update(np.array([[0.5], [2.0], [4.5]], np.float32), np.array([0.0, 2.5, 4.0]), np.ones(3))
    figures = similarity.compute()
    assert figures["spearman"] == pytest.approx(1.0)
    assert 0.95 < figures["pearson"] < 1
    assert math.isnan(GlueMetric("cola").compute()["matthews"])


def test_outputs_and_labels_of_another_task_are_refused():
    metric = GlueMetric("mnli_matched")
    with pytest.raises(ValueError, match=r"needs 3 outputs, and the model gives 2; build it with num_classes=3"):
        metric.update(np.zeros((1, 2), np.float32), np.zeros(1, int), np.ones(1))
    with pytest.raises(ValueError, match=r"label -1 is no class .* 0\.\.2 .*test splits have no labels"):
        metric.update(np.zeros((1, 3), np.float32), np.array([-1]), np.ones(1))
    with pytest.raises(ValueError, match="example 1 of this batch are NaN"):
        metric.update(np.array([[0.0, 0, 0], [math.nan, 0, 0]], np.float32), np.zeros(2, int), np.ones(2))
    with pytest.raises(ValueError, match="mnli_matched and of cola cannot be merged"):
        metric.merge(GlueMetric("cola"))


# --- perplexity and word error rate ---------------------------------------------------------------------------------


def test_perplexity_of_knowing_nothing_is_the_size_of_the_vocabulary():
    weights = jnp.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    values = jnp.where(weights > 0, jnp.log(50.0), jnp.nan)
    assert compute({"ppl": Perplexity.of(values, weights)})["ppl"] == pytest.approx(50, rel=1e-5)
    # the mean of all tokens, not of the batches' perplexities: three of log 50 and one of log 2
    both = merge(Perplexity.of(values, weights), Perplexity.of(jnp.log(jnp.full((1, 1), 2.0)), jnp.ones((1, 1))))
    assert both.compute() == pytest.approx(math.exp((3 * math.log(50) + math.log(2)) / 4), rel=1e-5)
    assert math.isnan(Perplexity.of(values, 0 * weights).compute())
    assert Perplexity.of(jnp.full((1, 1), 1e4), jnp.ones((1, 1))).compute() == math.inf


def test_edit_distance():
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == edit_distance("abc", "") == 3
    assert edit_distance("abc", "abc") == 0
    assert edit_distance(["the", "cat"], ["cat", "the"]) == 2


def test_word_errors_are_added_up_over_texts():
    found = word_errors(["the cat sat", "hello"], ["the cat sat on it", "hello world"])
    assert found == (3, 7)
    assert found.merge(word_errors(["a b c"], ["a"])).compute() == 5 / 8  # two insertions of one word
    assert word_errors(["", ""], ["a b", "c"]).compute() == 1
    assert math.isnan(word_errors([""], [""]).compute())
    assert word_errors(["abd"], ["abc"], characters=True) == (1, 3)
    with pytest.raises(ValueError, match="1 texts and 2 references"):
        word_errors(["a"], ["a", "b"])


# --- captions -------------------------------------------------------------------------------------------------------


def test_captions_are_split_as_by_the_penn_treebank():
    assert caption_words("A man's dog, isn't it?!") == ["a", "man", "'s", "dog", "is", "n't", "it"]
    assert caption_words("They can\u2019t: 3,000 black-and-white cats...") == [
        "they", "ca", "n't", "3,000", "black-and-white", "cats",
    ]  # fmt: skip
    assert caption_words("  -- \n") == []


def test_bleu_of_hand():
    # Papineni et al. 2002, example 2: of seven words two count
    the = bleu(["the the the the the the the"], [["The cat is on the mat.", "There is a cat on the mat."]])
    assert the == (pytest.approx(2 / 7), 0.0, 0.0, 0.0)
    # five words against 4 + 2 of the references that are nearest; all n-grams are found, and there is none of four
    short = bleu(["a dog runs", "the cat"], [["a dog runs fast"], ["the cat sat", "a cat"]])
    assert short == (*[pytest.approx(math.exp(-1 / 5))] * 3, 0.0)
    # no penalty for what is longer: 3 of 5 words, 2 of 4 pairs, 1 of 3 triples
    long = bleu(["a b c x y"], [["a b c"]])
    assert long[:3] == (pytest.approx(3 / 5), pytest.approx((3 / 10) ** (1 / 2)), pytest.approx((1 / 10) ** (1 / 3)))


def test_rouge_l_of_hand():
    # Lin 2004, section 3.1: police ... the gunman, against the gunman
    reference = ["police killed the gunman"]
    assert rouge_l(["police kill the gunman", "the gunman kill police"], [reference] * 2) == [
        pytest.approx(3 / 4),
        pytest.approx(2 / 4),
    ]
    assert rouge_l(["a b"], [["a b c d"]]) == [pytest.approx(2.44 * 0.5 / (0.5 + 1.44))]
    assert rouge_l(["a b", "x"], [["x", "b a b"], ["y"]]) == [pytest.approx(2.44 * (2 / 3) / (2 / 3 + 1.44)), 0.0]


def test_cider_of_hand():
    # every word in one image of two: all weigh log 2; one word of two is right, no pair
    alike = cider(["a cat", "x y"], [["a dog"], ["x z"]])
    assert alike == [pytest.approx(10 / 4 * 0.5)] * 2
    # three times the same word: it counts once, and the length is one too long
    repeated, references = ["a a a", "q"], [["a b"], ["r"]]
    assert cider(repeated, references, penalised=False)[0] == pytest.approx(10 / 4 / math.sqrt(2))
    assert cider(repeated, references)[0] == pytest.approx(10 / 4 / (3 * math.sqrt(2)) * math.exp(-1 / 72))
    # what all images are described by tells nothing
    assert cider(["a a b", "a a c"], [["a a"], ["a a"]]) == [0.0, 0.0]


def test_captions_that_are_right_word_for_word_get_the_highest_figures():
    references = [["a red bus in the street"], ["two dogs play on green grass"], ["one man rides his brown horse"]]
    metric, rest = CaptionMetric(), CaptionMetric()
    metric.update([each[0].upper() + "." for each in references[:2]], references[:2])
    rest.update(references[2], references[2:])
    figures = metric.merge(rest).compute()
    assert figures.pop("cider") == pytest.approx(10)
    assert figures == {name: pytest.approx(1) for name in ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l")}


def test_captions_in_another_order_and_more_references(rng):
    words = np.array(["a", "dog", "cat", "runs", "on", "the", "grass", "big"])
    captions = [" ".join(rng.choice(words, 6)) for _ in range(5)]
    references = [[" ".join(rng.choice(words, size)) for size in (5, 7)] for _ in range(5)]
    order = rng.permutation(5)
    before, after = CaptionMetric(), CaptionMetric()
    before.update(captions, references)
    after.update([captions[i] for i in order], [references[i][::-1] for i in order])
    assert after.compute() == {name: pytest.approx(value) for name, value in before.compute().items()}
    assert 0 < before.compute()["cider"] < 10
    # the caption itself as one more reference cannot hurt
    more = rouge_l(captions, [[*each, caption] for caption, each in zip(captions, references, strict=True)])
    assert more == [pytest.approx(1)] * 5


def test_empty_captions_are_wrong_and_missing_references_are_refused():
    metric = CaptionMetric()
    metric.update(["", "a cat"], [["a dog"], ["the cat"]])
    assert metric.compute()["cider"] >= 0
    assert rouge_l([""], [["a dog"]]) == [0.0]
    assert bleu([""], [["a dog"]]) == (0.0,) * 4
    assert all(math.isnan(value) for value in CaptionMetric().compute().values())
    with pytest.raises(ValueError, match=r"image 1 has the references none; expected a list"):
        metric.update(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match=r"image 0 has the references 'a dog'; expected a list"):
        metric.update(["a dog"], ["a dog"])
    with pytest.raises(ValueError, match="2 captions and references of 1 images"):
        metric.update(["a", "b"], [["a"]])
