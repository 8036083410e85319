"""A classifier made of the names of its classes, and the sentences that they are put into."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvision.backbones import TextSize, ViTSize
from eqvision.multimodal import (
    TEMPLATES,
    ClipViTSize,
    check_templates,
    clip_logits,
    clip_vit,
    read_templates,
    zero_shot_classifier,
)
from eqvision.types import TextTokens

LENGTH = 8
SIZE = ClipViTSize(ViTSize(16, 1, 2, 32), 4, 8, TextSize(8, 1, 2, 16), 12)
NAMES = ("cat", "dog", "owl")


def encode(texts):
    """A letter a token, an end token behind."""
    ids, mask = np.zeros((len(texts), LENGTH), np.int32), np.zeros((len(texts), LENGTH), bool)
    for row, text in enumerate(texts):
        numbers = [ord(letter) - 31 for letter in text][: LENGTH - 1] + [99]
        ids[row, : len(numbers)], mask[row, : len(numbers)] = numbers, True
    return TextTokens(ids, mask)


@pytest.mark.slow
def test_vectors_of_sentences_are_averaged(assert_close, rng):
    """Batches that do not divide the number of sentences; one sentence gives the model's own logits."""
    model = clip_vit(SIZE, vocab_size=100, length=LENGTH, key=jax.random.key(0))
    state = eqx.nn.State(model)
    images = jnp.asarray(rng.normal(size=(2, 8, 8, 3)), jnp.float32)
    single = zero_shot_classifier(model, encode, NAMES, ("{}",))
    text = jax.tree.map(jnp.asarray, encode(NAMES))
    outputs, found = jax.jit(lambda *models: (models[0](images, text, state)[0], models[1](images, state)[0]))(
        model, single
    )
    assert_close(found, clip_logits(outputs), 1e-5)
    both = zero_shot_classifier(model, encode, NAMES, ("{}", "a {}"), batch_size=4)
    other = zero_shot_classifier(model, encode, NAMES, ("a {}",))
    mean = np.asarray(single.classes) + np.asarray(other.classes)
    assert_close(both.classes, mean / np.linalg.norm(mean, axis=1, keepdims=True), 1e-5)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(both))
    with pytest.raises(ValueError, match="class names must differ, and 'cat' comes twice"):
        zero_shot_classifier(model, encode, ("cat", "cat"))


def test_templates_are_read_from_a_file(tmp_path):
    file = tmp_path / "templates.txt"
    file.write_text("# of our own\na {} here\n\n  some {}  \n")
    assert read_templates(file) == ("a {} here", "some {}")
    file.write_text("a {}\nno place\n")
    with pytest.raises(ValueError, match=r"templates.txt, line 2: 'no place' has no {} where the class's name stands"):
        read_templates(file)
    file.write_text("\n# nothing\n")
    with pytest.raises(ValueError, match=r"templates.txt holds no template; write one sentence a line, such as"):
        read_templates(file)
    with pytest.raises(FileNotFoundError):
        read_templates(tmp_path / "absent.txt")


def test_our_own_templates():
    for templates in TEMPLATES.values():
        check_templates(templates)
        assert len(set(templates)) == len(templates)
