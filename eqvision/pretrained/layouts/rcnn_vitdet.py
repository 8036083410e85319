"""Names of detectron2's ViTDet, Mask R-CNN on a plain transformer (projects/ViTDet), as ``.pkl`` under ``model``.

The file's positions have a row for the class token of the pretraining, which nothing reads: it is cut off, and written
as zeros. Images are RGB. Class columns have the background last.
"""

from collections.abc import Mapping

import numpy as np

from eqvision.backbones import VitDet
from eqvision.backbones.vitdet import position_grid
from eqvision.detectors import RCNN
from eqvision.necks import SimplePyramid
from eqvision.necks.simple_pyramid import PyramidLevel
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts.detr_blocks import affine, linear
from eqvision.pretrained.layouts.rcnn_blocks import CLASS_LAYERS, TRANSPOSED, bare_conv, normed
from eqvision.pretrained.layouts.rcnn_detectron2 import head_rules, proposal_rules
from eqvision.pretrained.rules import LINEAR, Rule, elementwise, split

NET = "backbone.net"
GLOBAL_ROWS = "backbone.global_blocks.attention.rows"
BEHIND_CLASS_TOKEN = elementwise(
    lambda x: np.asarray(position_grid(x, class_token=True)),
    lambda x: np.concatenate([np.zeros_like(x[0, :1]), x.reshape(-1, x.shape[2])])[None],
)


def rules(model: RCNN) -> tuple[Rule, ...]:
    """``backbone.net``, ``backbone.simfp_*``, and the heads as detectron2's other R-CNNs have them."""
    assert isinstance(model.backbone, VitDet)
    assert isinstance(model.neck, SimplePyramid)
    table = bare_conv("backbone.patch_embed", f"{NET}.patch_embed.proj")
    table.append(Rule("backbone.position", f"{NET}.pos_embed", BEHIND_CLASS_TOKEN))
    for kind in ("window", "global"):
        numbers = tuple(i for i, step in enumerate(model.backbone.steps) if step == kind)
        if numbers:
            table += _blocks(f"backbone.{kind}_blocks", numbers)
    for i, (level, stride) in enumerate(zip(model.neck.levels, model.neck.strides, strict=False)):
        table += _level(f"neck.levels.{i}", level, f"backbone.simfp_{stride.bit_length() - 1}")
    return (*table, *proposal_rules(model), *head_rules(model))


def _blocks(ours: str, each: tuple[int, ...]) -> list[Rule]:
    """Blocks of one kind, whose numbers in the network are ``each``."""
    theirs = f"{NET}.blocks.{{}}"
    table = affine(f"{ours}.norm1", f"{theirs}.norm1", each) + affine(f"{ours}.norm2", f"{theirs}.norm2", each)
    for kind, op in (("weight", split(3, LINEAR)), ("bias", split(3))):
        parts = tuple(f"{ours}.attention.{name}.{kind}" for name in ("query", "key", "value"))
        table.append(Rule(parts, f"{theirs}.attn.qkv.{kind}", op, each=each))
    table += linear(f"{ours}.attention.out", f"{theirs}.attn.proj", each)
    for name, letter in (("rows", "h"), ("columns", "w")):
        table.append(Rule(f"{ours}.attention.{name}", f"{theirs}.attn.rel_pos_{letter}", each=each))
    for layer in ("mlp.fc1", "mlp.fc2"):
        table += linear(f"{ours}.{layer}", f"{theirs}.{layer}", each)
    return table


def _level(ours: str, level: PyramidLevel, theirs: str) -> list[Rule]:
    """A list of modules, of which activation and pooling have numbers too."""
    table, place = [], 1 if level.halve else 0
    for i in range(len(level.up)):
        table.append(Rule(f"{ours}.up.{i}.weight", f"{theirs}.{place}.weight", TRANSPOSED))
        table.append(Rule(f"{ours}.up.{i}.bias", f"{theirs}.{place}.bias"))
        place += 1
        if not i and level.up_norm is not None:
            table += affine(f"{ours}.up_norm", f"{theirs}.{place}")
            place += 2
    for i, (name, part) in enumerate((("reduce", level.reduce), ("output", level.output))):
        table += normed(f"{ours}.{name}", part, f"{theirs}.{place + i}", f"{theirs}.{place + i}.norm")
    return table


def image_size(leaves: Mapping[str, np.ndarray], patch: int) -> tuple[int, int] | None:
    """What the tables of the blocks without windows are for: 2 n - 1 distances in n rows."""
    if GLOBAL_ROWS not in leaves:
        return None
    rows, columns = (leaves[name].shape[1] for name in (GLOBAL_ROWS, GLOBAL_ROWS.replace("rows", "columns")))
    return (rows + 1) // 2 * patch, (columns + 1) // 2 * patch


def fits(model: RCNN) -> bool:
    """Windows and global blocks with positions, as published, and the pyramid with P6 by pooling."""
    backbone, neck = model.backbone, model.neck
    if not isinstance(backbone, VitDet) or not isinstance(neck, SimplePyramid):
        return False
    blocks = [each for each in (backbone.window_blocks, backbone.global_blocks) if each is not None]
    whole = backbone.position is not None and all(each.attention.rows is not None for each in blocks)
    return whole and backbone.residuals is None and neck.extra is None


LAYOUT = Layout(
    name="detectron2_vitdet",
    source="detectron2 ViTDet",
    kind=RCNN,
    fits=fits,
    rules=rules,
    marks=(
        f"{NET}.blocks.0.attn.rel_pos_h",
        "backbone.simfp_2.0.weight",
        "proposal_generator.rpn_head.objectness_logits.weight",
        "roi_heads.box_predictor.*cls_score.weight",
    ),
    ignored=("pixel_mean", "pixel_std", "*anchor_generator.cell_anchors.*"),
    positions="",
    image_size=image_size,
    classes="box_heads.0.logits.bias",
    class_layers=CLASS_LAYERS,
    computes=lambda model: model.dialect.name == "detectron2",
    no_object=1,
)
