"""Recall at k against plain loops, in any blocks; several captions, shared captions, ties, messages."""

import math

import numpy as np
import pytest

from eqvision.metrics import RetrievalRecall, retrieval_recall


def oracle(queries, gallery, pairs, ks):
    """Sort everything; right answers come last among equals."""
    hits = {k: [] for k in ks}
    for query in range(len(queries)):
        right = {b for a, b in pairs if a == query}
        if not right:
            continue
        order = sorted(range(len(gallery)), key=lambda j: (-(queries[query] @ gallery[j]), j in right))
        for k in ks:
            hits[k].append(any(j in right for j in order[:k]))
    return {k: float(np.mean(each)) if each else math.nan for k, each in hits.items()}


def features(rng, count, width=5):
    """Small whole numbers: many ties, and sums that are exact in any order."""
    return rng.integers(-2, 3, (count, width)).astype(np.float32)


@pytest.mark.parametrize("block_size", [1, 40, 2**24])
@pytest.mark.parametrize(("num_images", "num_texts", "num_pairs"), [(9, 27, 27), (30, 8, 60), (6, 5, 3), (1, 1, 1)])
def test_recall_equals_plain_loops(rng, block_size, num_images, num_texts, num_pairs):
    """Any number of texts for an image and of images for a text, and rows without a partner."""
    images, texts = features(rng, num_images), features(rng, num_texts)
    pairs = np.stack([rng.integers(num_images, size=num_pairs), rng.integers(num_texts, size=num_pairs)], 1)
    ks = (1, 2, 5, 100)
    found = retrieval_recall(images, texts, pairs, ks=ks, block_size=block_size)
    there = {tuple(pair) for pair in pairs.tolist()}
    back = {(b, a) for a, b in there}
    assert found == RetrievalRecall(oracle(images, texts, there, ks), oracle(texts, images, back, ks))


def test_recall_is_not_trivial(rng):
    """The cases above would be of no use if everything or nothing were found."""
    images, texts = features(rng, 30), features(rng, 60)
    found = retrieval_recall(images, texts, np.stack([np.arange(60) % 30, np.arange(60)], 1), ks=(1, 10))
    assert all(0 < value < 1 for value in found.metrics().values())


def test_names_and_perfect_features():
    unit = np.eye(4, dtype=np.float32)
    metrics = retrieval_recall(unit, unit, np.stack([np.arange(4)] * 2, 1), ks=(1, 5)).metrics()
    names = [f"{way}/recall_at_{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5)]
    assert metrics == dict.fromkeys(names, 1.0)


def test_a_collapsed_model_finds_nothing():
    """All features alike: wrong answers come first. Of two images, one is always among the first two."""
    same = np.ones((6, 3), np.float32)
    own = np.stack([np.arange(6)] * 2, 1)
    assert retrieval_recall(same, same, own, ks=(1, 5, 6)).image_to_text == {1: 0.0, 5: 0.0, 6: 1.0}


def test_nothing_to_find_is_no_score():
    found = retrieval_recall(np.ones((2, 3)), np.ones((2, 3)), np.zeros((0, 2), int), ks=(1,))
    assert all(math.isnan(value) for value in found.metrics().values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": np.ones((4, 2))}, "image features are 3 wide and text features 2"),
        ({"images": np.array([[1.0, 0, 0], [0, np.nan, 0]])}, "1 image features are not finite, the first in row 1"),
        ({"pairs": np.array([[0, 0, 1]])}, r"pairs have shape \(1, 3\) and type int64; expected whole numbers \[p 2\]"),
        ({"pairs": np.array([[0, 4]])}, "pairs name text 4 to 4, and there are 4"),
        ({"pairs": np.array([[-1, 0]])}, "pairs name image -1 to -1, and there are 2"),
        ({"ks": (0,)}, r"ks=\(0,\), block_size=16777216; expected numbers from 1 up"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = {"images": np.ones((2, 3)), "texts": np.ones((4, 3)), "pairs": np.array([[0, 0]]), "ks": (1,)} | change
    with pytest.raises(ValueError, match=message):
        retrieval_recall(given["images"], given["texts"], given["pairs"], ks=given["ks"])
