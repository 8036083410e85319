"""Names of fundamentalvision/Deformable-DETR's ``.pth`` files, which hold the model under ``model``.

There the decoder's ``norm2`` stands behind the self-attention and ``norm1`` behind the attention to the image. Nothing
in a file tells a model with DC5 from one without: it is for the caller to choose the right name.
"""

import numpy as np

from eqvision.backbones import ResNet
from eqvision.detectors import DeformableDETR
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts.deformable_detr_blocks import (
    HeadNames,
    deformable,
    head_rules,
    is_resnet,
    one_name_each,
    outer_rules,
)
from eqvision.pretrained.layouts.detr_blocks import affine, backbone_rules, linear
from eqvision.pretrained.layouts.detr_facebook import fused_attention
from eqvision.pretrained.rules import Rule, Tensors

HEADS = HeadNames("class_embed.{}", "bbox_embed.{}", "transformer.decoder.")


def rules(model: DeformableDETR) -> tuple[Rule, ...]:
    """The backbone by torchvision's names, the transformer, the heads."""
    assert isinstance(model.backbone, ResNet)
    table = backbone_rules(model.backbone, "backbone.0.body")
    table += outer_rules(model, "input_proj", "transformer", "query_embed.weight")
    return (*table, *_encoder(model), *_decoder(model), *head_rules(model, HEADS))


def _encoder(model: DeformableDETR) -> list[Rule]:
    each = tuple(range(model.encoder.depth))
    ours, theirs = "encoder.layers", "transformer.encoder.layers.{}"
    table = deformable(f"{ours}.attention", f"{theirs}.self_attn", each) + _mlp(ours, theirs, each)
    return table + affine(f"{ours}.norm1", f"{theirs}.norm1", each) + affine(f"{ours}.norm2", f"{theirs}.norm2", each)


def _decoder(model: DeformableDETR) -> list[Rule]:
    each = tuple(range(model.decoder.depth))
    ours, theirs = "decoder.layers", "transformer.decoder.layers.{}"
    table = fused_attention(f"{ours}.self_attention", f"{theirs}.self_attn", each) + _mlp(ours, theirs, each)
    table += deformable(f"{ours}.cross_attention", f"{theirs}.cross_attn", each)
    for name, their_name in (("norm1", "norm2"), ("norm2", "norm1"), ("norm3", "norm3")):
        table += affine(f"{ours}.{name}", f"{theirs}.{their_name}", each)
    return table


def _mlp(ours: str, theirs: str, each: tuple[int, ...]) -> list[Rule]:
    return linear(f"{ours}.mlp.fc1", f"{theirs}.linear1", each) + linear(f"{ours}.mlp.fc2", f"{theirs}.linear2", each)


def prepare(model: DeformableDETR, tensors: Tensors, where: str) -> dict[str, np.ndarray]:
    """The heads once."""
    return one_name_each(model, tensors, HEADS, where)


LAYOUT = Layout(
    name="fundamentalvision_deformable_detr",
    source="fundamentalvision/Deformable-DETR",
    kind=DeformableDETR,
    fits=is_resnet,
    rules=rules,
    prepare=prepare,
    marks=(
        "backbone.0.body.conv1.weight",
        "transformer.level_embed",
        "transformer.encoder.layers.0.self_attn.sampling_offsets.weight",
    ),
    ignored=("*.num_batches_tracked",),
    first_conv="backbone.stem.conv.weight",
    classes="head.classes.bias",
)
