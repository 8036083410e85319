"""Fitting a file's numbers to a model of another size or type. Nothing here happens in silence."""

import logging
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from eqvision.pretrained.errors import WeightsError, listed

log = logging.getLogger("eqvision.pretrained")


def adapt_channels(
    kernel: Float[np.ndarray, "h w i o"], in_channels: int, where: str
) -> Float[np.ndarray, "h w {in_channels} o"]:
    """A first convolution for RGB, for images of other channels: timm's rule.

    One channel: the sum over RGB, so that a grey image gives what it gave as RGB. Others: RGB repeated and cut, and
    scaled by 3 / ``in_channels``. Raises WeightsError for a kernel that is not for RGB.
    """
    if kernel.shape[2] != 3:
        raise WeightsError(
            f"{where}: the first convolution reads {kernel.shape[2]} channels and {in_channels} are wanted; "
            "only one for RGB can be adapted"
        )
    if in_channels == 1:
        return kernel.sum(axis=2, keepdims=True)
    repeats = -(-in_channels // 3)
    return np.tile(kernel, (1, 1, repeats, 1))[:, :, :in_channels] * np.float32(3 / in_channels)


def check_types(leaves: Mapping[str, np.ndarray], where: str) -> None:
    """Warn of leaves that are not float32, which they become. Raises WeightsError for numbers that are not real."""
    odd = [f"{name}: {leaf.dtype}" for name, leaf in leaves.items() if leaf.dtype != np.float32]
    wrong = [line for line in odd if not line.rpartition(": ")[2].startswith(("float", "bfloat"))]
    if wrong:
        raise WeightsError(f"{where}: {len(wrong)} leaves are not floating-point numbers:{listed(wrong)}")
    if odd:
        log.warning("%s: %d of %d leaves are converted to float32:%s", where, len(odd), len(leaves), listed(odd))
