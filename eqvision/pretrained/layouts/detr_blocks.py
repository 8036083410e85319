"""What layouts of DETR share: the backbone, the layers of the transformer, the heads."""

from typing import Any, NamedTuple

from eqvision.backbones import ResNet
from eqvision.detectors import DETR
from eqvision.layers import FrozenBatchNorm
from eqvision.pretrained.rules import CONV, LINEAR, Rule


def backbone_rules(backbone: ResNet, prefix: str) -> list[Rule]:
    """A ResNet by torchvision's names behind a prefix, which are timm's too."""
    frozen = isinstance(backbone.stem.norm, FrozenBatchNorm)
    table = conv_norm("backbone.stem", f"{prefix}.conv1", f"{prefix}.bn1", frozen)
    for s, stage in enumerate(backbone.stages):
        for b, block in enumerate(stage):
            ours, theirs = f"backbone.stages.{s}.{b}", f"{prefix}.layer{s + 1}.{b}"
            for c in range(len(block.convs)):
                table += conv_norm(f"{ours}.convs.{c}", f"{theirs}.conv{c + 1}", f"{theirs}.bn{c + 1}", frozen)
            if block.projection is not None:
                names = (f"{theirs}.downsample.0", f"{theirs}.downsample.1")
                table += conv_norm(f"{ours}.projection", *names, frozen)
    return table


def hf_backbone_rules(backbone: ResNet, prefix: str) -> list[Rule]:
    """A ResNet by transformers' own names behind a prefix."""
    frozen = isinstance(backbone.stem.norm, FrozenBatchNorm)

    def layer(ours: str, theirs: str) -> list[Rule]:
        return conv_norm(ours, f"{prefix}.{theirs}.convolution", f"{prefix}.{theirs}.normalization", frozen)

    table = layer("backbone.stem", "embedder.embedder")
    for s, stage in enumerate(backbone.stages):
        for b, block in enumerate(stage):
            ours, theirs = f"backbone.stages.{s}.{b}", f"encoder.stages.{s}.layers.{b}"
            for c in range(len(block.convs)):
                table += layer(f"{ours}.convs.{c}", f"{theirs}.layer.{c}")
            if block.projection is not None:
                table += layer(f"{ours}.projection", f"{theirs}.shortcut")
    return table


def conv_norm(ours: str, conv: str, norm: str, frozen: bool) -> list[Rule]:
    """A convolution and its batch norm, whose statistics are parameters where it is frozen."""
    statistics = ("running_mean", "running_var")
    names = [f"{ours}.norm.{name}" for name in statistics]
    names = names if frozen else [f"stats.{ours}.norm.mean", f"stats.{ours}.norm.variance"]
    return [
        Rule(f"{ours}.conv.weight", f"{conv}.weight", CONV),
        Rule(f"{ours}.norm.weight", f"{norm}.weight"),
        Rule(f"{ours}.norm.bias", f"{norm}.bias"),
        *(Rule(name, f"{norm}.{theirs}") for name, theirs in zip(names, statistics, strict=True)),
    ]


class Parts(NamedTuple):
    """Their names of what stands outside the layers."""

    projection: str
    queries: str
    classes: str
    boxes: str
    decoder_norm: str


def outer_rules(model: DETR, parts: Parts) -> list[Rule]:
    """Projection, queries, heads, and the norm behind the decoder."""
    table = [Rule("projection.weight", f"{parts.projection}.weight", CONV)]
    table += [Rule("projection.bias", f"{parts.projection}.bias"), Rule("queries", parts.queries)]
    table += linear("head.classes", parts.classes)
    for i in range(len(model.head.boxes.layers)):
        table += linear(f"head.boxes.layers.{i}", f"{parts.boxes}.layers.{i}")
    return table + affine("decoder.norm", parts.decoder_norm)


def linear(ours: str, theirs: str, each: tuple[int, ...] | None = None) -> list[Rule]:
    """A linear layer."""
    weight = Rule(f"{ours}.weight", f"{theirs}.weight", LINEAR, each=each)
    return [weight, Rule(f"{ours}.bias", f"{theirs}.bias", each=each)]


def affine(ours: str, theirs: str, each: tuple[int, ...] | None = None) -> list[Rule]:
    """Weight and bias that are stored alike: of norms."""
    return [Rule(f"{ours}.{name}", f"{theirs}.{name}", each=each) for name in ("weight", "bias")]


def mask_rules(model: DETR) -> list[Rule]:
    """The panoptic head, which facebookresearch/detr and transformers name alike."""
    if model.mask_head is None:
        return []
    table = linear("mask_head.attention.query", "bbox_attention.q_linear")
    table += linear("mask_head.attention.key", "bbox_attention.k_linear")
    blocks = ("first", "second", *(f"stages.{i}.refine" for i in range(len(model.mask_head.stages))))
    for i, block in enumerate(blocks, 1):
        table += _conv(f"mask_head.{block}.conv", f"mask_head.lay{i}")
        table += affine(f"mask_head.{block}.norm", f"mask_head.gn{i}")
    for i in range(len(model.mask_head.stages)):
        table += _conv(f"mask_head.stages.{i}.adapter", f"mask_head.adapter{i + 1}")
    return table + _conv("mask_head.out", "mask_head.out_lay")


def _conv(ours: str, theirs: str) -> list[Rule]:
    return [Rule(f"{ours}.weight", f"{theirs}.weight", CONV), Rule(f"{ours}.bias", f"{theirs}.bias")]


def keeps_stride(model: Any) -> bool:
    """Whether the last stage is strided: transformers' own ResNet knows no dilation, only timm's does."""
    return model.backbone.strides[-1] == 32


def is_resnet(model: DETR) -> bool:
    """Whether the backbone is one that published weights have."""
    return isinstance(model.backbone, ResNet) and model.backbone.pool_stem
