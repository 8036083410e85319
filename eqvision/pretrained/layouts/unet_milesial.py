"""Names of milesial/Pytorch-UNet's ``.pth`` files, which hold a state dict and, beside it, ``mask_values``."""

from eqvision.backbones.unet import UNetEncoder
from eqvision.layers import BatchNorm
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts.centernet import TRANSPOSED
from eqvision.pretrained.layouts.resnet_torchvision import conv_norm
from eqvision.pretrained.rules import CONV, Rule
from eqvision.segmenters.unet import UNet


def rules(model: UNet) -> tuple[Rule, ...]:
    """``inc``, ``down1`` and on, ``up1`` (the coarsest) and on, ``outc``."""
    table = _double_conv("backbone.levels.0", "inc")
    for i in range(1, len(model.backbone.levels)):
        table += _double_conv(f"backbone.levels.{i}", f"down{i}.maxpool_conv.1")
    for i, level in enumerate(reversed(model.neck.levels), 1):
        ours = f"neck.levels.{len(model.neck.levels) - i}"
        if level.up is not None:
            table.append(Rule(f"{ours}.up.weight", f"up{i}.up.weight", TRANSPOSED))
            table.append(Rule(f"{ours}.up.bias", f"up{i}.up.bias"))
        table += _double_conv(f"{ours}.convs", f"up{i}.conv")
    head = [Rule("head.conv.weight", "outc.conv.weight", CONV), Rule("head.conv.bias", "outc.conv.bias")]
    return (*table, *head)


def _double_conv(ours: str, theirs: str) -> list[Rule]:
    table = []
    for i, (conv, norm) in enumerate(((0, 1), (3, 4))):
        names = (f"{theirs}.double_conv.{conv}", f"{theirs}.double_conv.{norm}")
        table += [rule._replace(ours=_of_pair(str(rule.ours), ours, i)) for rule in conv_norm("pair", *names)]
    return table


def _of_pair(name: str, ours: str, i: int) -> str:
    """Ours are two lists beside each other, of convolutions and of norms."""
    return name.replace("pair.conv", f"{ours}.convs.{i}").replace("pair.norm", f"{ours}.norms.{i}")


def _fits(model: UNet) -> bool:
    backbone = model.backbone
    assert isinstance(backbone, UNetEncoder)
    return backbone.border == "same" and backbone.strides[0] == 1 and isinstance(backbone.levels[0].norms[0], BatchNorm)


LAYOUT = Layout(
    name="milesial_unet",
    source="milesial/Pytorch-UNet",
    kind=UNet,
    fits=_fits,
    rules=rules,
    marks=("inc.double_conv.0.weight", "down1.maxpool_conv.1.double_conv.0.weight", "outc.conv.weight"),
    ignored=("*.num_batches_tracked", "mask_values"),
    first_conv="backbone.levels.0.convs.0.weight",
    classes="head.conv.bias",
)
