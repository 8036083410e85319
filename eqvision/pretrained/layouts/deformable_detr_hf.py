"""Names of transformers' ``DeformableDetrForObjectDetection``, as hub files have them and ``save_pretrained`` writes.

The backbone goes by timm's names in most files, and by those of transformers' own ResNet in others. With box refinement
the heads are stored as the decoder's, with two stages the classes too; older files have them outside. A fresh model
with refinement there ties the classes of all layers, and is saved with the first alone.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from eqvision.backbones import ResNet
from eqvision.detectors import DeformableDETR
from eqvision.detectors.deformable_detr import ProposedQueries
from eqvision.pretrained.config import check_config
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts.deformable_detr_blocks import (
    HeadNames,
    check_sizes,
    deformable,
    head_rules,
    is_resnet,
    one_name_each,
    outer_rules,
)
from eqvision.pretrained.layouts.detr_blocks import affine, backbone_rules, hf_backbone_rules, keeps_stride, linear
from eqvision.pretrained.rules import Rule, Tensors

BackboneRules = Callable[[ResNet, str], list[Rule]]
INNER = "model.decoder."


def rules(model: DeformableDETR, backbone: BackboneRules) -> tuple[Rule, ...]:
    """The backbone by ``backbone``, the transformer, the heads."""
    assert isinstance(model.backbone, ResNet)
    table = backbone(model.backbone, "model.backbone.conv_encoder.model")
    table += outer_rules(model, "model.input_proj", "model", "model.query_position_embeddings.weight")
    return (*table, *_encoder(model), *_decoder(model), *head_rules(model, heads(model)))


def heads(model: DeformableDETR) -> HeadNames:
    """Under which names ``save_pretrained`` leaves the heads that the model and its decoder share."""
    classes = INNER if isinstance(model.queries, ProposedQueries) else ""
    boxes = INNER if model.decoder.refine else ""
    return HeadNames(f"{classes}class_embed.{{}}", f"{boxes}bbox_embed.{{}}", INNER)


def _encoder(model: DeformableDETR) -> list[Rule]:
    each = tuple(range(model.encoder.depth))
    ours, theirs = "encoder.layers", "model.encoder.layers.{}"
    table = deformable(f"{ours}.attention", f"{theirs}.self_attn", each) + _mlp(ours, theirs, each)
    table += affine(f"{ours}.norm1", f"{theirs}.self_attn_layer_norm", each)
    return table + affine(f"{ours}.norm2", f"{theirs}.final_layer_norm", each)


def _decoder(model: DeformableDETR) -> list[Rule]:
    each = tuple(range(model.decoder.depth))
    ours, theirs = "decoder.layers", "model.decoder.layers.{}"
    table = deformable(f"{ours}.cross_attention", f"{theirs}.encoder_attn", each) + _mlp(ours, theirs, each)
    for name, letter in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "out")):
        table += linear(f"{ours}.self_attention.{name}", f"{theirs}.self_attn.{letter}_proj", each)
    norms = ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm")
    for i, norm in enumerate(norms, 1):
        table += affine(f"{ours}.norm{i}", f"{theirs}.{norm}", each)
    return table


def _mlp(ours: str, theirs: str, each: tuple[int, ...]) -> list[Rule]:
    return [rule for fc in ("fc1", "fc2") for rule in linear(f"{ours}.mlp.{fc}", f"{theirs}.{fc}", each)]


def prepare(model: DeformableDETR, tensors: Tensors, where: str) -> dict[str, np.ndarray]:
    """The heads once, under the names of ``heads``."""
    return one_name_each(model, tensors, heads(model), where)


def check(model: DeformableDETR, config: Mapping[str, Any]) -> None:
    """Raises WeightsError where config.json tells of other heads, points, positions, activation or stride."""
    check_config(config, {"activation_function": "relu", "position_embedding_type": "sine"}, "Deformable DETR")
    check_sizes(model, config)


def _layout(name: str, source: str, backbone: BackboneRules, first: str) -> Layout:
    return Layout(
        name=name,
        source=source,
        kind=DeformableDETR,
        fits=is_resnet,
        rules=partial(rules, backbone=backbone),
        prepare=prepare,
        marks=(
            f"model.backbone.conv_encoder.model.{first}.weight",
            "model.level_embed",
            "model.encoder.layers.0.self_attn.sampling_offsets.weight",
        ),
        ignored=("*.num_batches_tracked",),
        check=check,
        computes=is_resnet if backbone is backbone_rules else keeps_stride,
        first_conv="backbone.stem.conv.weight",
        classes="head.classes.bias",
    )


HF = "transformers DeformableDetrForObjectDetection"
# transformers' own ResNet comes first: it needs no other package there.
LAYOUTS = (
    _layout("hf_deformable_detr_no_timm", HF, hf_backbone_rules, "embedder.embedder.convolution"),
    _layout("hf_deformable_detr", f"{HF}, timm backbone", backbone_rules, "conv1"),
)
