"""Names of mmdet's R-CNNs on ResNets, from version 2 on, which visdet's are too; under ``state_dict``.

Class columns have the background last. Files in the "caffe" style have the same names and read BGR with the stride in
the first convolution: nothing in them tells, so they would load and give wrong objects. mmdet's cascades with masks
have a mask head for every stage, and average their masks; models here have one, so only those of boxes are read.
"""

from collections.abc import Mapping

import numpy as np

from eqvision.backbones import ResNet
from eqvision.detectors import RCNN
from eqvision.necks import FPN
from eqvision.pretrained.errors import WeightsError
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts.detr_blocks import backbone_rules
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


def rules(model: RCNN) -> tuple[Rule, ...]:
    """``backbone``, ``neck``, ``rpn_head`` and ``roi_head``."""
    assert isinstance(model.backbone, ResNet)
    assert isinstance(model.neck, FPN)
    table = backbone_rules(model.backbone, "backbone")
    for ours, theirs, parts in (
        ("laterals", "lateral_convs", model.neck.laterals),
        ("outputs", "fpn_convs", model.neck.outputs),
    ):
        for i, part in enumerate(parts):
            name = f"neck.{theirs}.{i}"
            table += normed(f"neck.{ours}.{i}", part, f"{name}.conv", f"{name}.bn")
    table += rpn_rules(model, (("rpn_head.rpn_conv", ""),), "rpn_head.rpn_cls", "rpn_head.rpn_reg")
    for stage, head in enumerate(model.box_heads):
        box = "roi_head.bbox_head" + (f".{stage}" if len(model.box_heads) > 1 else "")
        linears = tuple(f"{box}.shared_fcs.{i}" for i in range(len(head.layers)))
        names = HeadNames((), linears, logits=f"{box}.fc_cls", deltas=f"{box}.fc_reg")
        table += box_rules(f"box_heads.{stage}", head, names)
    return (*table, *_masks(model))


def _masks(model: RCNN) -> list[Rule]:
    head, mask = model.mask_head, "roi_head.mask_head"
    if head is None:
        return []
    convs = tuple((f"{mask}.convs.{i}.conv", f"{mask}.convs.{i}.bn") for i in range(len(head.convs)))
    return mask_rules(head, HeadNames(convs, upsample=f"{mask}.upsample", logits=f"{mask}.conv_logits"))


def refuse_several_mask_heads(model: RCNN, tensors: Mapping[str, np.ndarray], where: str) -> Mapping[str, np.ndarray]:
    """Raises WeightsError for a cascade with masks."""
    if model.mask_head is not None and "roi_head.mask_head.0.conv_logits.weight" in tensors:
        raise WeightsError(
            f"{where} has a mask head for every stage of its cascade, and averages their masks; models here have one, "
            "as detectron2's have. Take detectron2's cascade, or mmdet's without masks (cascade_rcnn_r50_fpn)"
        )
    return tensors


LAYOUT = Layout(
    name="mmdet_rcnn",
    source="mmdet and visdet Faster, Mask and Cascade R-CNN",
    kind=RCNN,
    fits=lambda model: on_resnet(model) and is_plain(model) and len(model.rpn.convs) == 1,
    rules=rules,
    marks=(
        "backbone.layer1.0.conv1.weight",
        "neck.lateral_convs.0.conv.weight",
        "rpn_head.rpn_conv.weight",
        "roi_head.bbox_head.*fc_cls.weight",
    ),
    ignored=("*.num_batches_tracked",),
    options={"dialect": "mmdet"},
    prepare=refuse_several_mask_heads,
    first_conv="backbone.stem.conv.weight",
    classes="box_heads.0.logits.bias",
    class_layers=CLASS_LAYERS,
    computes=lambda model: model.dialect.name == "mmdet" and (model.mask_head is None or len(model.stages) == 1),
    no_object=1,
)
