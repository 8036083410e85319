"""torchvision's ConvNeXt, which is V1 (torchvision/models/convnext.py).

Stages and downsampling take turns in one sequence: 0 stem, 1 first stage, 2 downsampling, 3 second stage ...
"""

from eqvision.classifiers import Classifier
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts.convnext_blocks import FIRST_CONV, ConvNeXtNames, convnext_rules, is_v1
from eqvision.pretrained.rules import Rule

NAMES = ConvNeXtNames(
    stem=("features.0.0", "features.0.1"),
    downsample=lambda stage: (f"features.{2 * stage}.1", f"features.{2 * stage}.0"),
    block=lambda stage: f"features.{2 * stage + 1}.{{}}",
    conv="block.0",
    norm="block.2",
    fc1="block.3",
    fc2="block.5",
    scale="layer_scale",
    grn=("", ""),  # torchvision has no V2
    head_norm="classifier.0",
    head="classifier.2",
)


def rules(model: Classifier) -> tuple[Rule, ...]:
    return convnext_rules(model, NAMES, scale_axes=(1, 1))


LAYOUT = Layout(
    name="torchvision_convnext",
    source="torchvision ConvNeXt",
    fits=is_v1,
    rules=rules,
    marks=("features.0.0.weight", "features.1.0.block.0.weight", "features.1.0.layer_scale"),
    first_conv=FIRST_CONV,
)
