"""torchvision's FCN and DeepLabV3 on ResNets: ``backbone``, ``classifier``, and perhaps ``aux_classifier``."""

from eqvision.backbones import ResNet
from eqvision.heads.deeplab import DeepLabV3Head
from eqvision.heads.segmentation import ConvHead
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts.detr_blocks import backbone_rules
from eqvision.pretrained.layouts.resnet_torchvision import conv_norm
from eqvision.pretrained.rules import CONV, Rule
from eqvision.segmenters import Segmenter

CLASS_LAYERS = ("head.pixels.conv.*", "auxiliary.*.pixels.conv.*")


def fcn_rules(model: Segmenter) -> tuple[Rule, ...]:
    """Heads are lists: convolution, norm, ReLU, dropout, convolution."""
    return (*_outer(model), *_fcn_head("head", "classifier"))


def deeplab_rules(model: Segmenter) -> tuple[Rule, ...]:
    """In the list of ASPP the pooled branch has its convolution in second place, behind the pooling."""
    assert isinstance(model.head, DeepLabV3Head)
    aspp, count = "classifier.0", len(model.head.aspp.convs)
    table = _outer(model)
    for i in range(count):
        table += conv_norm(f"head.aspp.convs.{i}", f"{aspp}.convs.{i}.0", f"{aspp}.convs.{i}.1")
    table += conv_norm("head.aspp.pool", f"{aspp}.convs.{count}.1", f"{aspp}.convs.{count}.2")
    table += conv_norm("head.aspp.project", f"{aspp}.project.0", f"{aspp}.project.1")
    table += conv_norm("head.conv", "classifier.1", "classifier.2")
    return (*table, *pixels("head", "classifier.4"))


def _outer(model: Segmenter) -> list[Rule]:
    """The backbone, and the second head where the model has it."""
    assert isinstance(model.backbone, ResNet)
    table = backbone_rules(model.backbone, "backbone")
    return table + (_fcn_head("auxiliary.0", "aux_classifier") if model.auxiliary else [])


def _fcn_head(ours: str, theirs: str) -> list[Rule]:
    return [*conv_norm(f"{ours}.conv", f"{theirs}.0", f"{theirs}.1"), *pixels(ours, f"{theirs}.4")]


def pixels(ours: str, theirs: str) -> list[Rule]:
    """The last convolution of a head."""
    weight = Rule(f"{ours}.pixels.conv.weight", f"{theirs}.weight", CONV)
    return [weight, Rule(f"{ours}.pixels.conv.bias", f"{theirs}.bias")]


def _stride_8(model: Segmenter) -> bool:
    return isinstance(model.backbone, ResNet) and model.backbone.strides[-1] == 8


FCN = Layout(
    name="torchvision_fcn",
    source="torchvision FCN",
    kind=Segmenter,
    fits=lambda model: _stride_8(model) and isinstance(model.head, ConvHead),
    rules=fcn_rules,
    marks=("backbone.conv1.weight", "classifier.0.weight", "classifier.1.running_mean", "classifier.4.weight"),
    # a model without the second head leaves it unread
    ignored=("*.num_batches_tracked", "aux_classifier.*"),
    first_conv="backbone.stem.conv.weight",
    classes="head.pixels.conv.bias",
    class_layers=CLASS_LAYERS,
)
DEEPLAB = Layout(
    name="torchvision_deeplabv3",
    source="torchvision DeepLabV3",
    kind=Segmenter,
    fits=lambda model: _stride_8(model) and isinstance(model.head, DeepLabV3Head),
    rules=deeplab_rules,
    marks=("backbone.conv1.weight", "classifier.0.convs.0.0.weight", "classifier.0.project.0.weight"),
    ignored=FCN.ignored,
    first_conv="backbone.stem.conv.weight",
    classes="head.pixels.conv.bias",
    class_layers=CLASS_LAYERS,
)
LAYOUTS = (FCN, DEEPLAB)
