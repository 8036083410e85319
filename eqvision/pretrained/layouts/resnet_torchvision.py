"""torchvision's ResNet names, which timm's ResNets share."""

from eqvision.backbones import ResNet
from eqvision.classifiers import Classifier
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.rules import CONV, LINEAR, Rule


def rules(model: Classifier) -> tuple[Rule, ...]:
    backbone = model.backbone
    assert isinstance(backbone, ResNet)
    table = _conv_norm("backbone.stem", "conv1", "bn1")
    for s, stage in enumerate(backbone.stages):
        for b, block in enumerate(stage):
            ours, theirs = f"backbone.stages.{s}.{b}", f"layer{s + 1}.{b}"
            for c in range(len(block.convs)):
                table += _conv_norm(f"{ours}.convs.{c}", f"{theirs}.conv{c + 1}", f"{theirs}.bn{c + 1}")
            if block.projection is not None:
                table += _conv_norm(f"{ours}.projection", f"{theirs}.downsample.0", f"{theirs}.downsample.1")
    table += [Rule("head.linear.weight", "fc.weight", LINEAR), Rule("head.linear.bias", "fc.bias")]
    return tuple(table)


def _conv_norm(ours: str, conv: str, norm: str) -> list[Rule]:
    return [
        Rule(f"{ours}.conv.weight", f"{conv}.weight", CONV),
        Rule(f"{ours}.norm.weight", f"{norm}.weight"),
        Rule(f"{ours}.norm.bias", f"{norm}.bias"),
        Rule(f"stats.{ours}.norm.mean", f"{norm}.running_mean"),
        Rule(f"stats.{ours}.norm.variance", f"{norm}.running_var"),
    ]


LAYOUT = Layout(
    name="torchvision_resnet",
    source="torchvision and timm ResNet",
    fits=lambda model: isinstance(model.backbone, ResNet) and model.backbone.pool_stem,
    rules=rules,
    marks=("conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer4.0.conv2.weight"),
    ignored=("*.num_batches_tracked",),
    first_conv="backbone.stem.conv.weight",
)
