"""Names of timm's ``resnetv2_*_bit``; its other ResNets v2 have batch norm or a deep stem and are none of these."""

from eqvision.classifiers import Classifier
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts.bit_blocks import MATRIX, TORCH_PARTS, TORCH_PROJECTION, block_rules, is_bit
from eqvision.pretrained.rules import CONV, Rule, chain


def rules(model: Classifier) -> tuple[Rule, ...]:
    """The last layer is a 1x1 convolution."""
    blocks = block_rules(model, lambda s, b: f"stages.{s}.blocks.{b}.", str, TORCH_PARTS, TORCH_PROJECTION)
    return (
        Rule("backbone.stem.weight", "stem.conv.weight", CONV),
        *blocks,
        *(Rule(f"backbone.norm.{leaf}", f"norm.{leaf}") for leaf in ("weight", "bias")),
        Rule("head.linear.weight", "head.fc.weight", chain(CONV, MATRIX)),
        Rule("head.linear.bias", "head.fc.bias"),
    )


LAYOUT = Layout(
    name="timm_bit",
    source="timm ResNetV2 of BiT",
    fits=is_bit,
    rules=rules,
    marks=("stem.conv.weight", "stages.0.blocks.0.norm3.weight", "stages.0.blocks.0.downsample.conv.weight"),
    unlike=("*.running_mean", "stem.norm.*"),
    options={"conv_eps": 1e-8},
    first_conv="backbone.stem.weight",
)
