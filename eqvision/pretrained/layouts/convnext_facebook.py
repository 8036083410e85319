"""The authors' ConvNeXt: models/convnext.py of facebookresearch/ConvNeXt, models/convnextv2.py of ConvNeXt-V2."""

from eqvision.classifiers import Classifier
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts.convnext_blocks import FIRST_CONV, ConvNeXtNames, convnext_rules, is_convnext
from eqvision.pretrained.rules import Rule

NAMES = ConvNeXtNames(
    stem=("downsample_layers.0.0", "downsample_layers.0.1"),
    downsample=lambda stage: (f"downsample_layers.{stage}.1", f"downsample_layers.{stage}.0"),
    block=lambda stage: f"stages.{stage}.{{}}",
    conv="dwconv",
    norm="norm",
    fc1="pwconv1",
    fc2="pwconv2",
    scale="gamma",
    grn=("grn.gamma", "grn.beta"),
    head_norm="norm",
    head="head",
)


def rules(model: Classifier) -> tuple[Rule, ...]:
    return convnext_rules(model, NAMES, grn_axes=(1, 1, 1))


LAYOUT = Layout(
    name="facebook_convnext",
    source="facebookresearch/ConvNeXt and ConvNeXt-V2",
    fits=is_convnext,
    rules=rules,
    marks=("downsample_layers.0.0.weight", "stages.0.0.dwconv.weight", "stages.0.0.pwconv1.weight"),
    first_conv=FIRST_CONV,
)
