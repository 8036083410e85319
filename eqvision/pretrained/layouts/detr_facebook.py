"""Names of facebookresearch/detr's ``.pth`` files, which hold the model under ``model``."""

from eqvision.backbones import ResNet
from eqvision.detectors import DETR
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts.detr_blocks import (
    Parts,
    affine,
    backbone_rules,
    is_resnet,
    linear,
    mask_rules,
    outer_rules,
)
from eqvision.pretrained.rules import LINEAR, Rule, split


def rules(model: DETR) -> tuple[Rule, ...]:
    """All names begin with ``detr.`` where there is a mask head beside."""
    assert isinstance(model.backbone, ResNet)
    prefix = "detr." if model.mask_head is not None else ""
    parts = (f"{prefix}input_proj", f"{prefix}query_embed.weight", f"{prefix}class_embed", f"{prefix}bbox_embed")
    table = backbone_rules(model.backbone, f"{prefix}backbone.0.body")
    table += outer_rules(model, Parts(*parts, decoder_norm=f"{prefix}transformer.decoder.norm"))
    table += _encoder(model, f"{prefix}transformer.encoder") + _decoder(model, f"{prefix}transformer.decoder")
    return (*table, *mask_rules(model))


def _encoder(model: DETR, theirs: str) -> list[Rule]:
    each = tuple(range(model.encoder.depth))
    ours, layer = "encoder.layers", f"{theirs}.layers.{{}}"
    table = fused_attention(f"{ours}.attention", f"{layer}.self_attn", each)
    table += linear(f"{ours}.mlp.fc1", f"{layer}.linear1", each) + linear(f"{ours}.mlp.fc2", f"{layer}.linear2", each)
    table += affine(f"{ours}.norm1", f"{layer}.norm1", each) + affine(f"{ours}.norm2", f"{layer}.norm2", each)
    return table if model.encoder.norm is None else table + affine("encoder.norm", f"{theirs}.norm")


def _decoder(model: DETR, theirs: str) -> list[Rule]:
    each = tuple(range(model.decoder.depth))
    ours, layer = "decoder.layers", f"{theirs}.layers.{{}}"
    table = fused_attention(f"{ours}.self_attention", f"{layer}.self_attn", each)
    table += fused_attention(f"{ours}.cross_attention", f"{layer}.multihead_attn", each)
    table += linear(f"{ours}.mlp.fc1", f"{layer}.linear1", each) + linear(f"{ours}.mlp.fc2", f"{layer}.linear2", each)
    for norm in ("norm1", "norm2", "norm3"):
        table += affine(f"{ours}.{norm}", f"{layer}.{norm}", each)
    return table


def fused_attention(ours: str, theirs: str, each: tuple[int, ...]) -> list[Rule]:
    """``torch.nn.MultiheadAttention``: query, key and value in one tensor."""
    weights, biases = (tuple(f"{ours}.{n}.{kind}" for n in ("query", "key", "value")) for kind in ("weight", "bias"))
    return [
        Rule(weights, f"{theirs}.in_proj_weight", split(3, LINEAR), each=each),
        Rule(biases, f"{theirs}.in_proj_bias", split(3), each=each),
        *linear(f"{ours}.out", f"{theirs}.out_proj", each),
    ]


MARKS = ("backbone.0.body.conv1.weight", "transformer.encoder.layers.0.self_attn.in_proj_weight", "query_embed.weight")

LAYOUT = Layout(
    name="facebook_detr",
    source="facebookresearch/detr",
    kind=DETR,
    fits=lambda model: is_resnet(model) and model.mask_head is None,
    rules=rules,
    marks=MARKS,
    unlike=("transformer.level_embed",),
    ignored=("*.num_batches_tracked",),
    first_conv="backbone.stem.conv.weight",
    classes="head.classes.bias",
    no_object=1,
)
PANOPTIC = Layout(
    name="facebook_detr_panoptic",
    source="facebookresearch/detr with masks",
    kind=DETR,
    fits=lambda model: is_resnet(model) and model.mask_head is not None,
    rules=rules,
    marks=(*(f"detr.{mark}" for mark in MARKS), "mask_head.lay1.weight"),
    ignored=("*.num_batches_tracked",),
    first_conv="backbone.stem.conv.weight",
    classes="head.classes.bias",
    no_object=1,
)
LAYOUTS = (LAYOUT, PANOPTIC)
