"""timm's ViT names, which facebookresearch's DeiT, MAE and DINOv2 share but for what ``Names`` says.

Tensors, order and options are those of timm/models/vision_transformer.py and timm/models/deit.py (1.0.31): exact GELU,
LayerNorm with eps 1e-6. What a file holds beyond patches, blocks and head depends on the model: class token,
distillation token, registers, layer scale, ``fc_norm`` in place of ``norm``, biases of queries, keys and values.
"""

from typing import Any, NamedTuple

import numpy as np

from eqvision.backbones import VisionTransformer
from eqvision.classifiers import Classifier
from eqvision.heads import DistilledHead, TokenHead
from eqvision.layers import MLP, PositionEmbedding2D, TransformerBlock, TransformerStack
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.position import square_table
from eqvision.pretrained.resample import torch_bicubic_antialias
from eqvision.pretrained.rules import CONV, LINEAR, SAME, Op, Rule, reshaped, split


class Names(NamedTuple):
    """Where the dialects differ.

    ``gated``: gate and value in one matrix, and the matrix behind them. ``on_patches_only``: the file has positions
    for patches alone, and that of the class token, where the model has one, is added to the token.
    """

    scales: tuple[str, str] = ("ls1.gamma", "ls2.gamma")
    gated: tuple[str, str] = ("mlp.fc1", "mlp.fc2")
    registers: str = "reg_token"
    on_patches_only: bool = False
    body: str = ""
    head: str = "head"


TIMM = Names()
TIMM_REG = Names(on_patches_only=True)  # timm's no_embed_class, and how its reader converts DINOv2 with registers

# All of these compute so, whatever the zoo's row says.
OPTIONS: dict[str, Any] = {"activation": "gelu", "eps": 1e-6}


# The class token and its position in one tensor (1, 1, d).
SUM = Op(
    lambda theirs: (theirs[0][0, 0], np.zeros_like(theirs[0][0, 0])), lambda ours: ((ours[0] + ours[1])[None, None],)
)


def fits(model: Classifier) -> bool:
    """A ViT with learned positions and a linear head on the class token or the average of the patches."""
    backbone, head = model.backbone, model.head
    if not isinstance(backbone, VisionTransformer) or not isinstance(backbone.position, PositionEmbedding2D):
        return False
    if isinstance(head, TokenHead):
        return head.pool in ("token", "mean", "token_mean") and head.pre_logits is None
    return isinstance(head, DistilledHead)


def has_registers(model: Classifier) -> bool:
    """Whether a model that ``fits`` has registers."""
    return isinstance(model.backbone, VisionTransformer) and model.backbone.registers is not None


def has_class_position(model: Classifier) -> bool:
    """Whether the class token has a position of its own."""
    return isinstance(model.backbone, VisionTransformer) and model.backbone.class_position is not None


def vit_rules(model: Classifier, names: Names) -> tuple[Rule, ...]:
    """The table for a model that ``fits``."""
    backbone = model.backbone
    assert isinstance(backbone, VisionTransformer)
    patches, body = "backbone.patch_embed", names.body
    table = [
        Rule(f"{patches}.weight", f"{body}patch_embed.proj.weight", CONV),
        Rule(f"{patches}.bias", f"{body}patch_embed.proj.bias"),
        *_tokens(backbone, names),
        *block_rules(backbone.encoder, "backbone.encoder", f"{body}blocks.{{}}", names),
    ]
    if backbone.norm is not None:
        table += affine("backbone.norm", f"{body}norm")
    return (*table, *_head(model, names))


def affine(ours: str, theirs: str, op: Op = SAME, each: tuple[int, ...] | None = None) -> list[Rule]:
    """Weight and bias of a layer."""
    return [Rule(f"{ours}.{part}", f"{theirs}.{part}", op, each) for part in ("weight", "bias")]


def _tokens(backbone: VisionTransformer, names: Names) -> list[Rule]:
    """Class token, distillation token, registers, and one table with the positions of all that have one."""
    width, table = backbone.channels[0], []
    flat, added = reshaped((1, 1, width), (width,)), names.on_patches_only and backbone.class_position is not None
    if added:
        table.append(Rule(("backbone.class_token", "backbone.class_position"), f"{names.body}cls_token", SUM))
    elif backbone.class_token is not None:
        table.append(Rule("backbone.class_token", f"{names.body}cls_token", flat))
    if backbone.distillation_token is not None:
        table.append(Rule("backbone.distillation_token", f"{names.body}dist_token", flat))
    if backbone.registers is not None:
        shape = backbone.registers.shape
        table.append(Rule("backbone.registers", f"{names.body}{names.registers}", reshaped((1, *shape), shape)))
    prefix = [] if added or backbone.class_position is None else ["backbone.class_position"]
    prefix += [] if backbone.distillation_position is None else ["backbone.distillation_position"]
    ours = (*prefix, "backbone.position.weight")
    return [*table, Rule(ours, f"{names.body}pos_embed", square_table(len(prefix)))]


def block_rules(stack: TransformerStack, ours: str, theirs: str, names: Names) -> list[Rule]:
    """A stack, the leaf ``ours`` of our model; ``theirs`` has ``{}`` where the number of the block stands."""
    block, each, ours = stack.blocks, tuple(range(stack.depth)), f"{ours}.blocks"
    table = [
        *affine(f"{ours}.norm1", f"{theirs}.norm1", each=each),
        *_attention(block, ours, theirs, each),
        *affine(f"{ours}.norm2", f"{theirs}.norm2", each=each),
        *_mlp(block, ours, theirs, names, each),
    ]
    for number, scale in enumerate(names.scales, 1):
        if getattr(block, f"scale{number}") is not None:
            table.append(Rule(f"{ours}.scale{number}.scale", f"{theirs}.{scale}", SAME, each))
    return table


def _attention(block: TransformerBlock, ours: str, theirs: str, each: tuple[int, ...]) -> list[Rule]:
    """Queries, keys and values lie in one matrix, in this order."""
    split_parts = [f"{ours}.attention.{part}" for part in ("query", "key", "value")]
    table = [Rule(tuple(f"{p}.weight" for p in split_parts), f"{theirs}.attn.qkv.weight", split(3, LINEAR), each)]
    if block.attention.query.bias is not None:
        table.append(Rule(tuple(f"{p}.bias" for p in split_parts), f"{theirs}.attn.qkv.bias", split(3), each))
    return [*table, *_linear(f"{ours}.attention.out", f"{theirs}.attn.proj", each)]


def _mlp(block: TransformerBlock, ours: str, theirs: str, names: Names, each: tuple[int, ...]) -> list[Rule]:
    if isinstance(block.mlp, MLP):
        first = _linear(f"{ours}.mlp.fc1", f"{theirs}.mlp.fc1", each)
        return [*first, *_linear(f"{ours}.mlp.fc2", f"{theirs}.mlp.fc2", each)]
    both, last = (f"{theirs}.{name}" for name in names.gated)
    return [
        Rule((f"{ours}.mlp.gate.weight", f"{ours}.mlp.fc1.weight"), f"{both}.weight", split(2, LINEAR), each),
        Rule((f"{ours}.mlp.gate.bias", f"{ours}.mlp.fc1.bias"), f"{both}.bias", split(2), each),
        *_linear(f"{ours}.mlp.fc2", last, each),
    ]


def _head(model: Classifier, names: Names) -> list[Rule]:
    head = model.head
    if isinstance(head, DistilledHead):
        return [*_linear("head.linear", names.head), *_linear("head.linear_distilled", f"{names.head}_dist")]
    assert isinstance(head, TokenHead)
    norm = [] if head.norm is None else affine("head.norm", f"{names.body}fc_norm")
    return [*norm, *_linear("head.linear", names.head)]


def _linear(ours: str, theirs: str, each: tuple[int, ...] | None = None) -> list[Rule]:
    weight, bias = affine(ours, theirs, each=each)
    return [weight._replace(op=LINEAR), bias]


BLOCKS = ("patch_embed.proj.weight", "blocks.0.norm1.weight", "blocks.0.attn.qkv.weight", "pos_embed")
# CLIP's norm before the blocks, attention pooling, hybrids.
OTHERS = ("norm_pre.*", "attn_pool.*", "patch_embed.backbone.*")

LAYOUTS = (
    Layout(
        name="timm_vit",
        source="timm VisionTransformer and VisionTransformerDistilled",
        fits=fits,
        rules=lambda model: vit_rules(model, TIMM),
        marks=BLOCKS,
        unlike=("reg_token", "mask_token", "blocks.0.gamma_1", *OTHERS),
        options=OPTIONS,
        resample=torch_bicubic_antialias,
    ),
    # timm adds positions to the patches alone where there are registers (no_embed_class).
    Layout(
        name="timm_vit_reg",
        source="timm VisionTransformer with registers",
        fits=lambda model: fits(model) and has_registers(model),
        rules=lambda model: vit_rules(model, TIMM_REG),
        marks=(*BLOCKS, "reg_token"),
        unlike=OTHERS,
        options={**OPTIONS, "position_on_class": False},
        resample=torch_bicubic_antialias,
    ),
)
