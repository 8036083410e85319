"""Names of Scenic's DETR: Flax parameters and running statistics, joined by ``/``.

Facts from scenic/projects/baselines/detr/model.py and baselines/resnet.py. Class 0 is no object there, and objects
count from 1; here no object is last, so labels are one less than there. Layer norms have Flax's eps 1e-6. Scenic calls
a cell of the map padding by its centre and not by its first pixel, so images with padding differ a little from there.
"""

import numpy as np

from eqvision.backbones import ResNet
from eqvision.detectors import DETR
from eqvision.layers import FrozenBatchNorm
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts.detr_blocks import is_resnet
from eqvision.pretrained.layouts.vit_flax import attention_rules, dense_rules, mlp_rules, norm_rules
from eqvision.pretrained.rules import Rule, elementwise

TRANSFORMER = "DETRTransformer_0"
# From no object first to no object last
CLASSES = elementwise(lambda x: np.roll(x, -1, axis=-1), lambda x: np.roll(x, 1, axis=-1))


def rules(model: DETR) -> tuple[Rule, ...]:
    """Backbone, projection, queries, transformer and heads."""
    assert isinstance(model.backbone, ResNet)
    pre = model.encoder.norm is not None  # the norms behind encoder and decoder are numbered in this order
    table = _backbone(model.backbone) + dense_rules("projection", "Conv_0")
    table.append(Rule("queries", "QueryPosEmbedding_0/query_emb"))
    table += _encoder(model, f"{TRANSFORMER}/encoder/encoderblock_{{}}")
    table += norm_rules("encoder.norm", f"{TRANSFORMER}/LayerNorm_0") if pre else []
    table += _decoder(model, f"{TRANSFORMER}/decoder/decoderblock_{{}}")
    table += norm_rules("decoder.norm", f"{TRANSFORMER}/LayerNorm_{int(pre)}")
    for ours, theirs in (("weight", "kernel"), ("bias", "bias")):
        table.append(Rule(f"head.classes.{ours}", f"ObjectClassPredictor_0/Dense_0/{theirs}", CLASSES))
    for i in range(len(model.head.boxes.layers)):
        table += dense_rules(f"head.boxes.layers.{i}", f"BBoxCoordPredictor_0/Dense_{i}")
    return tuple(table)


def _encoder(model: DETR, theirs: str) -> list[Rule]:
    ours, each = "encoder.layers", tuple(range(model.encoder.depth))
    width, heads = model.queries.shape[1], model.encoder.layers.attention.num_heads
    table = attention_rules(f"{ours}.attention", f"{theirs}/MultiHeadDotProductAttention_0", width, heads, each)
    for i in range(2):
        table += norm_rules(f"{ours}.norm{i + 1}", f"{theirs}/LayerNorm_{i}", each)
    return table + mlp_rules(f"{ours}.mlp", f"{theirs}/MlpBlock_0", each)


def _decoder(model: DETR, theirs: str) -> list[Rule]:
    ours, each = "decoder.layers", tuple(range(model.decoder.depth))
    width, heads = model.queries.shape[1], model.decoder.layers.self_attention.num_heads
    table = []
    for i, name in enumerate(("self_attention", "cross_attention")):
        table += attention_rules(f"{ours}.{name}", f"{theirs}/MultiHeadDotProductAttention_{i}", width, heads, each)
    for i in range(3):
        table += norm_rules(f"{ours}.norm{i + 1}", f"{theirs}/LayerNorm_{i}", each)
    return table + mlp_rules(f"{ours}.mlp", f"{theirs}/MlpBlock_0", each)


def _backbone(backbone: ResNet) -> list[Rule]:
    """Blocks are numbered through; those without bottleneck begin with ``conv2``."""
    frozen = isinstance(backbone.stem.norm, FrozenBatchNorm)
    table = _conv_norm("backbone.stem", "backbone/stem_conv", "backbone/init_bn", frozen)
    places = [(s, b) for s, stage in enumerate(backbone.stages) for b in range(len(stage))]
    for number, (s, b) in enumerate(places):
        block = backbone.stages[s][b]
        ours, theirs = f"backbone.stages.{s}.{b}", f"backbone/ResidualBlock_{number}"
        for c in range(len(block.convs)):
            place = c + 4 - len(block.convs)
            table += _conv_norm(f"{ours}.convs.{c}", f"{theirs}/conv{place}", f"{theirs}/bn{place}", frozen)
        if block.projection is not None:
            table += _conv_norm(f"{ours}.projection", f"{theirs}/proj_conv", f"{theirs}/proj_bn", frozen)
    return table


def _conv_norm(ours: str, conv: str, norm: str, frozen: bool) -> list[Rule]:
    names = [f"{ours}.norm.running_mean", f"{ours}.norm.running_var"]
    names = names if frozen else [f"stats.{ours}.norm.mean", f"stats.{ours}.norm.variance"]
    return [
        Rule(f"{ours}.conv.weight", f"{conv}/kernel"),
        *norm_rules(f"{ours}.norm", norm),
        *(Rule(name, f"batch_stats/{norm}/{theirs}") for name, theirs in zip(names, ("mean", "var"), strict=True)),
    ]


LAYOUT = Layout(
    name="scenic_detr",
    source="Scenic DETR",
    kind=DETR,
    fits=lambda model: is_resnet(model) and model.mask_head is None,
    rules=rules,
    marks=(
        "backbone/stem_conv/kernel",
        "QueryPosEmbedding_0/query_emb",
        f"{TRANSFORMER}/encoder/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel",
        "ObjectClassPredictor_0/Dense_0/kernel",
    ),
    options={"eps": 1e-6},
    first_conv="backbone.stem.conv.weight",
    classes="head.classes.bias",
    no_object=1,
)
