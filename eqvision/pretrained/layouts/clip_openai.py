"""Names of OpenAI's CLIP (clip/model.py) and of open_clip, which are the same.

OpenAI's files are TorchScript programs of half precision, with the size of images as a tensor. open_clip's models have
the exact GELU unless their names say quickgelu, and no tensor tells: a file without OpenAI's three sizes fits both
layouts, and whoever loads it has to say which it is.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from eqvision.backbones import ClipResNet, VisionTransformer
from eqvision.multimodal import Clip
from eqvision.pretrained.errors import WeightsError
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts.clip_hf import fused_attention, grid_table, is_clip_vit
from eqvision.pretrained.layouts.detr_blocks import affine, linear
from eqvision.pretrained.layouts.resnet_torchvision import conv_norm
from eqvision.pretrained.resample import torch_bicubic
from eqvision.pretrained.rules import CONV, Rule


def vit_rules(model: Clip) -> tuple[Rule, ...]:
    tower, ours = model.image_tower, "image_tower"
    assert isinstance(tower, VisionTransformer)
    return (
        Rule(f"{ours}.patch_embed.weight", "visual.conv1.weight", CONV),
        Rule(f"{ours}.class_token", "visual.class_embedding"),
        Rule((f"{ours}.class_position", f"{ours}.position.weight"), "visual.positional_embedding", grid_table(1)),
        *affine(f"{ours}.pre_norm", "visual.ln_pre"),
        *block_rules(tower.encoder.depth, f"{ours}.encoder.blocks", "visual.transformer.resblocks.{}"),
        *affine(f"{ours}.norm", "visual.ln_post"),
        Rule("image_head.linear.weight", "visual.proj"),
        *text_rules(model),
    )


def resnet_rules(model: Clip) -> tuple[Rule, ...]:
    tower, pool = model.image_tower, "visual.attnpool"
    assert isinstance(tower, ClipResNet)
    table = []
    for c in range(len(tower.stem)):
        table += conv_norm(f"image_tower.stem.{c}", f"visual.conv{c + 1}", f"visual.bn{c + 1}")
    for s, stage in enumerate(tower.stages):
        for b, block in enumerate(stage):
            ours, theirs = f"image_tower.stages.{s}.{b}", f"visual.layer{s + 1}.{b}"
            for c in range(len(block.convs)):
                table += conv_norm(f"{ours}.convs.{c}", f"{theirs}.conv{c + 1}", f"{theirs}.bn{c + 1}")
            if block.projection is not None:
                table += conv_norm(f"{ours}.projection", f"{theirs}.downsample.0", f"{theirs}.downsample.1")
    positions = ("image_head.mean_position", "image_head.position.weight")
    table.append(Rule(positions, f"{pool}.positional_embedding", grid_table(1)))
    for name, part in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("out", "c_proj")):
        table += linear(f"image_head.{name}", f"{pool}.{part}")
    return (*table, *text_rules(model))


def text_rules(model: Clip) -> tuple[Rule, ...]:
    """The text tower has no word before its names. Projections are stored as ours, (in, out)."""
    ours, depth = "text_tower", model.text_tower.encoder.depth
    return (
        Rule(f"{ours}.token_embedding.weight", "token_embedding.weight"),
        Rule(f"{ours}.position.weight", "positional_embedding"),
        *block_rules(depth, f"{ours}.encoder.blocks", "transformer.resblocks.{}"),
        *affine(f"{ours}.norm", "ln_final"),
        Rule("text_head.linear.weight", "text_projection"),
        Rule("logit_scale", "logit_scale"),
    )


def block_rules(depth: int, ours: str, theirs: str) -> list[Rule]:
    each = tuple(range(depth))
    return [
        *affine(f"{ours}.norm1", f"{theirs}.ln_1", each),
        *fused_attention(f"{ours}.attention", f"{theirs}.attn", each),
        *affine(f"{ours}.norm2", f"{theirs}.ln_2", each),
        *linear(f"{ours}.mlp.fc1", f"{theirs}.mlp.c_fc", each),
        *linear(f"{ours}.mlp.fc2", f"{theirs}.mlp.c_proj", each),
    ]


def from_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Vocabulary and number of positions. Raises WeightsError where the file has no such tables."""
    names = {"vocab_size": "token_embedding.weight", "length": "positional_embedding"}
    absent = [name for name in names.values() if name not in tensors]
    if absent:
        raise WeightsError(f"the file has no tensor {', '.join(absent)}, which OpenAI's CLIP has")
    return {size: tensors[name].shape[0] for size, name in names.items()}


def _layouts(what: str, rules: Any, fits: Any, mark: str, positions: str, first_conv: str) -> tuple[Layout, Layout]:
    openai = Layout(
        name=f"openai_clip_{what}",
        source="OpenAI CLIP, and open_clip's quickgelu",
        fits=fits,
        rules=rules,
        marks=("token_embedding.weight", "transformer.resblocks.0.ln_1.weight", "text_projection", mark),
        ignored=("input_resolution", "context_length", "vocab_size", "attn_mask", "*.num_batches_tracked"),
        options={"activation": "quick_gelu"},
        from_tensors=from_tensors,
        resample=torch_bicubic,
        positions=positions,
        image_tower="image_tower",
        first_conv=first_conv,
        classes="",
        kind=Clip,
    )
    exact = {"options": {"activation": "gelu"}, "unlike": ("input_resolution",)}
    return openai, dataclasses.replace(openai, name=f"open_clip_{what}", source="open_clip", **exact)


LAYOUTS = (
    *_layouts(
        "vit",
        vit_rules,
        is_clip_vit,
        "visual.class_embedding",
        "image_tower.position.weight",
        "image_tower.patch_embed.weight",
    ),
    *_layouts(
        "resnet",
        resnet_rules,
        lambda model: isinstance(model.image_tower, ClipResNet),
        "visual.attnpool.positional_embedding",
        "image_head.position.weight",
        "image_tower.stem.0.conv.weight",
    ),
)
