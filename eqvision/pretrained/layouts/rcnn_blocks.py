"""What layouts of R-CNNs share: convolutions with any norm, pyramid, heads."""

import math
from typing import Any, NamedTuple

from eqvision.backbones import ResNet
from eqvision.detectors import RCNN
from eqvision.heads import RoIBoxHead, RoIMaskHead
from eqvision.layers import BatchNorm, FrozenBatchNorm, NormedConv
from eqvision.necks import FPN
from eqvision.pretrained.layouts.detr_blocks import affine, conv_norm, linear
from eqvision.pretrained.rules import CONV, Op, Rule, ShapeError, elementwise

# torch's transposed convolution without groups: (in, out, height, width)
TRANSPOSED = elementwise(lambda x: x.transpose(2, 3, 0, 1), lambda x: x.transpose(2, 3, 0, 1))
# Where the number of classes is another, these are fresh too; boxes for all classes together keep their layer.
CLASS_LAYERS = ("box_heads.*.logits.*", "box_heads.*.deltas.*", "mask_head.logits.*")


class HeadNames(NamedTuple):
    """Their names of the layers of a head, in order; a convolution's is a pair with its norm's."""

    convs: tuple[tuple[str, str], ...] = ()
    linears: tuple[str, ...] = ()
    upsample: str = ""
    logits: str = ""
    deltas: str = ""


def flattened(bins: int = 7) -> Op:
    """A linear layer on pooled maps: torch's (out, channels height width), ours (height width channels, out)."""

    def load(x: Any) -> Any:
        channels = x.shape[1] // bins**2
        if x.shape[1] != channels * bins**2:
            raise ShapeError(x.shape, (x.shape[0], channels * bins**2))
        return x.reshape(-1, channels, bins, bins).transpose(2, 3, 1, 0).reshape(-1, x.shape[0])

    def save(x: Any) -> Any:
        return x.reshape(bins, bins, -1, x.shape[1]).transpose(3, 2, 0, 1).reshape(x.shape[1], -1)

    return elementwise(load, save)


def normed(ours: str, part: NormedConv, conv: str, norm: str) -> list[Rule]:
    """A convolution with a bias or with any norm."""
    if part.norm is None:
        return bare_conv(f"{ours}.conv", conv)
    if isinstance(part.norm, BatchNorm | FrozenBatchNorm):
        return conv_norm(ours, conv, norm, isinstance(part.norm, FrozenBatchNorm))
    return [Rule(f"{ours}.conv.weight", f"{conv}.weight", CONV), *affine(f"{ours}.norm", norm)]


def bare_conv(ours: str, theirs: str) -> list[Rule]:
    """Weight and bias of a convolution."""
    return [Rule(f"{ours}.weight", f"{theirs}.weight", CONV), Rule(f"{ours}.bias", f"{theirs}.bias")]


def rpn_rules(model: RCNN, convs: tuple[tuple[str, str], ...], logits: str, deltas: str) -> list[Rule]:
    """Both outputs run over anchors first, and differences over x, y, width and height last, everywhere."""
    table = []
    for i, (part, names) in enumerate(zip(model.rpn.convs, convs, strict=True)):
        table += normed(f"rpn.convs.{i}", part, *names)
    return table + bare_conv("rpn.logits", logits) + bare_conv("rpn.deltas", deltas)


def box_rules(ours: str, head: RoIBoxHead, names: HeadNames) -> list[Rule]:
    """Classes and boxes keep the file's order: where the background is, the dialect says."""
    table = []
    for i, (part, pair) in enumerate(zip(head.convs, names.convs, strict=True)):
        table += normed(f"{ours}.convs.{i}", part, *pair)
    for i, (part, name) in enumerate(zip(head.layers, names.linears, strict=True)):
        rules = linear(f"{ours}.layers.{i}", name)
        if not i:
            width = head.convs[-1].conv.weight.shape[3] if head.convs else None
            rules[0] = rules[0]._replace(op=flattened(_bins(part.weight.shape[0], width)))
        table += rules
    return table + linear(f"{ours}.logits", names.logits) + linear(f"{ours}.deltas", names.deltas)


def _bins(inputs: int, channels: int | None) -> int:
    """The side of the pooled maps: 7 in all published models."""
    return 7 if channels is None else math.isqrt(inputs // channels)


def mask_rules(head: RoIMaskHead, names: HeadNames) -> list[Rule]:
    """Convolutions, the transposed one, and a logit for each class."""
    table = []
    for i, (part, pair) in enumerate(zip(head.convs, names.convs, strict=True)):
        table += normed(f"mask_head.convs.{i}", part, *pair)
    table += [
        Rule("mask_head.upsample.weight", f"{names.upsample}.weight", TRANSPOSED),
        Rule("mask_head.upsample.bias", f"{names.upsample}.bias"),
    ]
    return table + bare_conv("mask_head.logits", names.logits)


def on_resnet(model: RCNN) -> bool:
    """Whether backbone and neck are a ResNet and its pyramid, all of whose maps are read."""
    return isinstance(model.backbone, ResNet) and isinstance(model.neck, FPN) and not model.neck.first_level


def is_plain(model: RCNN) -> bool:
    """Whether neck and heads have no norm, as in all published models but torchvision's v2 and ViTDet."""
    assert isinstance(model.neck, FPN)
    heads = (*model.box_heads, *([] if model.mask_head is None else [model.mask_head]))
    parts = [*model.neck.laterals, *model.rpn.convs, *(conv for head in heads for conv in head.convs)]
    return all(part.norm is None for part in parts) and not any(head.convs for head in model.box_heads)
