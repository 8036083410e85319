"""The two-way transformer of Segment Anything (Kirillov et al. 2023, appendix A): few tokens and an image read each
other.

Positions go into every query and key, and never into values. The tokens' positions are the tokens themselves as they
were at the beginning.
"""

import equinox as eqx
import jax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from eqvision.layers.attention import Implementation, KeyMask, attention
from eqvision.layers.linear import Linear
from eqvision.layers.mlp import MLP
from eqvision.layers.norm import LayerNorm
from eqvision.layers.torch_init import torch_linear

EPS = 1e-5  # of the official code; transformers has 1e-6 in the blocks, and this behind them

Tokens = Float[Array, "b n d"]
TokenMask = Bool[Array, "b n"]
Places = Float[Array, "b k d"]


class NarrowAttention(eqx.Module):
    """Multi-head attention in ``inner_width`` channels, from and to vectors of ``width``.

    Raises ValueError where the heads do not divide ``inner_width``.
    """

    query: Linear
    key: Linear
    value: Linear
    out: Linear
    num_heads: int = eqx.field(static=True)
    implementation: Implementation = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        inner_width: int,
        num_heads: int,
        *,
        implementation: Implementation = "xla",
        key: PRNGKeyArray,
    ):
        if inner_width % num_heads:
            raise ValueError(f"NarrowAttention: {inner_width} channels cannot be split into {num_heads} equal heads")
        keys = jax.random.split(key, 4)
        self.query, self.key, self.value = (torch_linear(width, inner_width, key=k) for k in keys[:3])
        self.out = torch_linear(inner_width, width, key=keys[3])
        self.num_heads = num_heads
        self.implementation = implementation

    def __call__(
        self,
        query: Float[Array, "b q d"],
        key_input: Float[Array, "b k d"],
        value_input: Float[Array, "b k d"],
        *,
        key_mask: KeyMask | None = None,
    ) -> Float[Array, "b q d"]:
        heads = [
            self._heads(layer(x))
            for layer, x in ((self.query, query), (self.key, key_input), (self.value, value_input))
        ]
        mixed = attention(*heads, key_mask=key_mask, implementation=self.implementation)
        return self.out(mixed.reshape(*query.shape[:2], -1))

    def _heads(self, x: Float[Array, "b n e"]) -> Float[Array, "b n heads f"]:
        return x.reshape(*x.shape[:2], self.num_heads, -1)


class TwoWayBlock(eqx.Module):
    """Attention among the tokens, from tokens to image, MLP, from image to tokens; a norm behind each.

    In the ``first`` block tokens attend to each other without positions, and the result replaces them: no residual.
    """

    among: NarrowAttention
    norm1: LayerNorm
    read: NarrowAttention
    norm2: LayerNorm
    mlp: MLP
    norm3: LayerNorm
    write: NarrowAttention
    norm4: LayerNorm
    first: bool = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_dim: int,
        *,
        inner_width: int,
        first: bool,
        eps: float = EPS,
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key, 4)
        self.among = NarrowAttention(width, width, num_heads, key=keys[0])
        self.read = NarrowAttention(width, inner_width, num_heads, key=keys[1])
        self.mlp = MLP(width, mlp_dim, activation="relu", key=keys[2])
        self.write = NarrowAttention(width, inner_width, num_heads, key=keys[3])
        self.norm1, self.norm2, self.norm3, self.norm4 = (LayerNorm(width, eps=eps) for _ in range(4))
        self.first = first

    def __call__(
        self,
        tokens: Tokens,
        image: Places,
        token_position: Tokens,
        image_position: Float[Array, "k d"],
        *,
        token_mask: TokenMask | None = None,
    ) -> tuple[Tokens, Places]:
        tokens = self.norm1(self._mixed(tokens, token_position, token_mask))
        placed = image + image_position
        tokens = self.norm2(tokens + self.read(tokens + token_position, placed, image))
        tokens = self.norm3(tokens + self.mlp(tokens))
        written = self.write(placed, tokens + token_position, tokens, key_mask=token_mask)
        return tokens, self.norm4(image + written)

    def _mixed(self, tokens: Tokens, position: Tokens, mask: TokenMask | None) -> Tokens:
        if self.first:
            return self.among(tokens, tokens, tokens, key_mask=mask)
        placed = tokens + position
        return tokens + self.among(placed, placed, tokens, key_mask=mask)


class TwoWayTransformer(eqx.Module):
    """``depth`` blocks, then the tokens read the image once more.

    ``inner_width`` is that of attention between tokens and image. ``eps`` is that of the blocks' norms; the last has
    1e-5.
    """

    blocks: tuple[TwoWayBlock, ...]
    read: NarrowAttention
    norm: LayerNorm

    def __init__(
        self,
        depth: int,
        width: int,
        num_heads: int,
        mlp_dim: int,
        *,
        inner_width: int,
        eps: float = EPS,
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key, depth + 1)
        self.blocks = tuple(
            TwoWayBlock(width, num_heads, mlp_dim, inner_width=inner_width, first=not i, eps=eps, key=keys[i])
            for i in range(depth)
        )
        self.read = NarrowAttention(width, inner_width, num_heads, key=keys[depth])
        self.norm = LayerNorm(width, eps=EPS)

    def __call__(
        self, tokens: Tokens, image: Places, image_position: Float[Array, "k d"], *, token_mask: TokenMask | None = None
    ) -> tuple[Tokens, Places]:
        """``token_mask`` is True on tokens that are there; what the others come out as is arbitrary."""
        position = tokens
        for block in self.blocks:
            tokens, image = block(tokens, image, position, image_position, token_mask=token_mask)
        tokens = tokens + self.read(tokens + position, image + image_position, image)
        return self.norm(tokens), image
