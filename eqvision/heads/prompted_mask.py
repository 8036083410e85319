"""Segment Anything's mask decoder (Kirillov et al. 2023, appendix A): prompts and features become masks."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from eqvision.layers import ConvTranspose, LayerNorm, Linear, TwoWayTransformer, activate, normal, torch_linear
from eqvision.types import MaskPredictions

BLOCK_EPS = 1e-5  # of the official code; transformers has 1e-6


class ReluMLP(eqx.Module):
    """Linear layers from one of ``widths`` to the next, with ReLU between them."""

    layers: tuple[Linear, ...]

    def __init__(self, *widths: int, key: PRNGKeyArray):
        keys = jax.random.split(key, len(widths) - 1)
        self.layers = tuple(
            torch_linear(i, o, key=k) for (i, o), k in zip(itertools.pairwise(widths), keys, strict=True)
        )

    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        for i, layer in enumerate(self.layers):
            x = layer(jax.nn.relu(x) if i else x)
        return x


class PromptedMaskHead(eqx.Module):
    """Tokens for ``num_masks`` + 1 masks and for their quality go with the prompts through a two-way transformer.

    Each mask's token becomes, by an MLP of its own, a vector whose product with the features, four times enlarged, is
    the mask. Mask 0 is meant for prompts that leave no doubt, the others for a whole, a part and a part of that.
    """

    quality_token: Float[Array, " d"]
    mask_tokens: Float[Array, "m d"]
    transformer: TwoWayTransformer
    up1: ConvTranspose
    up_norm: LayerNorm
    up2: ConvTranspose
    vectors: ReluMLP
    """Of all masks, stacked."""
    quality: ReluMLP

    def __init__(
        self,
        width: int,
        *,
        num_masks: int = 3,
        depth: int = 2,
        num_heads: int = 8,
        mlp_dim: int = 2048,
        inner_width: int | None = None,
        quality_width: int = 256,
        quality_depth: int = 3,
        eps: float = BLOCK_EPS,
        key: PRNGKeyArray,
    ):
        if width % 8:
            raise ValueError(f"PromptedMaskHead: width {width} must be divisible by 8, for masks have an eighth of it")
        keys, count, inner = jax.random.split(key, 7), num_masks + 1, width // 2 if inner_width is None else inner_width
        self.quality_token = normal(keys[0], (width,))
        self.mask_tokens = normal(keys[1], (count, width))
        self.transformer = TwoWayTransformer(depth, width, num_heads, mlp_dim, inner_width=inner, eps=eps, key=keys[2])
        self.up1 = ConvTranspose(width, width // 4, 2, stride=2, key=keys[3])
        self.up_norm = LayerNorm(width // 4)
        self.up2 = ConvTranspose(width // 4, width // 8, 2, stride=2, key=keys[4])
        self.vectors = _stacked_mlps((width, width, width, width // 8), count, key=keys[5])
        widths = (width, *(quality_width for _ in range(quality_depth - 1)), count)
        self.quality = ReluMLP(*widths, key=keys[6])

    def __call__(
        self,
        features: Float[Array, "b p h w d"],
        position: Float[Array, "h w d"],
        tokens: Float[Array, "b p n d"],
        token_mask: Bool[Array, "b p n"],
    ) -> MaskPredictions:
        """All masks, the one for clear prompts first; ``token_mask`` is True on prompts that are there.

        ``features`` are those of the image with what the prompt's mask adds to them.
        """
        (b, p, h, w, d), count = features.shape, len(self.mask_tokens)
        tokens, present = self._with_own(tokens.astype(features.dtype), token_mask)
        tokens, image = self.transformer(
            tokens,
            features.reshape(b * p, h * w, d),
            position.reshape(h * w, d).astype(features.dtype),
            token_mask=present,
        )
        vectors = eqx.filter_vmap(lambda mlp, x: mlp(x), in_axes=(0, 1), out_axes=1)(
            self.vectors, tokens[:, 1 : 1 + count]
        )
        logits = jnp.einsum(
            "nmc,nhwc->nmhw", vectors, self._enlarged(image.reshape(b * p, h, w, d)), preferred_element_type=jnp.float32
        )
        quality = self.quality(tokens[:, 0].astype(jnp.float32))
        return MaskPredictions(logits.reshape(b, p, *logits.shape[1:]), quality.reshape(b, p, count))

    def _with_own(
        self, tokens: Float[Array, "b p n d"], mask: Bool[Array, "b p n"]
    ) -> tuple[Float[Array, "bp m d"], Bool[Array, "bp m"]]:
        """The tokens of quality and masks in front of those of the prompts."""
        b, p, n, d = tokens.shape
        own = jnp.concatenate([self.quality_token[None], self.mask_tokens]).astype(tokens.dtype)
        every = jnp.concatenate([jnp.broadcast_to(own, (b * p, *own.shape)), tokens.reshape(b * p, n, d)], axis=1)
        return every, jnp.concatenate([jnp.ones((b * p, len(own)), bool), mask.reshape(b * p, n)], axis=1)

    def _enlarged(self, image: Float[Array, "n h w d"]) -> Float[Array, "n h4 w4 c"]:
        x = activate(self.up_norm(self.up1(image)), "gelu")
        return activate(self.up2(x), "gelu")


def _stacked_mlps(widths: tuple[int, ...], count: int, *, key: PRNGKeyArray) -> ReluMLP:
    return eqx.filter_vmap(lambda key: ReluMLP(*widths, key=key))(jax.random.split(key, count))
