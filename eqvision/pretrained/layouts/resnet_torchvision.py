"""torchvision's ResNet names, which timm's ResNets share."""

from collections.abc import Mapping
from typing import Any

from eqvision.backbones import ResNet
from eqvision.classifiers import Classifier
from eqvision.pretrained.errors import WeightsError
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.rules import CONV, LINEAR, Rule


def rules(model: Classifier) -> tuple[Rule, ...]:
    """The stem, ``layer1`` to ``layer4`` and ``fc``."""
    head = [Rule("head.linear.weight", "fc.weight", LINEAR), Rule("head.linear.bias", "fc.bias")]
    return (*conv_norm("backbone.stem", "conv1", "bn1"), *layers(model), *head)


def layers(model: Classifier) -> list[Rule]:
    """Residual blocks as ``layer1.0.conv1``, ``layer1.0.bn1`` ..., projections as ``downsample``."""
    backbone, table = model.backbone, []
    assert isinstance(backbone, ResNet)
    for s, stage in enumerate(backbone.stages):
        for b, block in enumerate(stage):
            ours, theirs = f"backbone.stages.{s}.{b}", f"layer{s + 1}.{b}"
            for c in range(len(block.convs)):
                table += conv_norm(f"{ours}.convs.{c}", f"{theirs}.conv{c + 1}", f"{theirs}.bn{c + 1}")
            if block.projection is not None:
                table += conv_norm(f"{ours}.projection", f"{theirs}.downsample.0", f"{theirs}.downsample.1")
    return table


def conv_norm(ours: str, conv: str, norm: str) -> list[Rule]:
    """A convolution and its batch norm with running statistics."""
    return [
        Rule(f"{ours}.conv.weight", f"{conv}.weight", CONV),
        Rule(f"{ours}.norm.weight", f"{norm}.weight"),
        Rule(f"{ours}.norm.bias", f"{norm}.bias"),
        Rule(f"stats.{ours}.norm.mean", f"{norm}.running_mean"),
        Rule(f"stats.{ours}.norm.variance", f"{norm}.running_var"),
    ]


def refuse_blurred(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """timm's ``resnetaa*`` and ``resnetblur*`` have a ResNet's names and shapes, and low-pass filters without weights.

    Only the ``architecture`` in timm's config.json tells them apart. Raises WeightsError for them.
    """
    architecture = str(config.get("architecture", ""))
    if architecture.startswith(("resnetaa", "resnetblur")):
        raise WeightsError(
            f"config.json names the architecture {architecture}, a ResNet that filters before it subsamples; "
            "its weights would load into a plain ResNet and give other numbers"
        )
    return {}


LAYOUT = Layout(
    name="torchvision_resnet",
    source="torchvision and timm ResNet",
    fits=lambda model: isinstance(model.backbone, ResNet) and model.backbone.pool_stem,
    rules=rules,
    marks=("conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer4.0.conv2.weight"),
    unlike=("*.shortcut.*",),
    ignored=("*.num_batches_tracked",),
    from_config=refuse_blurred,
    first_conv="backbone.stem.conv.weight",
)
