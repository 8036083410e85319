"""timm's ConvNeXt, V1 and V2 (timm/models/convnext.py).

timm has the MLP of its models narrower than ``tiny`` as 1x1 convolutions, and of the others as matrices.
"""

from eqvision.classifiers import Classifier
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts.convnext_blocks import FIRST_CONV, ConvNeXtNames, convnext_rules, is_convnext
from eqvision.pretrained.rules import Op, Rule, elementwise

NARROWEST_WITH_MATRICES = 96  # channels of the first stage

NAMES = ConvNeXtNames(
    stem=("stem.0", "stem.1"),
    downsample=lambda stage: (f"stages.{stage}.downsample.1", f"stages.{stage}.downsample.0"),
    block=lambda stage: f"stages.{stage}.blocks.{{}}",
    conv="conv_dw",
    norm="norm",
    fc1="mlp.fc1",
    fc2="mlp.fc2",
    scale="gamma",
    grn=("mlp.grn.weight", "mlp.grn.bias"),
    head_norm="head.norm",
    head="head.fc",
)


def pointwise(window: bool) -> Op:
    """Reads (out, in) and (out, in, 1, 1), of which it writes the latter if there is a ``window``."""
    end = (1, 1) if window else ()
    return elementwise(lambda x: x.reshape(x.shape[:2]).T, lambda x: x.T.reshape(*x.shape[::-1], *end))


def rules(model: Classifier) -> tuple[Rule, ...]:
    narrow = model.backbone.channels[0] < NARROWEST_WITH_MATRICES
    return convnext_rules(model, NAMES, linear=pointwise(narrow))


LAYOUT = Layout(
    name="timm_convnext",
    source="timm ConvNeXt",
    fits=is_convnext,
    rules=rules,
    marks=("stem.0.weight", "stages.0.blocks.0.conv_dw.weight", "stages.0.blocks.0.mlp.fc1.weight"),
    first_conv=FIRST_CONV,
)
