"""DETR (Carion et al. 2020): a set of queries read an encoded feature map, and each says one object or none."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from eqvision.backbones import resnet
from eqvision.backbones.resnet import Norm
from eqvision.classifiers import Backbone
from eqvision.heads.set_prediction import MaskInputs, PanopticMaskHead, SetPredictionHead
from eqvision.layers import Activation, Conv, Implementation, Remat, fold, normal
from eqvision.layers.detr_transformer import DETRDecoder, DETREncoder
from eqvision.layers.sine_position import sine_position, size_mask
from eqvision.layers.torch_init import torch_conv
from eqvision.layers.transformer import NormOrder
from eqvision.types import Features, PaddedImages, SetPredictions, TokenFeatures


class Encoded(NamedTuple):
    """A feature map before and behind the encoder, where it is image, and its positions."""

    projected: Float[Array, "b h w d"]
    memory: Float[Array, "b h w d"]
    mask: Bool[Array, "b h w"]
    position: Float[Array, "b h w d"]


class DETR(eqx.Module):
    """Backbone, 1x1 projection, encoder, decoder over learned queries, head; and a mask for every query as an option.

    The coarsest map of the backbone is read; padding is masked in positions, encoder and decoder. With ``mask_head``
    the three maps before it are read too.
    """

    backbone: Backbone
    projection: Conv
    encoder: DETREncoder
    decoder: DETRDecoder
    queries: Float[Array, "q d"]
    """Positions of the queries, which themselves start as zeros."""
    head: SetPredictionHead
    mask_head: PanopticMaskHead | None

    def __init__(
        self,
        backbone: Backbone,
        *,
        num_classes: int = 91,
        num_queries: int = 100,
        width: int = 256,
        num_heads: int = 8,
        mlp_dim: int = 2048,
        encoder_depth: int = 6,
        decoder_depth: int = 6,
        norm_order: NormOrder = "post",
        activation: Activation = "relu",
        dropout: float = 0.1,
        eps: float = 1e-5,
        masks: bool = False,
        attention: Implementation = "xla",
        remat: Remat = "none",
        unroll: int = 1,
        key: PRNGKeyArray,
    ):
        """The defaults are the paper's. Raises ValueError for masks of a backbone with fewer than four maps."""
        if masks and len(backbone.channels) < 4:
            raise ValueError(
                f"masks=True reads four maps of the backbone, and this one gives {len(backbone.channels)}; "
                "choose a pyramid such as a ResNet"
            )
        keys = jax.random.split(key, 6)
        options = {"norm_order": norm_order, "activation": activation, "dropout": dropout, "eps": eps}
        options |= {"implementation": attention, "remat": remat, "unroll": unroll}
        self.backbone = backbone
        self.projection = torch_conv(backbone.channels[-1], width, 1, key=keys[0])
        self.encoder = DETREncoder(encoder_depth, width, num_heads, mlp_dim, **options, key=keys[1])
        self.decoder = DETRDecoder(decoder_depth, width, num_heads, mlp_dim, **options, key=keys[2])
        self.queries = normal(keys[3], (num_queries, width))
        self.head = SetPredictionHead(width, num_classes, key=keys[4])
        finer = backbone.channels[-2:-5:-1]
        self.mask_head = PanopticMaskHead(width, num_heads, finer, key=keys[5]) if masks else None

    def __call__(
        self, inputs: PaddedImages, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[SetPredictions, eqx.nn.State]:
        """Images of any size, as long as the backbone takes it."""
        features, state = self.backbone(inputs.images, state, train=train, key=fold(key, 0))
        maps = (features.patches,) if isinstance(features, TokenFeatures) else features
        (_, height, width, _), (_, rows, columns, _) = inputs.images.shape, maps[-1].shape
        mask = size_mask(inputs.size, (height, width), (rows, columns))
        return self.predict(maps, mask, train=train, key=key), state

    def predict(
        self, features: Features, mask: Bool[Array, "b h w"], *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> SetPredictions:
        """From the backbone's maps; ``mask`` is True where the last of them is image."""
        encoded = self.encode(features[-1], mask, train=train, key=fold(key, 1))
        queries = self.decode(encoded, train=train, key=fold(key, 2))
        logits, boxes_cxcywh = self.head(queries)
        if self.mask_head is None:
            return SetPredictions(logits, boxes_cxcywh)
        inputs = MaskInputs(encoded.projected, encoded.memory, mask, features[-2:-5:-1])
        return SetPredictions(logits, boxes_cxcywh, masks=self.mask_head(queries[-1], inputs))

    def encode(
        self,
        features: Float[Array, "b h w c"],
        mask: Bool[Array, "b h w"],
        *,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> Encoded:
        """Projection and encoder. What stands at padded places of the map is read by nothing."""
        projected = self.projection(features)
        position = sine_position(mask, projected.shape[-1]).astype(projected.dtype)
        tokens, positions = _flat(projected), _flat(position)
        memory = self.encoder(tokens, positions, key_mask=_rows(mask), train=train, key=key)
        return Encoded(projected, memory.reshape(projected.shape), mask, position)

    def decode(
        self, encoded: Encoded, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> Float[Array, "l b q d"]:
        """The queries after every decoder layer."""
        memory, position = _flat(encoded.memory), _flat(encoded.position)
        queries = jnp.broadcast_to(self.queries.astype(memory.dtype), (memory.shape[0], *self.queries.shape))
        return self.decoder(queries, memory, position, key_mask=_rows(encoded.mask), train=train, key=key)

    def intermediates(
        self, inputs: PaddedImages, state: eqx.nn.State, layers: tuple[int, ...]
    ) -> tuple[Float[Array, "..."] | TokenFeatures, ...]:
        """Features of the backbone's ``layers``."""
        return self.backbone.intermediates(inputs.images, state, layers)


def detr(
    depth: int = 50,
    *,
    num_classes: int = 91,
    in_channels: int = 3,
    dc5: bool = False,
    norm: Norm = "frozen",
    num_queries: int = 100,
    width: int = 256,
    num_heads: int = 8,
    mlp_dim: int = 2048,
    encoder_depth: int = 6,
    decoder_depth: int = 6,
    norm_order: NormOrder = "post",
    dropout: float = 0.1,
    eps: float = 1e-5,
    masks: bool = False,
    attention: Implementation = "xla",
    remat: Remat = "none",
    unroll: int = 1,
    key: PRNGKeyArray,
) -> DETR:
    """DETR on a ResNet, table 1 of the paper. ``dc5`` dilates the last stage, which keeps the stride 16.

    ``norm="frozen"`` fixes the backbone's batch norms, which makes sense with pretrained weights only; ``batch``
    trains them. ``masks`` adds the panoptic head. ``num_classes`` 91 are the ids of COCO, of which 80 are in use.
    ``eps`` is that of the transformer's layer norms: 1e-6 in Scenic.
    """
    keys = jax.random.split(key)
    return DETR(
        resnet(depth, in_channels=in_channels, norm=norm, dilate_last=dc5, key=keys[0]),
        num_classes=num_classes,
        num_queries=num_queries,
        width=width,
        num_heads=num_heads,
        mlp_dim=mlp_dim,
        encoder_depth=encoder_depth,
        decoder_depth=decoder_depth,
        norm_order=norm_order,
        dropout=dropout,
        eps=eps,
        masks=masks,
        attention=attention,
        remat=remat,
        unroll=unroll,
        key=keys[1],
    )


def _flat(x: Float[Array, "b h w d"]) -> Float[Array, "b n d"]:
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _rows(mask: Bool[Array, "b h w"]) -> Bool[Array, "b n"]:
    return mask.reshape(mask.shape[0], -1)
