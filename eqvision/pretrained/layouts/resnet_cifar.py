"""CIFAR ResNets as akamaster/pytorch_resnet_cifar10 publishes them (its ``resnet.py``, option A).

The ``.th`` files hold ``state_dict`` of a ``DataParallel``, whose prefix ``module.`` the file reader takes away.
"""

from eqvision.backbones import ResNet
from eqvision.classifiers import Classifier
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts.resnet_torchvision import conv_norm, layers
from eqvision.pretrained.rules import LINEAR, Rule


def rules(model: Classifier) -> tuple[Rule, ...]:
    """As torchvision names them, but for the last layer, ``linear``."""
    head = [Rule("head.linear.weight", "linear.weight", LINEAR), Rule("head.linear.bias", "linear.bias")]
    return (*conv_norm("backbone.stem", "conv1", "bn1"), *layers(model), *head)


LAYOUT = Layout(
    name="akamaster_resnet_cifar",
    source="akamaster/pytorch_resnet_cifar10",
    fits=lambda model: isinstance(model.backbone, ResNet) and not model.backbone.pool_stem,
    rules=rules,
    marks=("conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer3.0.conv2.weight", "linear.weight"),
    unlike=("layer4.*", "*.shortcut.*"),
    ignored=("*.num_batches_tracked",),
    first_conv="backbone.stem.conv.weight",
)
