"""What all layouts of Swin share: the order of the parts, and tables of relative position biases as files hold them."""

import math
from collections.abc import Callable
from typing import NamedTuple

from eqvision.backbones import SwinTransformer
from eqvision.classifiers import Classifier
from eqvision.models import Model
from eqvision.pretrained.resample import relative_bias, relative_bias_bicubic
from eqvision.pretrained.rules import CONV, LINEAR, SAME, Arrays, Op, Rule, ShapeError, split

ATTENTION = tuple(f"attention.{part}" for part in ("query", "key", "value"))
TABLES = "backbone.stages.*.blocks.relative_bias"


class SwinNames(NamedTuple):
    """A layout's names: of ``block`` and ``merging`` by stage (``{}`` for the block's number), of the parts in a block.

    ``qkv`` is one fused layer, or three.
    """

    patch_embed: str
    patch_norm: str
    block: Callable[[int], str]
    merging: Callable[[int], str]
    norm1: str
    qkv: tuple[str, ...]
    out: str
    table: str
    norm2: str
    fc1: str
    fc2: str
    norm: str
    head: str


def swin_rules(model: Model, names: SwinNames) -> tuple[Rule, ...]:
    backbone = model.backbone
    assert isinstance(backbone, SwinTransformer)
    table = [
        Rule("backbone.patch_embed.weight", f"{names.patch_embed}.weight", CONV),
        Rule("backbone.patch_embed.bias", f"{names.patch_embed}.bias"),
        *_norm("backbone.norm", names.patch_norm),
    ]
    for s, stage in enumerate(backbone.stages):
        if stage.merge is not None:
            table += _norm(f"backbone.stages.{s}.merge.norm", f"{names.merging(s)}.norm")
            reduction = f"{names.merging(s)}.reduction.weight"
            table.append(Rule(f"backbone.stages.{s}.merge.reduction.weight", reduction, LINEAR))
        places = tuple(range(len(stage.drop_path)))
        table += _block(f"backbone.stages.{s}.blocks", names.block(s), names, places)
    return (*table, *_norm("head.norm", names.norm), *_linear("head.linear", names.head))


def _block(ours: str, theirs: str, names: SwinNames, places: tuple[int, ...]) -> list[Rule]:
    queries = [f"{ours}.{part}" for part in ATTENTION]
    fused = len(names.qkv) == 1
    weight, bias = (split(3, LINEAR), split(3)) if fused else (LINEAR, SAME)
    return [
        *_norm(f"{ours}.norm1", f"{theirs}.{names.norm1}", places),
        Rule(_leaf(queries, "weight"), _leaf([f"{theirs}.{name}" for name in names.qkv], "weight"), weight, places),
        Rule(_leaf(queries, "bias"), _leaf([f"{theirs}.{name}" for name in names.qkv], "bias"), bias, places),
        *_linear(f"{ours}.attention.out", f"{theirs}.{names.out}", places),
        Rule(f"{ours}.relative_bias", f"{theirs}.{names.table}", SQUARE, places),
        *_norm(f"{ours}.norm2", f"{theirs}.{names.norm2}", places),
        *_linear(f"{ours}.mlp.fc1", f"{theirs}.{names.fc1}", places),
        *_linear(f"{ours}.mlp.fc2", f"{theirs}.{names.fc2}", places),
    ]


def _leaf(layers: list[str], leaf: str) -> tuple[str, ...]:
    return tuple(f"{layer}.{leaf}" for layer in layers)


def _norm(ours: str, theirs: str, places: tuple[int, ...] | None = None) -> list[Rule]:
    return [Rule(f"{ours}.{leaf}", f"{theirs}.{leaf}", SAME, places) for leaf in ("weight", "bias")]


def _linear(ours: str, theirs: str, places: tuple[int, ...] | None = None) -> list[Rule]:
    weight = Rule(f"{ours}.weight", f"{theirs}.weight", LINEAR, places)
    return [weight, Rule(f"{ours}.bias", f"{theirs}.bias", SAME, places)]


def _to_grid(theirs: Arrays) -> Arrays:
    """((2 w - 1)^2, heads) -> (2 w - 1, 2 w - 1, heads)."""
    table = theirs[0]
    side = math.isqrt(table.shape[0])
    if table.ndim != 2 or side * side != len(table) or side % 2 == 0:
        raise ShapeError(table.shape, ((side | 1) ** 2, *table.shape[1:]))
    return (table.reshape(side, side, -1),)


SQUARE = Op(_to_grid, lambda ours: (ours[0].reshape(-1, ours[0].shape[-1]),))


def is_swin(model: Classifier) -> bool:
    return isinstance(model.backbone, SwinTransformer)


def timm_window(table, grid: tuple[int, int]):
    """timm's way to a table (rows, columns) of another window."""
    return relative_bias(table, _window(grid))


def microsoft_window(table, grid: tuple[int, int]):
    """microsoft/Swin-Transformer's way (utils.py, ``load_pretrained``): bicubic."""
    return relative_bias_bicubic(table, _window(grid))


def _window(grid: tuple[int, int]) -> tuple[int, int]:
    return (grid[0] + 1) // 2, (grid[1] + 1) // 2
