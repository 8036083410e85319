"""What the layouts of hybrid ViTs share: the ResNet in front, and a transformer's table moved behind it."""

from collections.abc import Callable
from typing import NamedTuple

from eqvision.backbones import HybridViT
from eqvision.backbones.hybrid import PostActivationBlock
from eqvision.classifiers import Classifier
from eqvision.pretrained.rules import Op, Rule

Each = tuple[int, ...] | None
# beginnings of the names of a convolution and of the norm behind it
Pair = tuple[str, str]


class StemNames(NamedTuple):
    """How a code base writes the ResNet."""

    root: Pair
    block: str
    """Beginning of a block's names, with ``{stage}`` and, for the place in it, ``{{}}``, both from ``first`` on."""
    first: int
    convs: tuple[Pair, Pair, Pair]
    projection: Pair
    leaves: tuple[str, str, str]
    """Ends of the names of the kernel and of the norm's scale and shift."""
    conv_op: Op
    norm_op: Op


def is_hybrid(model: Classifier) -> bool:
    """Whether a model is a transformer behind a ResNet."""
    return isinstance(model.backbone, HybridViT)


def stem_rules(model: Classifier, names: StemNames) -> list[Rule]:
    """The root, then stage by stage the first block by itself and the stack of the rest."""
    backbone = model.backbone
    assert isinstance(backbone, HybridViT)
    table = _conv_norm("backbone.stem.root", "", names.root, names, None)
    for s, stage in enumerate(backbone.stem.stages):
        ours, start = f"backbone.stem.stages.{s}", names.block.format(stage=s + names.first)
        assert isinstance(stage.first, PostActivationBlock)
        table += _block(f"{ours}.first", start.format(names.first), stage.first, names, None)
        if stage.rest is not None:
            assert isinstance(stage.rest, PostActivationBlock)
            each = tuple(range(names.first + 1, names.first + stage.depth))
            table += _block(f"{ours}.rest", start, stage.rest, names, each)
    return table


def transformer_rules(model: Classifier, table: Callable[[Classifier], tuple[Rule, ...]]) -> list[Rule]:
    """The rules that ``table`` has for the transformer as a model by itself; ours lies at ``backbone.vit`` here."""
    assert isinstance(model.backbone, HybridViT)
    return [_moved(rule) for rule in table(Classifier(model.backbone.vit, None, model.head))]


def _moved(rule: Rule) -> Rule:
    names = tuple(name.replace("backbone.", "backbone.vit.", 1) for name in rule.our_names)
    return rule._replace(ours=names[0] if isinstance(rule.ours, str) else names)


def _block(ours: str, start: str, block: PostActivationBlock, names: StemNames, each: Each) -> list[Rule]:
    parts = [(f"{ours}.conv{number}", pair) for number, pair in enumerate(names.convs, 1)]
    if block.projection is not None:
        parts.append((f"{ours}.projection", names.projection))
    return [rule for part, pair in parts for rule in _conv_norm(part, start, pair, names, each)]


def _conv_norm(ours: str, start: str, theirs: Pair, names: StemNames, each: Each) -> list[Rule]:
    (conv, norm), (kernel, scale, shift) = theirs, names.leaves
    return [
        Rule(f"{ours}.conv.weight", f"{start}{conv}{kernel}", names.conv_op, each),
        Rule(f"{ours}.norm.weight", f"{start}{norm}{scale}", names.norm_op, each),
        Rule(f"{ours}.norm.bias", f"{start}{norm}{shift}", names.norm_op, each),
    ]
