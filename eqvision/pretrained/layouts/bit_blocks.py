"""What the layouts of BiT share: blocks stage by stage, and the last convolution that is a matrix."""

from collections.abc import Callable

import numpy as np

from eqvision.backbones.bit import BiT, PreActivationBlock
from eqvision.classifiers import Classifier
from eqvision.pretrained.rules import CONV, SAME, Op, Rule, ShapeError, elementwise

# (leaf of ours below the block, name of theirs below the block, op)
Part = tuple[str, str, Op]

# timm and transformers name the insides of a block alike.
TORCH_PARTS: tuple[Part, ...] = (
    *((f"norm{i}.{leaf}", f"norm{i}.{leaf}", SAME) for i in (1, 2, 3) for leaf in ("weight", "bias")),
    *((f"conv{i}.weight", f"conv{i}.weight", CONV) for i in (1, 2, 3)),
)
TORCH_PROJECTION: Part = ("projection.weight", "downsample.conv.weight", CONV)


def is_bit(model: Classifier) -> bool:
    """Whether a model is a BiT."""
    return isinstance(model.backbone, BiT)


def block_rules(
    model: Classifier,
    block: Callable[[int, str], str],
    places: Callable[[int], str],
    parts: tuple[Part, ...],
    last: Part,
) -> list[Rule]:
    """All blocks: the first of a stage by itself, with its projection ``last``, and the stack of the rest.

    ``block`` gives the beginning of their names from the stage's number and the place of the block in it, and
    ``places`` how they write a place, counted from zero.
    """
    backbone, table = model.backbone, []
    assert isinstance(backbone, BiT)
    for s, stage in enumerate(backbone.stages):
        assert isinstance(stage.first, PreActivationBlock)
        first = parts if stage.first.projection is None else (*parts, last)
        start = block(s, places(0))
        table += [Rule(f"backbone.stages.{s}.first.{ours}", start + theirs, op) for ours, theirs, op in first]
        if stage.rest is not None:
            each, start = tuple(places(i) for i in range(1, stage.depth)), block(s, "{}")
            table += [Rule(f"backbone.stages.{s}.rest.{ours}", start + theirs, op, each) for ours, theirs, op in parts]
    return table


def _matrix(kernel: np.ndarray) -> np.ndarray:
    if kernel.shape[:2] != (1, 1):
        raise ShapeError(kernel.shape, (1, 1, *kernel.shape[-2:]))
    return kernel[0, 0]


# A 1x1 convolution (1, 1, in, out) on the pooled map, against our linear layer (in, out)
MATRIX = elementwise(_matrix, lambda weight: weight[None, None])
