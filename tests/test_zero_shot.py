"""Classes told by name, retrieval from an evaluator's vectors, and pictures of what was said of images."""

import numpy as np
import pytest
from pairs_files import ToyPairs
from PIL import Image

from eqvision.data.pairs import CaptionedDigits, text_gallery
from eqvision.evaluators import class_vectors, retrieval, zero_shot
from eqvision.evaluators.embeddings import ImageVectors
from eqvision.metrics import retrieval_recall
from eqvision.pairs_pictures import SaidOfImage, draw_said, plot_similarities

TABLE = {"a cat": [3.0, 0.0], "one cat": [0.0, 1.0], "a dog": [0.0, -2.0], "one dog": [0.0, -2.0]}


def embed(texts):
    """As a model gives them: of length one."""
    rows = np.array([TABLE[text] for text in texts])
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_a_class_is_the_mean_of_its_sentences():
    """Of vectors of length one, and of length one again."""
    vectors = class_vectors(embed, ("cat", "dog"), ("a {}", "one {}"))
    np.testing.assert_allclose(vectors, [[0.5**0.5, 0.5**0.5], [0, -1]], atol=1e-12)


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        (("cat", "dog"), ("a {}", "one"), r"the template 'one' has no {} where the class's name stands"),
        (("cat", "dog"), (), r"there are no templates; give at least one sentence"),
        (("cat", "dog", "cat"), ("a {}",), r"class names must differ, and 'cat' comes twice"),
        ((), ("a {}",), r"there are no class names"),
    ],
)
def test_prompts_that_say_nothing_are_refused(names, templates, message):
    with pytest.raises(ValueError, match=message):
        class_vectors(embed, names, templates)


def test_zero_shot_accuracy(rng):
    images, classes, labels = rng.normal(size=(50, 4)), rng.normal(size=(7, 4)), rng.integers(7, size=50)
    found, order = zero_shot(images, labels, classes), np.argsort(-(images @ classes.T), axis=1)
    assert found["zero_shot_accuracy"] == np.mean(order[:, 0] == labels)
    assert found["zero_shot_top5_accuracy"] == (order[:, :5] == labels[:, None]).any(axis=1).mean()
    assert list(zero_shot(images, labels % 5, classes[:5])) == ["zero_shot_accuracy"]


def test_zero_shot_refuses_what_does_not_fit(rng):
    images, classes, labels = np.ones((3, 4)), np.ones((2, 4)), np.array([0, 1, 1])
    with pytest.raises(ValueError, match=r"image labels are 0\.\.2; expected 0\.\.1"):
        zero_shot(images, labels + [0, 0, 1], classes)
    with pytest.raises(ValueError, match="image features are 4 wide and class features 3"):
        zero_shot(images, labels, np.ones((2, 3)))
    with pytest.raises(ValueError, match="not finite, the first in row 1"):
        zero_shot(images * [[1], [np.nan], [1]], labels, classes)


def test_retrieval_of_images_in_any_order_without_those_that_are_missing(rng):
    source = ToyPairs(6, captions=2)
    gallery = text_gallery(source)
    values, texts = rng.normal(size=(6, 3)), rng.normal(size=(12, 3))
    order = np.array([4, 0, 5, 2])  # 1 and 3 could not be decoded
    found = retrieval(ImageVectors(values[order], order), texts, gallery)
    pairs = np.array([(row, 2 * index + k) for row, index in enumerate(order) for k in (0, 1)])
    assert found == retrieval_recall(values[order], texts, pairs, ks=(1, 5)).metrics()


def test_shared_captions_are_right_for_every_image_that_has_them():
    """Digits: a model that tells all digits apart finds everything, though many images share each sentence."""
    source = CaptionedDigits("test", length=40)
    gallery = text_gallery(source)
    words = {text: row for digit in range(10) for row, text in ((digit, s) for s in _said(source, digit))}
    texts = np.eye(10)[[words[text] for text in gallery.texts]]
    found = retrieval(ImageVectors(np.eye(10)[source.labels], np.arange(40)), texts, gallery)
    assert set(found.values()) == {1.0}


def _said(source, digit):
    return [text for index in np.flatnonzero(source.labels == digit) for text in source.captions(int(index))]


# Pictures


def said(rng, *found):
    image = rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)
    return SaidOfImage(image, found, tuple(0.9 / (k + 1) for k in range(len(found))), ("a cat on a mat",))


def test_what_was_said_is_drawn_in_green_and_red(rng, tmp_path):
    path = draw_said([said(rng, "a cat on a mat", "a dog"), said(rng, "a very long sentence " * 4)], tmp_path / "x.png")
    pixels = np.asarray(Image.open(path)).reshape(-1, 3).astype(int)
    assert ((pixels[:, 1] > 90) & (pixels[:, 0] < 30) & (pixels[:, 2] < 30)).any()
    assert ((pixels[:, 0] > 170) & (pixels[:, 1] < 30) & (pixels[:, 2] < 30)).any()
    with pytest.raises(ValueError, match="there are no images to draw"):
        draw_said([], tmp_path / "y.png")


@pytest.mark.slow
def test_the_matrix_of_images_and_captions(rng, tmp_path):
    images = [rng.integers(0, 255, (size, 8, 1), dtype=np.uint8) for size in (8, 12, 8)]
    path = plot_similarities(images, ["a", "b " * 40], rng.normal(size=(3, 2)), tmp_path / "m.png")
    assert Image.open(path).size[0] > 300
    with pytest.raises(ValueError, match=r"similarities have shape \(2, 3\) for 3 images and 2 captions"):
        plot_similarities(images, ["a", "b"], rng.normal(size=(2, 3)), path)
