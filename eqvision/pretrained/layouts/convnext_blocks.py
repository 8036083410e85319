"""What all layouts of ConvNeXt share: the order of the parts. Files hold V1 and V2 under the same names."""

from collections.abc import Callable
from typing import NamedTuple

from eqvision.backbones import ConvNeXt
from eqvision.classifiers import Classifier
from eqvision.models import Model
from eqvision.pretrained.rules import CONV, LINEAR, SAME, Op, Rule, reshaped

FIRST_CONV = "backbone.stem.conv.weight"


class ConvNeXtNames(NamedTuple):
    """A layout's names: of ``block`` and ``downsample`` by stage (``{}`` for the block's number), of parts in a block.

    ``stem`` and ``downsample`` give convolution and norm. ``scale`` is V1's layer scale, ``grn`` V2's two parameters.
    """

    stem: tuple[str, str]
    downsample: Callable[[int], tuple[str, str]]
    block: Callable[[int], str]
    conv: str
    norm: str
    fc1: str
    fc2: str
    scale: str
    grn: tuple[str, str]
    head_norm: str
    head: str


def is_convnext(model: Classifier) -> bool:
    return isinstance(model.backbone, ConvNeXt)


def is_v1(model: Classifier) -> bool:
    """Whether blocks end with a layer scale and have no GRN."""
    if not isinstance(model.backbone, ConvNeXt):
        return False
    block = model.backbone.stages[0].blocks
    return block.grn is None and block.scale is not None


def is_v2(model: Classifier) -> bool:
    """Whether blocks have GRN and no layer scale."""
    if not isinstance(model.backbone, ConvNeXt):
        return False
    block = model.backbone.stages[0].blocks
    return block.grn is not None and block.scale is None


def convnext_rules(
    model: Model,
    names: ConvNeXtNames,
    *,
    linear: Op = LINEAR,
    scale_axes: tuple[int, ...] = (),
    grn_axes: tuple[int, ...] = (),
) -> tuple[Rule, ...]:
    """``linear`` is the op of the MLP's two matrices. ``scale_axes`` follow the channels of the layer scale in the
    file and ``grn_axes`` precede those of GRN, all of length 1.
    """
    backbone = model.backbone
    assert isinstance(backbone, ConvNeXt)
    table = [*_affine("backbone.stem.conv", names.stem[0], CONV), *_affine("backbone.stem.norm", names.stem[1])]
    for s, (stage, width) in enumerate(zip(backbone.stages, backbone.channels, strict=True)):
        ours, theirs, each = f"backbone.stages.{s}", names.block(s), tuple(range(len(stage.rates)))
        if stage.downsample is not None:
            conv, norm = names.downsample(s)
            table += _affine(f"{ours}.downsample.norm", norm) + _affine(f"{ours}.downsample.conv", conv, CONV)
        parts = (("conv", names.conv, CONV), ("norm", names.norm, SAME))
        parts += (("fc1", names.fc1, linear), ("fc2", names.fc2, linear))
        for part, name, op in parts:
            table += _affine(f"{ours}.blocks.{part}", f"{theirs}.{name}", op, each)
        if stage.blocks.scale is not None:
            op = reshaped((width, *scale_axes), (width,))
            table.append(Rule(f"{ours}.blocks.scale.scale", f"{theirs}.{names.scale}", op, each))
        if stage.blocks.grn is not None:
            op = reshaped((*grn_axes, 4 * width), (4 * width,))
            table.append(Rule(f"{ours}.blocks.grn.weight", f"{theirs}.{names.grn[0]}", op, each))
            table.append(Rule(f"{ours}.blocks.grn.bias", f"{theirs}.{names.grn[1]}", op, each))
    table += _affine("head.norm", names.head_norm) + _affine("head.linear", names.head, LINEAR)
    return tuple(table)


def _affine(ours: str, theirs: str, op: Op = SAME, each: tuple[int, ...] | None = None) -> list[Rule]:
    return [
        Rule(f"{ours}.weight", f"{theirs}.weight", op, each),
        Rule(f"{ours}.bias", f"{theirs}.bias", SAME, each),
    ]
