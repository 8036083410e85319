"""CLIP (Radford et al. 2021): an image tower and a text tower that meet in one space."""

import math
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.backbones import ClipText
from eqvision.layers import fold
from eqvision.ops import unit_length
from eqvision.types import ClipOutputs, Features, Images, TextTokens, TokenFeatures

MAX_SCALE = 100.0  # Radford et al. 2021, section 2.5


@runtime_checkable
class ImageTower(Protocol):
    """A backbone: images to features."""

    in_channels: int

    def __call__(
        self, images: Images, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[Features | TokenFeatures, eqx.nn.State]: ...


@runtime_checkable
class ImageHead(Protocol):
    """Features of its image tower to a vector for each image."""

    def __call__(self, features: Any, /) -> Float[Array, "b e"]: ...  # what its tower gives


@runtime_checkable
class TextHead(Protocol):
    """Features of the text tower to a vector for each text."""

    def __call__(self, features: Float[Array, "b n d"], text: TextTokens, /) -> Float[Array, "b e"]: ...


class Clip(eqx.Module):
    """Two towers, each with a head that gives a vector of the common space; SigLIP has the same composition.

    ``logit_scale`` is the logarithm of what cosines are multiplied with. Its exponential is held at ``max_scale``, as
    the paper does; the gradient goes through as if it were not, so that the scale can come back. None: no limit.
    """

    image_tower: ImageTower
    image_head: ImageHead
    text_tower: ClipText
    text_head: TextHead
    logit_scale: Float[Array, ""]
    logit_bias: Float[Array, ""] | None
    max_scale: float | None = eqx.field(static=True)

    def __init__(
        self,
        image_tower: ImageTower,
        image_head: ImageHead,
        text_tower: ClipText,
        text_head: TextHead,
        *,
        scale: float = 1 / 0.07,
        bias: float | None = None,
        max_scale: float | None = MAX_SCALE,
    ):
        self.image_tower = image_tower
        self.image_head = image_head
        self.text_tower = text_tower
        self.text_head = text_head
        self.logit_scale = jnp.asarray(math.log(scale), jnp.float32)
        self.logit_bias = None if bias is None else jnp.asarray(bias, jnp.float32)
        self.max_scale = max_scale

    def __call__(
        self,
        images: Images,
        text: TextTokens,
        state: eqx.nn.State,
        *,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> tuple[ClipOutputs, eqx.nn.State]:
        """The text tower computes in the type of the images; the vectors are float32."""
        image, state = self.encode_images(images, state, train=train, key=fold(key, 0))
        text_vectors = self.encode_text(text, dtype=images.dtype, train=train, key=fold(key, 1))
        return ClipOutputs(image, text_vectors, self.scale(), self.logit_bias), state

    def encode_images(
        self, images: Images, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "b e"], eqx.nn.State]:
        """Vectors of length one."""
        features, state = self.image_tower(images, state, train=train, key=key)
        return unit_length(self.image_head(features)), state

    def encode_text(
        self, text: TextTokens, *, dtype: DTypeLike | None = None, train: bool = False, key: PRNGKeyArray | None = None
    ) -> Float[Array, "b e"]:
        """Vectors of length one."""
        return unit_length(self.text_head(self.text_tower(text, dtype=dtype, train=train, key=key), text))

    def scale(self) -> Float[Array, ""]:
        """What cosines are multiplied with."""
        logarithm = self.logit_scale
        if self.max_scale is not None:
            limited = jnp.minimum(logarithm, math.log(self.max_scale))
            logarithm = logarithm + lax.stop_gradient(limited - logarithm)
        return jnp.exp(logarithm)


def clip_logits(outputs: ClipOutputs) -> Float[Array, "b t"]:
    """How well each image fits each text: to be read through a softmax (CLIP) or a sigmoid (SigLIP)."""
    logits = outputs.scale * outputs.image @ outputs.text.T
    return logits if outputs.bias is None else logits + outputs.bias
