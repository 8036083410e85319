"""The ``.npz`` files of google-research/big_transfer: BiT-S, BiT-M, their fine-tuned and distilled forms.

Names follow ``load_from`` in its ``bit_pytorch/models.py``; kernels are (height, width, in, out), as ours are. There
and in ``bit_tf2`` and ``bit_jax`` 1e-10 is added to the variance of the weights and 1e-5 to that of the maps, and the
stem's convolution and pooling are padded with zeros by a fixed number of pixels.
"""

from eqvision.classifiers import Classifier
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts.bit_blocks import MATRIX, Part, block_rules, is_bit
from eqvision.pretrained.rules import SAME, Rule

_NORM = (("weight", "gamma"), ("bias", "beta"))
PARTS: tuple[Part, ...] = (
    *((f"norm{i}.{o}", f"{unit}/group_norm/{t}", SAME) for i, unit in enumerate("abc", 1) for o, t in _NORM),
    *((f"conv{i}.weight", f"{unit}/standardized_conv2d/kernel", SAME) for i, unit in enumerate("abc", 1)),
)
PROJECTION: Part = ("projection.weight", "a/proj/standardized_conv2d/kernel", SAME)


def rules(model: Classifier) -> tuple[Rule, ...]:
    """``block1/unit01/a`` is the first norm and convolution of the first block."""
    blocks = block_rules(model, lambda s, unit: f"resnet/block{s + 1}/unit{unit}/", _unit, PARTS, PROJECTION)
    return (
        Rule("backbone.stem.weight", "resnet/root_block/standardized_conv2d/kernel"),
        *blocks,
        *(Rule(f"backbone.norm.{ours}", f"resnet/group_norm/{theirs}") for ours, theirs in _NORM),
        Rule("head.linear.weight", "resnet/head/conv2d/kernel", MATRIX),
        Rule("head.linear.bias", "resnet/head/conv2d/bias"),
    )


def _unit(place: int) -> str:
    return f"{place + 1:02d}"


LAYOUT = Layout(
    name="google_bit",
    source="google-research/big_transfer",
    fits=is_bit,
    rules=rules,
    marks=("resnet/root_block/standardized_conv2d/kernel", "resnet/block1/unit01/a/proj/standardized_conv2d/kernel"),
    options={"conv_eps": 1e-10},
    first_conv="backbone.stem.weight",
)
