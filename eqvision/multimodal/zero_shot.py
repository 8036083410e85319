"""Classifiers made of nothing but the names of the classes (Radford et al. 2021, section 3.1)."""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.multimodal.clip import Clip, ImageHead, ImageTower
from eqvision.multimodal.templates import PHOTOS, check_templates
from eqvision.ops import unit_length
from eqvision.types import Images, TextTokens

Embed = Callable[[tuple[str, ...]], Float[np.ndarray, "m d"]]
Encode = Callable[[Sequence[str]], TextTokens]


def class_vectors(embed: Embed, names: Sequence[str], templates: Sequence[str]) -> Float[np.ndarray, "k d"]:
    """A vector of length one for each name: the mean of those that ``embed`` gives its sentences.

    ``templates`` are sentences with ``{}`` where the name stands. Raises ValueError for one without, for no templates,
    and for names that come twice.
    """
    check_prompts(names, templates)
    sentences = tuple(template.replace("{}", name) for name in names for template in templates)
    means = embed(sentences).reshape(len(names), len(templates), -1).mean(axis=1)
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def check_prompts(names: Sequence[str], templates: Sequence[str]) -> None:
    """Raise ValueError as ``class_vectors`` does."""
    if not names:
        raise ValueError("there are no class names")
    if len(set(names)) != len(names):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise ValueError(f"class names must differ, and {twice!r} comes twice")
    check_templates(templates)


class ZeroShotClassifier(eqx.Module):
    """The image half of a CLIP or SigLIP, and a vector for each class: images to logits of the classes.

    The logits are those of ``clip_logits``: through a softmax for CLIP, through a sigmoid each for SigLIP.
    """

    image_tower: ImageTower
    image_head: ImageHead
    classes: Float[Array, "k d"]
    scale: Float[Array, ""]
    bias: Float[Array, ""] | None

    def __call__(
        self, images: Images, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "b k"], eqx.nn.State]:
        features, state = self.image_tower(images, state, train=train, key=key)
        logits = self.scale * unit_length(self.image_head(features)) @ self.classes.T
        return logits if self.bias is None else logits + self.bias, state


def zero_shot_classifier(
    model: Clip, encode: Encode, names: Sequence[str], templates: Sequence[str] = PHOTOS, *, batch_size: int = 256
) -> ZeroShotClassifier:
    """A classifier of the classes called ``names``; its state is that of ``model``.

    ``encode`` is a tokenizer with the model's length: ``lambda texts: tokenizer.encode_batch(texts, 77)``. Sentences
    are encoded ``batch_size`` at a time by one compiled program. Raises ValueError as ``class_vectors``.
    """

    def embed(sentences: tuple[str, ...]) -> Float[np.ndarray, "m d"]:
        size = min(batch_size, len(sentences))
        filled = (*sentences, *sentences[:1] * (-len(sentences) % size))
        parts = [filled[i : i + size] for i in range(0, len(filled), size)]
        rows = [_encode_text(model, jax.tree.map(jnp.asarray, encode(part))) for part in parts]
        return np.concatenate(rows)[: len(sentences)]

    classes = jnp.asarray(class_vectors(embed, names, templates))
    return ZeroShotClassifier(model.image_tower, model.image_head, classes, model.scale(), model.logit_bias)


@jax.jit
def _encode_text(model: Clip, text: TextTokens) -> Float[Array, "b d"]:
    return model.encode_text(text)
