"""Image classifiers: backbone, optional neck, head. The table of zoo names is in ``zoo.py``."""

import functools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from eqvision.backbones import (
    SIZES,
    axial_resnet,
    bit,
    convnext,
    hybrid_vit,
    mixer,
    mlp,
    resnet,
    resnet_cifar,
    small_cnn,
    swin,
    vit,
)
from eqvision.backbones.swin import WindowRule
from eqvision.backbones.vit import PositionKind
from eqvision.heads import (
    AttentionPool,
    DistilledHead,
    MapHead,
    NormedMapHead,
    NormPoolHead,
    TokenHead,
    TokenPool,
    zeros,
)
from eqvision.layers import Activation, EpsOn, Implementation, LayerNorm, MLPKind, Remat, fold, truncated_normal
from eqvision.types import Features, Images, TokenFeatures


@runtime_checkable
class Backbone(Protocol):
    """What a classifier needs of a backbone."""

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    in_channels: int

    def __call__(
        self, images: Images, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[Features | TokenFeatures, eqx.nn.State]: ...

    def intermediates(
        self, images: Images, state: eqx.nn.State, layers: tuple[int, ...]
    ) -> tuple[Float[Array, "..."] | TokenFeatures, ...]: ...


@runtime_checkable
class Neck(Protocol):
    """From features to features, with the new ``channels`` and ``strides``."""

    def __call__(
        self, features: Features, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[Features, eqx.nn.State]: ...


@runtime_checkable
class Head(Protocol):
    """From features to logits; ``reset`` gives a fresh one for another number of classes."""

    def __call__(
        self,
        features: Any,  # what its backbone gives: Features or TokenFeatures
        state: eqx.nn.State,
        *,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "b ... k"], eqx.nn.State]: ...

    def pooled(self, features: Any) -> Float[Array, "b ... d"]: ...

    def reset(self, num_classes: int, *, key: PRNGKeyArray) -> "Head": ...


class Classifier(eqx.Module):
    """Composition without logic: backbone -> neck (if any) -> head -> logits."""

    backbone: Backbone
    neck: Neck | None
    head: Head

    def __call__(
        self, images: Images, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "b ... k"], eqx.nn.State]:
        features, state = self.features(images, state, train=train, key=key)
        return self.head(features, state, train=train, key=fold(key, 2))

    def features(
        self, images: Images, state: eqx.nn.State, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[Features | TokenFeatures, eqx.nn.State]:
        """What the head is given: the output of the neck, or of the backbone where there is none."""
        features, state = self.backbone(images, state, train=train, key=fold(key, 0))
        if self.neck is not None:
            features, state = self.neck(features, state, train=train, key=fold(key, 1))
        return features, state

    def pooled(self, images: Images, state: eqx.nn.State) -> Float[Array, "b ... d"]:
        """What the head's last linear layer reads, in inference and in float32: the features of a frozen model."""
        return self.head.pooled(self.features(images, state)[0])

    def intermediates(
        self, images: Images, state: eqx.nn.State, layers: tuple[int, ...]
    ) -> tuple[Float[Array, "..."] | TokenFeatures, ...]:
        """Features of the backbone's ``layers``: blocks of a transformer, stages of a pyramid."""
        return self.backbone.intermediates(images, state, layers)


def reset_head(model: Classifier, num_classes: int, *, key: PRNGKeyArray) -> Classifier:
    """The same model with a freshly initialised head for ``num_classes`` classes."""
    return eqx.tree_at(lambda m: m.head, model, model.head.reset(num_classes, key=key))


def inference(model: Classifier, state: eqx.nn.State) -> Callable[[Images], Float[Array, "b ... k"]]:
    """``images -> logits``, compiled once per image shape; parameters are arguments and not baked in."""
    run = jax.jit(lambda model, state, images: model(images, state)[0])
    return functools.partial(run, model, state)


def vit_classifier(
    size: str,
    patch_size: int,
    *,
    num_classes: int,
    image_size: int | tuple[int, int],
    in_channels: int,
    pool: TokenPool = "token",
    norm_after_pool: bool = False,
    pre_logits: int | None = None,
    zero_head: bool = False,
    class_token: bool | None = None,
    distillation_token: bool = False,
    distilled_head: bool = True,
    num_registers: int = 0,
    position: PositionKind = "learned",
    position_on_class: bool = True,
    activation: Activation = "gelu",
    mlp: MLPKind = "plain",
    use_qkv_bias: bool = True,
    eps: float = 1e-6,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    layer_scale: float | None = None,
    attention: Implementation = "xla",
    remat: Remat = "none",
    unroll: int = 1,
    key: PRNGKeyArray,
) -> Classifier:
    """ViT of a named size with pooling and head; see ``vit`` for what the dialects differ in.

    ``class_token`` None: where ``pool`` reads it; MAE's fine-tuned models have one and average the patches.
    ``norm_after_pool`` moves the final norm of the backbone behind the pooling. ``eps`` is that of all layer norms.
    ``distillation_token`` is DeiT's, with a linear layer of its own unless ``distilled_head=False``.

    Raises ValueError for a distilled head with another pooling, pre-logits or norm.
    """
    distilled_head = distillation_token and distilled_head
    if distilled_head and (pool != "token" or pre_logits is not None or norm_after_pool):
        raise ValueError("distillation_token=True has its own head: pool='token', no pre_logits, no norm_after_pool")
    keys = jax.random.split(key, 3)
    backbone = vit(
        size,
        patch_size,
        image_size=image_size,
        in_channels=in_channels,
        class_token=pool in ("token", "token_mean") if class_token is None else class_token,
        distillation_token=distillation_token,
        num_registers=num_registers,
        position=position,
        position_on_class=position_on_class,
        activation=activation,
        mlp=mlp,
        use_qkv_bias=use_qkv_bias,
        final_norm=not norm_after_pool,
        eps=eps,
        dropout=dropout,
        drop_path=drop_path,
        layer_scale=layer_scale,
        implementation=attention,
        remat=remat,
        unroll=unroll,
        key=keys[0],
    )
    width, _, num_heads, mlp_dim = SIZES[size]
    init = zeros if zero_head else truncated_normal
    if distilled_head:
        return Classifier(backbone, None, DistilledHead(width, num_classes, init=init, key=keys[2]))
    map_pool = None
    if pool == "map":
        map_pool = AttentionPool(width, num_heads, mlp_dim, activation=activation, eps=eps, key=keys[1])
    norm = LayerNorm(width, eps=eps) if norm_after_pool else None
    options = {"pool": pool, "map_pool": map_pool, "norm": norm, "pre_logits": pre_logits, "init": init}
    return Classifier(backbone, None, TokenHead(width, num_classes, **options, key=keys[2]))


def resnet_classifier(depth: int, *, num_classes: int, in_channels: int, key: PRNGKeyArray) -> Classifier:
    keys = jax.random.split(key)
    backbone = resnet(depth, in_channels=in_channels, key=keys[0])
    return Classifier(backbone, None, MapHead(backbone.channels[-1], num_classes, key=keys[1]))


def resnet_cifar_classifier(depth: int, *, num_classes: int, in_channels: int, key: PRNGKeyArray) -> Classifier:
    keys = jax.random.split(key)
    backbone = resnet_cifar(depth, in_channels=in_channels, key=keys[0])
    return Classifier(backbone, None, MapHead(backbone.channels[-1], num_classes, key=keys[1]))


def mixer_classifier(
    size: str,
    patch_size: int,
    *,
    num_classes: int,
    image_size: int | tuple[int, int],
    in_channels: int,
    activation: Activation = "gelu_tanh",
    dropout: float = 0.0,
    drop_path: float = 0.0,
    remat: Remat = "none",
    unroll: int = 1,
    key: PRNGKeyArray,
) -> Classifier:
    """MLP-Mixer of google-research/vision_transformer: mean of the tokens, zero head; timm has the exact ``gelu``."""
    keys = jax.random.split(key)
    backbone = mixer(
        size,
        patch_size,
        image_size=image_size,
        in_channels=in_channels,
        activation=activation,
        dropout=dropout,
        drop_path=drop_path,
        remat=remat,
        unroll=unroll,
        key=keys[0],
    )
    head = TokenHead(backbone.channels[-1], num_classes, pool="mean", init=zeros, key=keys[1])
    return Classifier(backbone, None, head)


def hybrid_classifier(
    size: str,
    *,
    num_classes: int,
    image_size: int | tuple[int, int],
    in_channels: int,
    pre_logits: int | None = None,
    activation: Activation = "gelu_tanh",
    conv_eps: float = 1e-8,
    conv_eps_on: EpsOn = "variance",
    norm_eps: float = 1e-5,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    attention: Implementation = "xla",
    remat: Remat = "none",
    unroll: int = 1,
    key: PRNGKeyArray,
) -> Classifier:
    """Hybrid ViT of google-research/vision_transformer, with timm's constants in the stem: class token, zero head.

    ``pre_logits`` is the tanh layer of the ImageNet-21k weights, ``activation`` and the constants are those of
    ``hybrid_vit``.
    """
    keys = jax.random.split(key)
    backbone = hybrid_vit(
        size,
        image_size=image_size,
        in_channels=in_channels,
        activation=activation,
        conv_eps=conv_eps,
        conv_eps_on=conv_eps_on,
        norm_eps=norm_eps,
        dropout=dropout,
        drop_path=drop_path,
        implementation=attention,
        remat=remat,
        unroll=unroll,
        key=keys[0],
    )
    head = TokenHead(backbone.channels[-1], num_classes, pre_logits=pre_logits, init=zeros, key=keys[1])
    return Classifier(backbone, None, head)


def bit_classifier(
    depth: int,
    width_factor: int,
    *,
    num_classes: int,
    in_channels: int,
    conv_eps: float = 1e-10,
    remat: Remat = "none",
    key: PRNGKeyArray,
) -> Classifier:
    """BiT of google-research/big_transfer: zero head; timm and transformers have ``conv_eps`` 1e-8."""
    keys = jax.random.split(key)
    backbone = bit(depth, width_factor, in_channels=in_channels, conv_eps=conv_eps, remat=remat, key=keys[0])
    return Classifier(backbone, None, MapHead(backbone.channels[-1], num_classes, init=zeros, key=keys[1]))


def axial_resnet_classifier(
    depth: int,
    *,
    num_classes: int,
    image_size: int | tuple[int, int],
    in_channels: int,
    remat: Remat = "none",
    unroll: int = 1,
    key: PRNGKeyArray,
) -> Classifier:
    """Axial-ResNet of Scenic."""
    keys = jax.random.split(key)
    backbone = axial_resnet(
        depth, image_size=image_size, in_channels=in_channels, remat=remat, unroll=unroll, key=keys[0]
    )
    return Classifier(backbone, None, MapHead(backbone.channels[-1], num_classes, key=keys[1]))


def small_cnn_classifier(*, num_classes: int, in_channels: int, key: PRNGKeyArray) -> Classifier:
    """Three stages of two convolutions, for smoke runs and small images."""
    keys = jax.random.split(key)
    backbone = small_cnn(in_channels=in_channels, key=keys[0])
    return Classifier(backbone, None, MapHead(backbone.channels[-1], num_classes, key=keys[1]))


def mlp_classifier(
    *, num_classes: int, image_size: int | tuple[int, int], in_channels: int, key: PRNGKeyArray
) -> Classifier:
    """Two hidden layers on all pixels, for smoke runs."""
    keys = jax.random.split(key)
    backbone = mlp(image_size=image_size, in_channels=in_channels, key=keys[0])
    return Classifier(backbone, None, MapHead(backbone.channels[-1], num_classes, key=keys[1]))


def swin_classifier(
    size: str,
    window: int = 7,
    *,
    num_classes: int,
    in_channels: int,
    window_rule: WindowRule = "torchvision",
    activation: Activation = "gelu",
    eps: float = 1e-5,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    attention: Implementation = "xla",
    remat: Remat = "none",
    unroll: int = 1,
    key: PRNGKeyArray,
) -> Classifier:
    """Swin transformer: final norm, mean, linear layer. ``eps`` is that of the blocks' norms and of the final one."""
    keys = jax.random.split(key)
    backbone = swin(
        size,
        window,
        in_channels=in_channels,
        window_rule=window_rule,
        activation=activation,
        eps=eps,
        dropout=dropout,
        drop_path=drop_path,
        implementation=attention,
        remat=remat,
        unroll=unroll,
        key=keys[0],
    )
    return Classifier(backbone, None, NormPoolHead(backbone.channels[-1], num_classes, eps=eps, key=keys[1]))


def convnext_classifier(
    size: str,
    *,
    num_classes: int,
    in_channels: int,
    version: int = 1,
    activation: Activation = "gelu",
    head_eps: float = 1e-6,
    drop_path: float = 0.0,
    remat: Remat = "none",
    unroll: int | bool = 1,
    key: PRNGKeyArray,
) -> Classifier:
    """ConvNeXt V1 or V2; ``head_eps`` is that of the last norm, which transformers has at 1e-12."""
    keys = jax.random.split(key)
    backbone = convnext(
        size,
        version=version,
        in_channels=in_channels,
        activation=activation,
        drop_path=drop_path,
        remat=remat,
        unroll=unroll,
        key=keys[0],
    )
    return Classifier(backbone, None, NormedMapHead(backbone.channels[-1], num_classes, eps=head_eps, key=keys[1]))
