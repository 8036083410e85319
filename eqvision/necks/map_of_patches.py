"""From what backbones give to what segmentation heads read: patches as a map, and maps behind a norm each."""

import equinox as eqx
from jaxtyping import PRNGKeyArray

from eqvision.layers import LayerNorm
from eqvision.types import Features, TokenFeatures


class PatchMap(eqx.Module):
    """The patches of a transformer as a pyramid of one map; it has no parameters."""

    def __call__(
        self,
        features: Features | TokenFeatures,
        state: eqx.nn.State,
        *,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Features, eqx.nn.State]:
        del train, key
        assert isinstance(features, TokenFeatures)
        return (features.patches,), state


class MapNorms(eqx.Module):
    """A layer norm over the channels of each map: what stands behind Swin (eps 1e-5) and ConvNeXt (1e-6) in UPerNet."""

    norms: tuple[LayerNorm, ...]

    def __init__(self, channels: tuple[int, ...], *, eps: float):
        self.norms = tuple(LayerNorm(width, eps=eps) for width in channels)

    def __call__(
        self, features: Features, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[Features, eqx.nn.State]:
        del train, key
        return tuple(norm(x) for norm, x in zip(self.norms, features, strict=True)), state
