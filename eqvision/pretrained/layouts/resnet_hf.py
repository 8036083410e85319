"""Names of transformers' ``ResNetForImageClassification``."""

from collections.abc import Mapping
from typing import Any

from eqvision.backbones import ResNet
from eqvision.classifiers import Classifier
from eqvision.pretrained.config import check_config
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts.resnet_torchvision import conv_norm
from eqvision.pretrained.rules import LINEAR, Rule


def rules(model: Classifier) -> tuple[Rule, ...]:
    """Every convolution is called ``convolution`` and its norm ``normalization``; ``classifier.0`` flattens."""
    backbone = model.backbone
    assert isinstance(backbone, ResNet)
    table = _conv_norm("backbone.stem", "resnet.embedder.embedder")
    for s, stage in enumerate(backbone.stages):
        for b, block in enumerate(stage):
            ours, theirs = f"backbone.stages.{s}.{b}", f"resnet.encoder.stages.{s}.layers.{b}"
            for c in range(len(block.convs)):
                table += _conv_norm(f"{ours}.convs.{c}", f"{theirs}.layer.{c}")
            if block.projection is not None:
                table += _conv_norm(f"{ours}.projection", f"{theirs}.shortcut")
    head = [Rule("head.linear.weight", "classifier.1.weight", LINEAR), Rule("head.linear.bias", "classifier.1.bias")]
    return (*table, *head)


def _conv_norm(ours: str, theirs: str) -> list[Rule]:
    return conv_norm(ours, f"{theirs}.convolution", f"{theirs}.normalization")


def from_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Raises WeightsError where the stride or the activation is not ours; the names do not tell."""
    expected = {"hidden_act": "relu", "downsample_in_first_stage": False, "downsample_in_bottleneck": False}
    check_config(config, expected, "ResNet")
    return {}


LAYOUT = Layout(
    name="hf_resnet",
    source="transformers ResNetForImageClassification",
    fits=lambda model: isinstance(model.backbone, ResNet) and model.backbone.pool_stem,
    rules=rules,
    marks=(
        "resnet.embedder.embedder.convolution.weight",
        "resnet.encoder.stages.0.layers.0.layer.0.convolution.weight",
    ),
    ignored=("*.num_batches_tracked",),
    from_config=from_config,
    first_conv="backbone.stem.conv.weight",
)
