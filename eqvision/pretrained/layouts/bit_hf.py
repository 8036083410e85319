"""Names of transformers' ``BitForImageClassification``."""

from collections.abc import Mapping
from typing import Any

from eqvision.classifiers import Classifier
from eqvision.pretrained.config import check_config
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts.bit_blocks import TORCH_PARTS, TORCH_PROJECTION, block_rules, is_bit
from eqvision.pretrained.rules import CONV, LINEAR, Rule


def rules(model: Classifier) -> tuple[Rule, ...]:
    """The last layer is linear, after ``classifier.0``, which flattens."""
    blocks = block_rules(model, lambda s, b: f"bit.encoder.stages.{s}.layers.{b}.", str, TORCH_PARTS, TORCH_PROJECTION)
    return (
        Rule("backbone.stem.weight", "bit.embedder.convolution.weight", CONV),
        *blocks,
        *(Rule(f"backbone.norm.{leaf}", f"bit.norm.{leaf}") for leaf in ("weight", "bias")),
        Rule("head.linear.weight", "classifier.1.weight", LINEAR),
        Rule("head.linear.bias", "classifier.1.bias"),
    )


def from_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Raises WeightsError where padding, groups or stride are not ours; the names do not tell."""
    expected = {
        "layer_type": "preactivation",
        "hidden_act": "relu",
        "global_padding": None,
        "embedding_dynamic_padding": False,
        "num_groups": 32,
        "output_stride": 32,
    }
    check_config(config, expected, "BiT")
    return {}


LAYOUT = Layout(
    name="hf_bit",
    source="transformers BitForImageClassification",
    fits=is_bit,
    rules=rules,
    marks=("bit.embedder.convolution.weight", "bit.encoder.stages.0.layers.0.downsample.conv.weight"),
    unlike=("bit.embedder.norm.*",),
    options={"conv_eps": 1e-8},
    from_config=from_config,
    first_conv="backbone.stem.weight",
)
