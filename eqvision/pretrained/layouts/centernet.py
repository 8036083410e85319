"""Names of xingyizhou/CenterNet's ``.pth`` files of object detection, which hold the model under ``state_dict``.

Their first convolution reads BGR, and ours RGB: its input channels are turned round. In the order RGB, the mean that
is subtracted is (0.4703, 0.4472, 0.4079), and the deviation (0.2781, 0.2741, 0.2886).
"""

from typing import Any

from eqvision.backbones import DLA, ResNet, StackedHourglass
from eqvision.backbones.dla import Leaf, Tree
from eqvision.backbones.hourglass import Blocks, Hourglass
from eqvision.detectors import CenterNet
from eqvision.layers import DeformConv, FrozenBatchNorm
from eqvision.necks import ConvBlock, DeconvUp, DLAUp
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts.detr_blocks import backbone_rules, conv_norm
from eqvision.pretrained.rules import CONV, SAME, Op, Rule, chain, elementwise

BGR = chain(CONV, elementwise(lambda x: x[:, :, ::-1], lambda x: x[:, :, ::-1]))
# torch's transposed convolution without groups: (in, out, height, width)
TRANSPOSED = elementwise(lambda x: x.transpose(2, 3, 0, 1), lambda x: x.transpose(2, 3, 0, 1))
ONE_STACK = elementwise(lambda x: x[None], lambda x: x[0])
BRANCHES = {"heatmap": "hm", "size": "wh", "offset": "reg"}


def resnet_rules(model: CenterNet) -> tuple[Rule, ...]:
    """torchvision's names, ``deconv_layers`` counted through, and the head."""
    backbone, neck = model.backbone, model.neck
    assert isinstance(backbone, ResNet)
    assert isinstance(neck, DeconvUp)
    frozen = isinstance(backbone.stem.norm, FrozenBatchNorm)
    # their names have no prefix, and so no dot in front
    table = [rule._replace(theirs=str(rule.theirs).removeprefix(".")) for rule in backbone_rules(backbone, "")]
    for i, level in enumerate(neck.levels):
        ours, theirs = f"neck.levels.{i}", [f"deconv_layers.{6 * i + j}" for j in range(6)]
        table += _block(f"{ours}.block", level.block, theirs[0], theirs[1])
        table.append(Rule(f"{ours}.up.weight", f"{theirs[3]}.weight", TRANSPOSED))
        table += conv_norm(ours, "", theirs[4], frozen)[1:]
    return (*_from_bgr(table, "backbone.stem"), *_head())


def dla_rules(model: CenterNet) -> tuple[Rule, ...]:
    """``base``, ``dla_up``, ``ida_up`` and the head."""
    backbone, neck = model.backbone, model.neck
    assert isinstance(backbone, DLA)
    assert isinstance(neck, DLAUp)
    frozen = isinstance(backbone.base.norm, FrozenBatchNorm)
    table = conv_norm("backbone.base", "base.base_layer.0", "base.base_layer.1", frozen)
    for i, convs in enumerate(backbone.convs):
        for j in range(len(convs)):
            theirs = f"base.level{i}"
            table += conv_norm(f"backbone.convs.{i}.{j}", f"{theirs}.{3 * j}", f"{theirs}.{3 * j + 1}", frozen)
    for i, tree in enumerate(backbone.trees):
        table += _tree(f"backbone.trees.{i}", tree, f"base.level{i + 2}", frozen)
    joins = {f"neck.rounds.{i}": (f"dla_up.ida_{i}", each) for i, each in enumerate(neck.rounds)}
    for ours, (theirs, each) in {**joins, "neck.last": ("ida_up", neck.last)}.items():
        for j, join in enumerate(each):
            for part, block, name in (("project", join.project, "proj"), ("node", join.node, "node")):
                names = [f"{theirs}.{name}_{j + 1}.{end}" for end in ("conv", "actf.0")]
                table += _block(f"{ours}.{j}.{part}", block, *names)
            table.append(Rule(f"{ours}.{j}.up.weight", f"{theirs}.up_{j + 1}.weight", CONV))
    return (*_from_bgr(table, "backbone.base"), *_head())


def hourglass_rules(model: CenterNet) -> tuple[Rule, ...]:
    """``pre``, then a list over the stacks for each part."""
    backbone = model.backbone
    assert isinstance(backbone, StackedHourglass)
    frozen = isinstance(backbone.stem.norm, FrozenBatchNorm)
    table = conv_norm("backbone.stem", "pre.0.conv", "pre.0.bn", frozen)
    table += _residual("backbone.stem_block", "pre.1", True, frozen)
    for i, hourglass in enumerate(backbone.hourglasses):
        table += _hourglass(f"backbone.hourglasses.{i}", hourglass, f"kps.{i}", frozen)
        table += conv_norm(f"backbone.outputs.{i}", f"cnvs.{i}.conv", f"cnvs.{i}.bn", frozen)
    for i in range(len(backbone.links)):
        for part, theirs in (("before", f"inters_.{i}"), ("after", f"cnvs_.{i}")):
            table += conv_norm(f"backbone.links.{i}.{part}", f"{theirs}.0", f"{theirs}.1", frozen)
        table += _residual(f"backbone.links.{i}.block", f"inters.{i}", False, frozen)
    return (*_from_bgr(table, "backbone.stem"), *_stacked_head(model.head.stacks))


def _from_bgr(table: list[Rule], stem: str) -> list[Rule]:
    return [rule._replace(op=BGR) if rule.ours == f"{stem}.conv.weight" else rule for rule in table]


def _block(ours: str, block: ConvBlock, conv: str, norm: str) -> list[Rule]:
    """A deformable convolution, and the batch norm behind it."""
    table = conv_norm(ours, conv, norm, isinstance(block.norm, FrozenBatchNorm))
    guide = "conv_offset_mask"
    return [
        *table,
        Rule(f"{ours}.conv.bias", f"{conv}.bias"),
        Rule(f"{ours}.conv.{guide}.weight", f"{conv}.{guide}.weight", CONV),
        Rule(f"{ours}.conv.{guide}.bias", f"{conv}.{guide}.bias"),
    ]


def _tree(ours: str, tree: Tree | Leaf, theirs: str, frozen: bool) -> list[Rule]:
    if isinstance(tree, Tree):
        subtrees = (("tree1", tree.tree1), ("tree2", tree.tree2))
        return [rule for name, each in subtrees for rule in _tree(f"{ours}.{name}", each, f"{theirs}.{name}", frozen)]
    table = conv_norm(f"{ours}.root", f"{theirs}.root.conv", f"{theirs}.root.bn", frozen)
    for i in (1, 2):
        for j in (1, 2):
            block = f"{theirs}.tree{i}"
            table += conv_norm(f"{ours}.block{i}.conv{j}", f"{block}.conv{j}", f"{block}.bn{j}", frozen)
    if tree.projection is not None:
        table += conv_norm(f"{ours}.projection", f"{theirs}.project.0", f"{theirs}.project.1", frozen)
    return table


def _hourglass(ours: str, hourglass: Hourglass, theirs: str, frozen: bool) -> list[Rule]:
    table = _residuals(f"{ours}.up", hourglass.up, f"{theirs}.up1", frozen)
    table += _residuals(f"{ours}.down", hourglass.down, f"{theirs}.low1", frozen)
    table += _residuals(f"{ours}.back", hourglass.back, f"{theirs}.low3", frozen)
    ours, theirs, inner = f"{ours}.inner", f"{theirs}.low2", hourglass.inner
    if isinstance(inner, Hourglass):
        return table + _hourglass(ours, inner, theirs, frozen)
    return table + _residuals(ours, inner, theirs, frozen)


def _residuals(ours: str, blocks: Blocks, theirs: str, frozen: bool) -> list[Rule]:
    each = ((f"{ours}.{i}", f"{theirs}.{i}", block.projection is not None) for i, block in enumerate(blocks))
    return [rule for names in each for rule in _residual(*names, frozen)]


def _residual(ours: str, theirs: str, projects: bool, frozen: bool) -> list[Rule]:
    table = [
        rule
        for i in (1, 2)
        for rule in conv_norm(f"{ours}.convs.{i - 1}", f"{theirs}.conv{i}", f"{theirs}.bn{i}", frozen)
    ]
    skip = conv_norm(f"{ours}.projection", f"{theirs}.skip.0", f"{theirs}.skip.1", frozen)
    return table + skip if projects else table


def _head() -> list[Rule]:
    """Of one stack, whose axis the file has not."""

    def part(ours: str, theirs: str, op: Op) -> Rule:
        return Rule(ours, theirs, chain(op, ONE_STACK))

    return [
        part(f"head.{ours}.{layer}.{kind}", f"{theirs}.{number}.{kind}", op)
        for ours, theirs in BRANCHES.items()
        for layer, number in (("conv", 0), ("out", 2))
        for kind, op in (("weight", CONV), ("bias", SAME))
    ]


def _stacked_head(stacks: int) -> list[Rule]:
    return [
        Rule(f"head.{ours}.{layer}.{kind}", f"{theirs}.{{}}.{name}.{kind}", op, each=tuple(range(stacks)))
        for ours, theirs in BRANCHES.items()
        for layer, name in (("conv", "0.conv"), ("out", "1"))
        for kind, op in (("weight", CONV), ("bias", SAME))
    ]


def _is_deformable(model: Any, neck: type) -> bool:
    """Whether the neck is such a one with deformable convolutions, as in all published files."""
    if not isinstance(model.neck, neck):
        return False
    block = model.neck.levels[0].block if neck is DeconvUp else model.neck.last[0].node
    return isinstance(block.conv, DeformConv)


RESNET = Layout(
    name="centernet_resnet",
    source="xingyizhou/CenterNet on ResNets",
    kind=CenterNet,
    fits=lambda model: isinstance(model.backbone, ResNet) and _is_deformable(model, DeconvUp),
    rules=resnet_rules,
    marks=("conv1.weight", "deconv_layers.0.conv_offset_mask.weight", "hm.2.weight", "wh.2.weight"),
    ignored=("*.num_batches_tracked",),
    first_conv="backbone.stem.conv.weight",
    classes="head.heatmap.out.bias",
)
DLA34 = Layout(
    name="centernet_dla",
    source="xingyizhou/CenterNet on DLA",
    kind=CenterNet,
    fits=lambda model: isinstance(model.backbone, DLA) and _is_deformable(model, DLAUp),
    rules=dla_rules,
    marks=(
        "base.base_layer.0.weight",
        "dla_up.ida_0.proj_1.conv.conv_offset_mask.weight",
        "hm.2.weight",
        "wh.2.weight",
    ),
    # ImageNet's classifier, and projections of trees whose result nothing reads
    ignored=("*.num_batches_tracked", "base.fc.*", "base.level[34].project.*"),
    first_conv="backbone.base.conv.weight",
    classes="head.heatmap.out.bias",
)
HOURGLASS = Layout(
    name="centernet_hourglass",
    source="xingyizhou/CenterNet on Hourglass",
    kind=CenterNet,
    fits=lambda model: isinstance(model.backbone, StackedHourglass),
    rules=hourglass_rules,
    marks=("pre.0.conv.weight", "kps.0.up1.0.conv1.weight", "hm.0.1.weight", "wh.0.1.weight"),
    ignored=("*.num_batches_tracked",),
    first_conv="backbone.stem.conv.weight",
    classes="head.heatmap.out.bias",
)
LAYOUTS = (RESNET, DLA34, HOURGLASS)
