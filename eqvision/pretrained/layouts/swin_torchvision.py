"""torchvision's Swin: patches, stages and merging in one sequence (torchvision/models/swin_transformer.py).

The index of relative positions is part of these files. It follows from the window: it is checked against ours on the
way in, and written on the way out, since torchvision does not load without it.
"""

import numpy as np

from eqvision.backbones import SwinTransformer
from eqvision.backbones.swin import offset_index
from eqvision.classifiers import Classifier
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts.swin_blocks import SQUARE, SwinNames, is_swin, swin_rules
from eqvision.pretrained.rules import Arrays, Op, Rule, ShapeError

NAMES = SwinNames(
    patch_embed="features.0.0",
    patch_norm="features.0.2",
    block=lambda stage: f"features.{2 * stage + 1}.{{}}",
    merging=lambda stage: f"features.{2 * stage}",
    norm1="norm1",
    qkv=("attn.qkv",),
    out="attn.proj",
    table="attn.relative_position_bias_table",
    norm2="norm2",
    fc1="mlp.0",
    fc2="mlp.3",
    norm="norm",
    head="head",
)


def rules(model: Classifier) -> tuple[Rule, ...]:
    assert isinstance(model.backbone, SwinTransformer)
    return tuple(_with_index(rule) for rule in swin_rules(model, NAMES))


def _with_index(rule: Rule) -> Rule:
    """The rule of a table, with the index beside it."""
    if rule.op is not SQUARE:
        return rule
    (table,) = rule.their_names[:1] if rule.each is None else (rule.theirs,)
    assert isinstance(table, str)
    return rule._replace(theirs=(table, table.replace("_bias_table", "_index")), op=Op(_load, _save))


def _load(theirs: Arrays) -> Arrays:
    table, index = theirs
    (grid,) = SQUARE.load((table,))
    expected = _index(grid.shape[0])
    if index.shape != expected.shape:
        raise ShapeError(index.shape, expected.shape)
    if not np.array_equal(index, expected):
        raise ValueError("the index of relative positions is not that of a square window")
    return (grid,)


def _save(ours: Arrays) -> Arrays:
    return (*SQUARE.save(ours), _index(ours[0].shape[0]))


def _index(side: int) -> np.ndarray:
    return offset_index((side + 1) // 2).reshape(-1).astype(np.int64)


LAYOUT = Layout(
    name="torchvision_swin",
    source="torchvision SwinTransformer",
    fits=is_swin,
    rules=rules,
    marks=("features.0.2.weight", "features.1.0.attn.relative_position_bias_table", "features.2.reduction.weight"),
    options={"window_rule": "torchvision"},
)
