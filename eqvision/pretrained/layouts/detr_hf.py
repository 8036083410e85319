"""Names of transformers' ``DetrForObjectDetection`` and ``DetrForSegmentation``, as hub files have them.

The backbone goes by timm's names in most files, and by those of transformers' own ResNet in the branches ``no_timm``.
What ``save_pretrained`` writes today are still these names, and not those that transformers has in memory.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from eqvision.backbones import ResNet
from eqvision.detectors import DETR
from eqvision.pretrained.config import check_config
from eqvision.pretrained.errors import WeightsError
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts.detr_blocks import (
    Parts,
    affine,
    backbone_rules,
    hf_backbone_rules,
    is_resnet,
    keeps_stride,
    linear,
    mask_rules,
    outer_rules,
)
from eqvision.pretrained.rules import Rule

BackboneRules = Callable[[ResNet, str], list[Rule]]


def rules(model: DETR, backbone: BackboneRules) -> tuple[Rule, ...]:
    """All names begin with ``detr.`` where there is a mask head beside."""
    assert isinstance(model.backbone, ResNet)
    prefix = "detr." if model.mask_head is not None else ""
    parts = Parts(
        projection=f"{prefix}model.input_projection",
        queries=f"{prefix}model.query_position_embeddings.weight",
        classes=f"{prefix}class_labels_classifier",
        boxes=f"{prefix}bbox_predictor",
        decoder_norm=f"{prefix}model.decoder.layernorm",
    )
    table = backbone(model.backbone, f"{prefix}model.backbone.conv_encoder.model") + outer_rules(model, parts)
    encoder = {"attention": "self_attn", "norm1": "self_attn_layer_norm", "norm2": "final_layer_norm"}
    table += _layers("encoder.layers", f"{prefix}model.encoder.layers.{{}}", encoder, model.encoder.depth)
    decoder = {"self_attention": "self_attn", "norm1": "self_attn_layer_norm", "cross_attention": "encoder_attn"}
    decoder |= {"norm2": "encoder_attn_layer_norm", "norm3": "final_layer_norm"}
    table += _layers("decoder.layers", f"{prefix}model.decoder.layers.{{}}", decoder, model.decoder.depth)
    return (*table, *mask_rules(model))


def _layers(ours: str, theirs: str, parts: Mapping[str, str], depth: int) -> list[Rule]:
    each, table = tuple(range(depth)), []
    for name, their_name in parts.items():
        if name.startswith("norm"):
            table += affine(f"{ours}.{name}", f"{theirs}.{their_name}", each)
            continue
        for projection, letter in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "out")):
            table += linear(f"{ours}.{name}.{projection}", f"{theirs}.{their_name}.{letter}_proj", each)
    return [*table, *(rule for fc in ("fc1", "fc2") for rule in linear(f"{ours}.mlp.{fc}", f"{theirs}.{fc}", each))]


def check(model: DETR, config: Mapping[str, Any]) -> None:
    """Raises WeightsError where config.json tells of other heads, another activation or another stride."""
    check_config(config, {"activation_function": "relu", "position_embedding_type": "sine"}, "DETR")
    expected = {
        "encoder_attention_heads": model.encoder.layers.attention.num_heads,
        "decoder_attention_heads": model.decoder.layers.self_attention.num_heads,
        "dilation": model.backbone.strides[-1] == 16,
    }
    for name, ours in expected.items():
        if config.get(name, ours) != ours:
            raise WeightsError(
                f"config.json has {name} {config[name]} and the model has {ours}; "
                "choose the name with or without _dc5, or build the model with these sizes"
            )


def _layout(name: str, source: str, backbone: BackboneRules, first: str, *, masks: bool) -> Layout:
    prefix = "detr." if masks else ""
    return Layout(
        name=name,
        source=source,
        kind=DETR,
        fits=lambda model: is_resnet(model) and model.encoder.norm is None and (model.mask_head is not None) == masks,
        rules=partial(rules, backbone=backbone),
        marks=(
            f"{prefix}model.backbone.conv_encoder.model.{first}.weight",
            f"{prefix}model.query_position_embeddings.weight",
            f"{prefix}model.encoder.layers.0.self_attn.q_proj.weight",
        ),
        unlike=("model.level_embed",),
        ignored=("*.num_batches_tracked",),
        check=check,
        computes=is_resnet if backbone is backbone_rules else keeps_stride,
        first_conv="backbone.stem.conv.weight",
        classes="head.classes.bias",
        no_object=1,
    )


TIMM, OWN = "conv1", "embedder.embedder.convolution"
# transformers' own ResNet comes first: it needs no other package there.
LAYOUTS = (
    _layout("hf_detr_no_timm", "transformers DetrForObjectDetection", hf_backbone_rules, OWN, masks=False),
    _layout("hf_detr", "transformers DetrForObjectDetection, timm backbone", backbone_rules, TIMM, masks=False),
    _layout("hf_detr_panoptic_no_timm", "transformers DetrForSegmentation", hf_backbone_rules, OWN, masks=True),
    _layout("hf_detr_panoptic", "transformers DetrForSegmentation, timm backbone", backbone_rules, TIMM, masks=True),
)
