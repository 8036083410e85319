"""transformers' ``UperNetForSemanticSegmentation`` on ResNet, ConvNeXt and Swin.

Names of Swin are those that are published and that ``save_pretrained`` writes, as in ``swin_hf``. transformers shifts
Swin's windows here also where one covers the map, which is so in the last stage of images below 256 pixels with windows
of 7; numbers differ there.
"""

from eqvision.backbones import ConvNeXt, ResNet, SwinTransformer
from eqvision.heads.upernet import UPerNetHead
from eqvision.layers import BatchNorm
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts import convnext_hf, swin_hf
from eqvision.pretrained.layouts.convnext_blocks import convnext_rules
from eqvision.pretrained.layouts.detr_blocks import affine, hf_backbone_rules
from eqvision.pretrained.layouts.resnet_torchvision import conv_norm
from eqvision.pretrained.layouts.segmenter_torchvision import CLASS_LAYERS, pixels
from eqvision.pretrained.layouts.swin_blocks import swin_rules
from eqvision.pretrained.rules import Rule
from eqvision.segmenters import Segmenter


def resnet_rules(model: Segmenter) -> tuple[Rule, ...]:
    assert isinstance(model.backbone, ResNet)
    return (*hf_backbone_rules(model.backbone, "backbone"), *_heads(model))


def convnext_backbone_rules(model: Segmenter) -> tuple[Rule, ...]:
    table = convnext_rules(model, convnext_hf.names("backbone."), grn_axes=(1, 1, 1))
    return (*_without_head(table), *_norms(model), *_heads(model))


def swin_backbone_rules(model: Segmenter) -> tuple[Rule, ...]:
    return (*_without_head(swin_rules(model, swin_hf.names("backbone."))), *_norms(model), *_heads(model))


def _without_head(table: tuple[Rule, ...]) -> list[Rule]:
    return [rule for rule in table if not str(rule.ours).startswith("head.")]


def _norms(model: Segmenter) -> list[Rule]:
    stages = range(len(model.backbone.channels))
    return [rule for i in stages for rule in affine(f"neck.norms.{i}", f"backbone.hidden_states_norms.stage{i + 1}")]


def _heads(model: Segmenter) -> list[Rule]:
    assert isinstance(model.head, UPerNetHead)
    pooling, theirs = model.head.pooling, "decode_head"
    table = []
    for i in range(len(pooling.pools)):
        table += _layer(f"head.pooling.pools.{i}", f"{theirs}.psp_modules.{i}.1")
    table += _layer("head.pooling.join", f"{theirs}.bottleneck")
    for i in range(len(model.head.laterals)):
        table += _layer(f"head.laterals.{i}", f"{theirs}.lateral_convs.{i}")
        table += _layer(f"head.outputs.{i}", f"{theirs}.fpn_convs.{i}")
    table += _layer("head.join", f"{theirs}.fpn_bottleneck") + pixels("head", f"{theirs}.classifier")
    if model.auxiliary:
        table += _layer("auxiliary.0.conv", "auxiliary_head.convs.0")
        table += pixels("auxiliary.0", "auxiliary_head.classifier")
    return table


def _layer(ours: str, theirs: str) -> list[Rule]:
    return conv_norm(ours, f"{theirs}.conv", f"{theirs}.batch_norm")


def _trained(backbone: ResNet) -> bool:
    return isinstance(backbone.stem.norm, BatchNorm) and backbone.strides[-1] == 32


HEAD = ("decode_head.psp_modules.0.1.conv.weight", "decode_head.fpn_bottleneck.conv.weight")
# a model without the second head leaves it unread
IGNORED = ("*.num_batches_tracked", "auxiliary_head.*")

RESNET = Layout(
    name="hf_upernet_resnet",
    source="transformers UperNetForSemanticSegmentation on ResNet",
    kind=Segmenter,
    fits=lambda model: (
        isinstance(model.head, UPerNetHead) and isinstance(model.backbone, ResNet) and _trained(model.backbone)
    ),
    rules=resnet_rules,
    marks=("backbone.embedder.embedder.convolution.weight", *HEAD),
    ignored=IGNORED,
    first_conv="backbone.stem.conv.weight",
    classes="head.pixels.conv.bias",
    class_layers=CLASS_LAYERS,
)
CONVNEXT = Layout(
    name="hf_upernet_convnext",
    source="transformers UperNetForSemanticSegmentation on ConvNeXt",
    kind=Segmenter,
    fits=lambda model: isinstance(model.head, UPerNetHead) and isinstance(model.backbone, ConvNeXt),
    rules=convnext_backbone_rules,
    marks=("backbone.embeddings.patch_embeddings.weight", "backbone.hidden_states_norms.stage1.weight", *HEAD),
    ignored=IGNORED,
    first_conv="backbone.stem.conv.weight",
    classes="head.pixels.conv.bias",
    class_layers=CLASS_LAYERS,
)
SWIN = Layout(
    name="hf_upernet_swin",
    source="transformers UperNetForSemanticSegmentation on Swin",
    kind=Segmenter,
    fits=lambda model: isinstance(model.head, UPerNetHead) and isinstance(model.backbone, SwinTransformer),
    rules=swin_backbone_rules,
    marks=(
        "backbone.embeddings.patch_embeddings.projection.weight",
        "backbone.hidden_states_norms.stage1.weight",
        *HEAD,
    ),
    # of the norm behind the last stage, which these models do not read
    ignored=(*IGNORED, "*.attention.self.relative_position_index", "backbone.layernorm.*", "backbone.swin.layernorm.*"),
    classes="head.pixels.conv.bias",
    class_layers=CLASS_LAYERS,
)
LAYOUTS = (RESNET, CONVNEXT, SWIN)
