"""Semantic segmenters: backbone, optional neck, head, and the logits enlarged to the images."""

from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.classifiers import Backbone, Neck
from eqvision.layers import fold
from eqvision.ops import resize_bilinear
from eqvision.types import Features, Images, PaddedImages, TokenFeatures


@runtime_checkable
class SegmentationHead(Protocol):
    """From features to logits of each place of a map; ``reset`` gives a fresh one for other classes."""

    def __call__(
        self,
        features: Any,  # what is before it gives: Features or TokenFeatures
        state: eqx.nn.State,
        *,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "b h w k"], eqx.nn.State]: ...

    def reset(self, num_classes: int, *, key: PRNGKeyArray) -> "SegmentationHead": ...


class Segmenter(eqx.Module):
    """Composition without logic: backbone -> neck (if any) -> head -> logits at the size of the images.

    Logits are enlarged bilinearly, the outer edges of the map on those of the image (torch's ``align_corners=False``).
    ``auxiliary`` are further heads that read what ``head`` reads, for the loss in training only. Images whose sides are
    no multiples of ``multiple`` are filled with zeros at the bottom and at the right, and the logits there cut off.
    """

    backbone: Backbone
    neck: Neck | None
    head: SegmentationHead
    auxiliary: tuple[SegmentationHead, ...] = ()
    multiple: int = eqx.field(static=True, default=1)

    def __call__(
        self,
        inputs: PaddedImages | Images,
        state: eqx.nn.State,
        *,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "b h w k"], eqx.nn.State]:
        """Logits of each pixel. Padding is not masked on the way: the loss and the metrics leave it out."""
        images = bare_images(inputs)
        features, state = self._features(images, state, train=train, key=key)
        return self._logits(self.head, features, images.shape[1:3], state, train=train, key=fold(key, 2))

    def with_auxiliary(
        self,
        inputs: PaddedImages | Images,
        state: eqx.nn.State,
        *,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> tuple[tuple[Float[Array, "b h w k"], ...], eqx.nn.State]:
        """The logits, and behind them those of each auxiliary head, all at the size of the images."""
        images = bare_images(inputs)
        features, state = self._features(images, state, train=train, key=key)
        outputs = []
        for number, head in enumerate((self.head, *self.auxiliary)):
            each = fold(key, 2 + number)
            logits, state = self._logits(head, features, images.shape[1:3], state, train=train, key=each)
            outputs.append(logits)
        return tuple(outputs), state

    def intermediates(
        self, inputs: PaddedImages | Images, state: eqx.nn.State, layers: tuple[int, ...]
    ) -> tuple[Float[Array, "..."] | TokenFeatures, ...]:
        """Features of the backbone's ``layers``."""
        return self.backbone.intermediates(filled_up(bare_images(inputs), self.multiple), state, layers)

    def _features(
        self, images: Images, state: eqx.nn.State, *, train: bool, key: PRNGKeyArray | None
    ) -> tuple[Features | TokenFeatures, eqx.nn.State]:
        """What the heads read."""
        filled = filled_up(images, self.multiple)
        features, state = self.backbone(filled, state, train=train, key=fold(key, 0))
        if self.neck is not None:
            features, state = self.neck(features, state, train=train, key=fold(key, 1))
        return features, state

    def _logits(
        self,
        head: SegmentationHead,
        features: Features | TokenFeatures,
        size: tuple[int, ...],
        state: eqx.nn.State,
        *,
        train: bool,
        key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "b h w k"], eqx.nn.State]:
        logits, state = head(features, state, train=train, key=key)
        filled = tuple(-(-side // self.multiple) * self.multiple for side in size)
        return resized_logits(logits, filled)[:, : size[0], : size[1]], state


def bare_images(inputs: PaddedImages | Images) -> Images:
    """The array of images, padded or not."""
    return inputs.images if isinstance(inputs, PaddedImages) else inputs


def filled_up(images: Images, multiple: int) -> Float[Array, "b h2 w2 c"]:
    """Images with zeros at the bottom and at the right, to sides that ``multiple`` divides."""
    more = [-side % multiple for side in images.shape[1:3]]
    return jnp.pad(images, ((0, 0), (0, more[0]), (0, more[1]), (0, 0))) if any(more) else images


def resized_logits(logits: Float[Array, "b h w k"], size: tuple[int, ...]) -> Float[Array, "b h2 w2 k"]:
    """Logits at another size in float32, bilinear without aligned corners, as torch resizes them."""
    logits = logits.astype(jnp.float32)
    return logits if logits.shape[1:3] == tuple(size) else resize_bilinear(logits, (size[0], size[1]))
