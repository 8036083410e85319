"""Cutting images and video into non-overlapping patches."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.layers.init import lecun_normal
from eqvision.layers.linear import Initializer


class PatchEmbed(eqx.Module):
    """A convolution with stride = window, written as a reshape and one matrix product.

    ``weight`` keeps the convolution's shape (height, width, in, out), as checkpoints store it.
    """

    weight: Float[Array, "p q i d"]
    bias: Float[Array, " d"] | None
    patch_size: tuple[int, int] = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int,
        width: int,
        patch_size: int | tuple[int, int],
        *,
        use_bias: bool = True,
        init: Initializer = lecun_normal,
        key: PRNGKeyArray,
    ):
        self.patch_size = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
        self.weight = init(key, (*self.patch_size, in_channels, width))
        self.bias = jnp.zeros((width,)) if use_bias else None

    def __call__(self, images: Float[Array, "b height width i"]) -> Float[Array, "b h w d"]:
        (p, q), (b, height, width, i) = self.patch_size, images.shape
        if height % p or width % q:
            raise ValueError(f"images of {height}x{width} cannot be cut into patches of {p}x{q}")
        patches = images.reshape(b, height // p, p, width // q, q, i).transpose(0, 1, 3, 2, 4, 5)
        weight = self.weight.astype(images.dtype).reshape(p * q * i, -1)
        tokens = (patches.reshape(-1, p * q * i) @ weight).reshape(b, height // p, width // q, -1)
        return tokens if self.bias is None else tokens + self.bias.astype(images.dtype)


class PatchEmbed3D(eqx.Module):
    """Tubelets of video (Arnab et al. 2021, ViViT): a 3-D convolution with stride = window."""

    weight: Float[Array, "r p q i d"]
    bias: Float[Array, " d"] | None
    patch_size: tuple[int, int, int] = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int,
        width: int,
        patch_size: tuple[int, int, int],
        *,
        use_bias: bool = True,
        init: Initializer = lecun_normal,
        key: PRNGKeyArray,
    ):
        self.patch_size = patch_size
        self.weight = init(key, (*patch_size, in_channels, width))
        self.bias = jnp.zeros((width,)) if use_bias else None

    def __call__(self, video: Float[Array, "b time height width i"]) -> Float[Array, "b t h w d"]:
        (r, p, q), (b, time, height, width, i) = self.patch_size, video.shape
        if time % r or height % p or width % q:
            raise ValueError(f"video of {time}x{height}x{width} cannot be cut into tubelets of {r}x{p}x{q}")
        tubes = video.reshape(b, time // r, r, height // p, p, width // q, q, i).transpose(0, 1, 3, 5, 2, 4, 6, 7)
        weight = self.weight.astype(video.dtype).reshape(r * p * q * i, -1)
        tokens = (tubes.reshape(-1, r * p * q * i) @ weight).reshape(b, time // r, height // p, width // q, -1)
        return tokens if self.bias is None else tokens + self.bias.astype(video.dtype)
