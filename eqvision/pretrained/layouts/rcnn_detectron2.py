"""Names of detectron2's R-CNNs on ResNets, whose ``.pkl`` files hold numpy arrays under ``model``.

Their first convolution reads BGR, and ours RGB: its input channels are turned round. In the order RGB the mean that is
subtracted is (123.675, 116.28, 103.53) of 0..255, and nothing is divided. Class columns have the background last.

Files with ``matching_heuristics`` (of other libraries' weights) leave out what stands before their names;
``full_names`` finds it, as detectron2 does: a name of the model's that ends in the file's is meant, the longest of
several. Files of backbones alone are for training, and lack the heads here.
"""

import collections
from collections.abc import Mapping

import numpy as np

from eqvision.backbones import ResNet
from eqvision.detectors import RCNN
from eqvision.layers import FrozenBatchNorm
from eqvision.necks import FPN
from eqvision.pretrained.errors import WeightsError, listed
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts.centernet import BGR
from eqvision.pretrained.layouts.detr_blocks import conv_norm
from eqvision.pretrained.layouts.rcnn_blocks import (
    CLASS_LAYERS,
    HeadNames,
    box_rules,
    is_plain,
    mask_rules,
    normed,
    on_resnet,
    rpn_rules,
)
from eqvision.pretrained.rules import Rule

BODY = "backbone.bottom_up"


def rules(model: RCNN) -> tuple[Rule, ...]:
    """``backbone``, ``proposal_generator`` and ``roi_heads``."""
    assert isinstance(model.backbone, ResNet)
    assert isinstance(model.neck, FPN)
    table = resnet_rules(model.backbone)
    for i, (lateral, output) in enumerate(zip(model.neck.laterals, model.neck.outputs, strict=True)):
        for ours, theirs, part in (("laterals", "lateral", lateral), ("outputs", "output", output)):
            name = f"backbone.fpn_{theirs}{i + 2}"
            table += normed(f"neck.{ours}.{i}", part, name, f"{name}.norm")
    return (*table, *proposal_rules(model), *head_rules(model))


def resnet_rules(backbone: ResNet) -> list[Rule]:
    """Norms lie below the names of their convolutions."""
    frozen = isinstance(backbone.stem.norm, FrozenBatchNorm)

    def part(ours: str, theirs: str) -> list[Rule]:
        return conv_norm(f"backbone.{ours}", f"{BODY}.{theirs}", f"{BODY}.{theirs}.norm", frozen)

    table = part("stem", "stem.conv1")
    table[0] = table[0]._replace(op=BGR)
    for s, stage in enumerate(backbone.stages):
        for b, block in enumerate(stage):
            ours, theirs = f"stages.{s}.{b}", f"res{s + 2}.{b}"
            for c in range(len(block.convs)):
                table += part(f"{ours}.convs.{c}", f"{theirs}.conv{c + 1}")
            if block.projection is not None:
                table += part(f"{ours}.projection", f"{theirs}.shortcut")
    return table


def proposal_rules(model: RCNN) -> list[Rule]:
    """A single convolution has no number."""
    rpn = "proposal_generator.rpn_head"
    single = len(model.rpn.convs) == 1
    convs = [f"{rpn}.conv" if single else f"{rpn}.conv.conv{i}" for i in range(len(model.rpn.convs))]
    pairs = tuple((name, f"{name}.norm") for name in convs)
    return rpn_rules(model, pairs, f"{rpn}.objectness_logits", f"{rpn}.anchor_deltas")


def head_rules(model: RCNN) -> list[Rule]:
    """A cascade has a list of box heads and one of predictors."""
    table: list[Rule] = []
    for stage, head in enumerate(model.box_heads):
        number = f".{stage}" if len(model.box_heads) > 1 else ""
        box, predictor = f"roi_heads.box_head{number}", f"roi_heads.box_predictor{number}"
        convs = tuple((f"{box}.conv{i + 1}", f"{box}.conv{i + 1}.norm") for i in range(len(head.convs)))
        linears = tuple(f"{box}.fc{i + 1}" for i in range(len(head.layers)))
        names = HeadNames(convs, linears, logits=f"{predictor}.cls_score", deltas=f"{predictor}.bbox_pred")
        table += box_rules(f"box_heads.{stage}", head, names)
    if model.mask_head is None:
        return table
    mask = "roi_heads.mask_head"
    convs = tuple(
        (f"{mask}.mask_fcn{i + 1}", f"{mask}.mask_fcn{i + 1}.norm") for i in range(len(model.mask_head.convs))
    )
    return table + mask_rules(model.mask_head, HeadNames(convs, upsample=f"{mask}.deconv", logits=f"{mask}.predictor"))


def full_names(model: RCNN, tensors: Mapping[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    """Tensors by the model's names, where the file's are endings of these. Raises WeightsError where a tensor
    fits several parts."""
    wanted = [name for rule in rules(model) for name in rule.their_names]
    return match_endings(wanted, tensors, where)


def match_endings(wanted: list[str], tensors: Mapping[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    """As ``full_names``; ``wanted`` are the names of the model."""
    known, meant = set(wanted), collections.defaultdict(list)
    for name in wanted:
        endings = [name.split(".", i)[i] for i in range(1, name.count(".") + 1)]  # longest first
        found = next((each for each in endings if each in tensors and each not in known), None)
        if found is not None and name not in tensors:
            meant[found].append(name)
    twice = [f"{name}: {', '.join(full)}" for name, full in meant.items() if len(full) > 1]
    if twice:
        raise WeightsError(f"{where}: {len(twice)} names fit several parts of the model:{listed(twice)}")
    return {meant[name][0] if name in meant else name: tensor for name, tensor in tensors.items()}


LAYOUT = Layout(
    name="detectron2_rcnn",
    source="detectron2 Faster, Mask and Cascade R-CNN",
    kind=RCNN,
    fits=lambda model: on_resnet(model) and is_plain(model),
    rules=rules,
    marks=(
        "*res2.0.conv1.norm.weight",
        "*fpn_lateral2.weight",
        "*rpn_head.objectness_logits.weight",
        "*box_predictor.*cls_score.weight",
    ),
    ignored=("*.num_batches_tracked", "pixel_mean", "pixel_std", "*anchor_generator.cell_anchors.*"),
    options={"dialect": "detectron2"},
    prepare=full_names,
    first_conv="backbone.stem.conv.weight",
    classes="box_heads.0.logits.bias",
    class_layers=CLASS_LAYERS,
    computes=lambda model: model.dialect.name == "detectron2",
    no_object=1,
)
