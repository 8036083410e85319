"""Names of torchvision's R-CNNs on ResNets.

The files of 2019 have the names of that time, which torchvision renames when it loads them, and so does ``prepare``:
today convolutions are modules of their own, with a norm beside them in v2. Class and box columns have the background
first.
"""

import re
from collections.abc import Mapping

import numpy as np

from eqvision.backbones import ResNet
from eqvision.detectors import RCNN
from eqvision.necks import FPN
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts.detr_blocks import backbone_rules
from eqvision.pretrained.layouts.rcnn_blocks import (
    CLASS_LAYERS,
    HeadNames,
    box_rules,
    mask_rules,
    normed,
    on_resnet,
    rpn_rules,
)
from eqvision.pretrained.rules import Rule

# Names of 2019 -> today's
RENAMED = (
    (re.compile(r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$"), r"\1.0.\2"),
    (re.compile(r"^rpn\.head\.conv\.(weight|bias)$"), r"rpn.head.conv.0.0.\1"),
    (
        re.compile(r"^roi_heads\.mask_head\.mask_fcn(\d+)\.(weight|bias)$"),
        lambda found: f"roi_heads.mask_head.{int(found[1]) - 1}.0.{found[2]}",
    ),
)


def rules(model: RCNN) -> tuple[Rule, ...]:
    """``backbone.body``, ``backbone.fpn``, ``rpn.head`` and ``roi_heads``, by today's names."""
    assert isinstance(model.backbone, ResNet)
    assert isinstance(model.neck, FPN)
    table = backbone_rules(model.backbone, "backbone.body")
    for ours, theirs, parts in (
        ("laterals", "inner_blocks", model.neck.laterals),
        ("outputs", "layer_blocks", model.neck.outputs),
    ):
        for i, part in enumerate(parts):
            table += normed(f"neck.{ours}.{i}", part, *_pair(f"backbone.fpn.{theirs}", i))
    rpn = tuple(_pair("rpn.head.conv", i) for i in range(len(model.rpn.convs)))
    table += rpn_rules(model, rpn, "rpn.head.cls_logits", "rpn.head.bbox_pred")
    return (*table, *_boxes(model), *_masks(model))


def _boxes(model: RCNN) -> list[Rule]:
    head, box = model.box_heads[0], "roi_heads.box_head"
    convs = tuple(_pair(box, i) for i in range(len(head.convs)))
    # v2: one list of convolutions, flattening, and linear layers with their activations between
    linears = (f"{box}.fc6", f"{box}.fc7")
    if convs:
        linears = tuple(f"{box}.{len(convs) + 1 + 2 * i}" for i in range(len(head.layers)))
    predictor = "roi_heads.box_predictor"
    names = HeadNames(convs, linears, logits=f"{predictor}.cls_score", deltas=f"{predictor}.bbox_pred")
    return box_rules("box_heads.0", head, names)


def _masks(model: RCNN) -> list[Rule]:
    head, predictor = model.mask_head, "roi_heads.mask_predictor"
    if head is None:
        return []
    convs = tuple(_pair("roi_heads.mask_head", i) for i in range(len(head.convs)))
    names = HeadNames(convs, upsample=f"{predictor}.conv5_mask", logits=f"{predictor}.mask_fcn_logits")
    return mask_rules(head, names)


def _pair(module: str, number: int) -> tuple[str, str]:
    """A convolution and its norm in a list of modules."""
    return f"{module}.{number}.0", f"{module}.{number}.1"


def renamed(model: RCNN, tensors: Mapping[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    """Tensors by today's names."""
    del model, where
    return {_today(name): tensor for name, tensor in tensors.items()}


def _today(name: str) -> str:
    for pattern, replacement in RENAMED:
        name = pattern.sub(replacement, name)
    return name


def fits(model: RCNN) -> bool:
    """One box head, with or without convolutions, that tells classes and boxes apart."""
    linears = 1 if model.box_heads[0].convs else 2
    return on_resnet(model) and len(model.stages) == 1 and len(model.box_heads[0].layers) == linears


LAYOUT = Layout(
    name="torchvision_rcnn",
    source="torchvision Faster and Mask R-CNN",
    kind=RCNN,
    fits=fits,
    rules=rules,
    marks=(
        "backbone.body.conv1.weight",
        "backbone.fpn.inner_blocks.0.*",
        "rpn.head.cls_logits.weight",
        "roi_heads.box_predictor.cls_score.weight",
    ),
    unlike=("roi_heads.keypoint_head.*",),
    ignored=("*.num_batches_tracked",),
    prepare=renamed,
    first_conv="backbone.stem.conv.weight",
    classes="box_heads.0.logits.bias",
    class_layers=CLASS_LAYERS,
    computes=lambda model: model.dialect.name == "torchvision",
    no_object=1,
)
