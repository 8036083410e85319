"""U-Net (Ronneberger et al. 2015): the paper's form with VALID convolutions, and the padded form that people use."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.backbones.unet import Border, UNetEncoder, UNetNorm, he_normal, legal_side, lost_pixels
from eqvision.heads.segmentation import PixelHead
from eqvision.layers import fold
from eqvision.necks.unet import UNetDecoder, Upsampling
from eqvision.segmenters.segmenter import bare_images, resized_logits
from eqvision.types import Features, Images, PaddedImages


class UNet(eqx.Module):
    """Contracting path, expanding path, and a 1x1 convolution.

    ``mirror`` is for VALID convolutions, whose result is smaller than the image: images of any size are surrounded by
    their own reflection, as in the paper's figure 2, so that each of their pixels gets logits. Without it the result
    is that of the middle of the image (388 pixels of 572), and only some sizes are legal.
    """

    backbone: UNetEncoder
    neck: UNetDecoder
    head: PixelHead
    mirror: bool = eqx.field(static=True)

    def __call__(
        self,
        inputs: PaddedImages | Images,
        state: eqx.nn.State,
        *,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "b h2 w2 k"], eqx.nn.State]:
        """Logits of each pixel of the images."""
        images = bare_images(inputs)
        size, poolings = images.shape[1:3], len(self.backbone.channels) - 1
        read = mirrored(images, poolings) if self.mirror else images
        features, state = self.backbone(read, state, train=train, key=fold(key, 0))
        maps, state = self.neck(features, state, train=train, key=fold(key, 1))
        logits, state = self.head(maps, state, train=train, key=fold(key, 2))
        if self.backbone.border == "valid":
            return logits[:, : size[0], : size[1]], state
        return resized_logits(logits, size), state

    def intermediates(self, inputs: PaddedImages | Images, state: eqx.nn.State, layers: tuple[int, ...]) -> Features:
        """Maps of the contracting path's levels ``layers``."""
        return self.backbone.intermediates(bare_images(inputs), state, layers)


def mirrored(images: Images, poolings: int) -> Float[Array, "b h2 w2 c"]:
    """Images in their own reflection, as large as a U-Net of VALID convolutions needs to see each of their pixels.

    The first ``h`` rows and ``w`` columns of its result are those of the images.
    """
    lost = lost_pixels(poolings)
    margins = []
    for side in images.shape[1:3]:
        read = legal_side(side + lost, poolings)
        margins.append((lost // 2, read - side - lost // 2))
    return jnp.pad(images, ((0, 0), *margins, (0, 0)), mode="reflect")


def unet(
    *,
    num_classes: int = 2,
    in_channels: int = 3,
    width: int = 64,
    depth: int = 4,
    norm: UNetNorm = "batch",
    up: Upsampling = "transposed",
    border: Border = "same",
    mirror: bool | None = None,
    stem_stride: int = 1,
    dropout: float = 0.0,
    key: PRNGKeyArray,
) -> UNet:
    """A U-Net of ``depth`` poolings, whose first level has ``width`` channels and each further one twice as many.

    The defaults are milesial/Pytorch-UNet's: 3x3 convolutions with padding and batch norm, images of any size. With
    ``up="bilinear"`` the levels have fewer channels on the way up, and the last one half. ``border="valid"`` and
    ``norm="none"`` are the paper's; there ``mirror`` (None: where the border is ``valid``) lets it read any size.
    ``stem_stride`` 2 has the first convolution leave every second pixel out, and the logits enlarged at the end: a
    quarter of the work. ``dropout`` is at the end of the contracting path.

    Raises ValueError for options that are unknown or do not go together.
    """
    if mirror and border != "valid":
        raise ValueError(f"mirror=True is for border='valid', whose results are smaller; got border={border!r}")
    keys = jax.random.split(key, 3)
    channels = tuple(width << level for level in range(depth + 1))
    if up == "bilinear":
        channels = (*channels[:-1], channels[-1] // 2)
    backbone = UNetEncoder(
        channels,
        in_channels=in_channels,
        norm=norm,
        border=border,
        stem_stride=stem_stride,
        dropout=dropout,
        key=keys[0],
    )
    neck = UNetDecoder(channels, backbone.strides, up=up, norm=norm, border=border, key=keys[1])
    head = PixelHead(neck.channels[0], num_classes, init=he_normal, key=keys[2])
    return UNet(backbone, neck, head, border == "valid" if mirror is None else mirror)
