"""Masked autoencoders: facebookresearch/mae with and without the decoder, and transformers' ViTMAEForPreTraining.

Facts from mae/models_mae.py and from transformers' modeling_vit_mae.py. Files hold the fixed positions of encoder and
decoder, which are no parameters here: they must be the sin-cos tables. Classifiers read the encoder of such files by
the layouts ``mae_vit``, ``timm_vit`` and ``hf_vit``.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from eqvision.layers.position import sincos_2d
from eqvision.pretrained.config import check_config
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts import vit_hf, vit_timm
from eqvision.pretrained.layouts.detr_blocks import affine, linear
from eqvision.pretrained.layouts.vit_hf import config_options
from eqvision.pretrained.layouts.vit_timm import BLOCKS, OPTIONS, TIMM
from eqvision.pretrained.rules import CONV, Arrays, Op, Rule, ShapeError, reshaped
from eqvision.pretraining import MAE

# transformers 5 changes the second of these names to the first as it writes, and reads both.
WRITTEN = ("decoder.decoder_encoder.layer.", "decoder.decoder_layers.")
SLACK = 1e-4  # tables of float32, computed in other orders


def fixed_positions(grid: tuple[int, int], width: int) -> Op:
    """A table (1, 1 + n, width) in the file, zeros for the class token and then MAE's sin-cos; nothing in our model.

    Raises ValueError for other numbers in it; any square grid is read, and ``grid`` is written.
    """

    def load(theirs: Arrays) -> Arrays:
        rows = theirs[0].shape[-2]
        side = math.isqrt(max(rows - 1, 0))
        if theirs[0].shape != (1, 1 + side * side, width):
            raise ShapeError(theirs[0].shape, (1, 1 + side * side, width))
        off = float(np.abs(np.asarray(theirs[0], np.float32) - _table((side, side), width)).max())
        if off > SLACK:
            raise ValueError(f"positions differ by {off:.2g} from the fixed sin-cos table, which is all that MAE has")
        return ()

    return Op(load, lambda ours: (_table(grid, width),))


def _table(grid: tuple[int, int], width: int) -> np.ndarray:
    return np.concatenate([np.zeros((1, width), np.float32), sincos_2d(grid, width).reshape(-1, width)])[None]


def facebook_encoder_rules(model: MAE) -> tuple[Rule, ...]:
    """The names of timm."""
    backbone, width = model.backbone, model.backbone.channels[0]
    return (
        Rule("backbone.patch_embed.weight", "patch_embed.proj.weight", CONV),
        Rule("backbone.patch_embed.bias", "patch_embed.proj.bias"),
        Rule("backbone.class_token", "cls_token", reshaped((1, 1, width), (width,))),
        Rule((), "pos_embed", fixed_positions(model.grid(model.image_size), width)),
        *vit_timm.block_rules(backbone.encoder, "backbone.encoder", "blocks.{}", TIMM),
        *affine("backbone.norm", "norm"),
    )


def facebook_rules(model: MAE) -> tuple[Rule, ...]:
    decoder = vit_timm.block_rules(model.decoder.stack, "decoder.stack", "decoder_blocks.{}", TIMM)
    return (*facebook_encoder_rules(model), *decoder, *_decoder_ends(model, ""))


def hf_rules(model: MAE) -> tuple[Rule, ...]:
    backbone, width, theirs = model.backbone, model.backbone.channels[0], "vit.embeddings"
    return (
        Rule("backbone.patch_embed.weight", f"{theirs}.patch_embeddings.projection.weight", CONV),
        Rule("backbone.patch_embed.bias", f"{theirs}.patch_embeddings.projection.bias"),
        Rule("backbone.class_token", f"{theirs}.cls_token", reshaped((1, 1, width), (width,))),
        Rule((), f"{theirs}.position_embeddings", fixed_positions(model.grid(model.image_size), width)),
        *vit_hf.block_rules(backbone.encoder, "backbone.encoder", "vit.encoder.layer.{}"),
        *affine("backbone.norm", "vit.layernorm"),
        *vit_hf.block_rules(model.decoder.stack, "decoder.stack", "decoder.decoder_layers.{}"),
        *_decoder_ends(model, "decoder."),
    )


def _decoder_ends(model: MAE, prefix: str) -> list[Rule]:
    """All of the decoder but its blocks, which both have by the same names."""
    width = model.decoder.mask_token.shape[0]
    return [
        *linear("decoder.embed", f"{prefix}decoder_embed"),
        Rule("decoder.mask_token", f"{prefix}mask_token", reshaped((1, 1, width), (width,))),
        Rule((), f"{prefix}decoder_pos_embed", fixed_positions(model.grid(model.image_size), width)),
        *affine("decoder.norm", f"{prefix}decoder_norm"),
        *linear("decoder.project", f"{prefix}decoder_pred"),
    ]


def facebook_sizes(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Width and depth of the decoder."""
    return _sizes(tensors, "mask_token", "decoder_blocks.{}.norm1.weight")


def hf_sizes(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return _sizes(published_names(tensors), "decoder.mask_token", "decoder.decoder_layers.{}.layernorm_before.weight")


def _sizes(tensors: Mapping[str, np.ndarray], token: str, norm: str) -> dict[str, Any]:
    depth = next(number for number in range(len(tensors) + 1) if norm.format(number) not in tensors)
    return {"decoder_width": tensors[token].shape[-1], "decoder_depth": depth}


def published_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The names of files of transformers 4, whichever version has written it."""
    return {name.replace(*WRITTEN): tensor for name, tensor in tensors.items()}


def from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers computes: eps, GELU, biases; the share of masked patches, and the heads of the decoder."""
    options = config_options(config, eps=1e-12)
    names = {"mask_ratio": "mask_ratio", "decoder_heads": "decoder_num_attention_heads"}
    return options | {ours: config[theirs] for ours, theirs in names.items() if theirs in config}


def check_heads(model: MAE, config: Mapping[str, Any]) -> None:
    """Raises WeightsError for another number of heads than the model's, which no shape shows."""
    check_config(config, {"num_attention_heads": model.backbone.encoder.blocks.attention.num_heads}, "the model")


COMMON: dict[str, Any] = {"kind": MAE, "fits": lambda model: True, "classes": ""}
LAYOUTS = (
    Layout(
        name="mae_pretraining",
        source="facebookresearch/mae, encoder and decoder",
        rules=facebook_rules,
        marks=(*BLOCKS, "mask_token", "decoder_embed.weight", "decoder_blocks.0.attn.qkv.weight"),
        options=OPTIONS,
        from_tensors=facebook_sizes,
        **COMMON,
    ),
    # The usual files, mae_pretrain_vit_*.pth: a decoder is then fresh.
    Layout(
        name="mae_encoder",
        source="facebookresearch/mae, the encoder alone",
        rules=facebook_encoder_rules,
        marks=(*BLOCKS, "norm.weight"),
        unlike=("mask_token", "decoder_*", "head.*", "fc_norm.*", "reg_token", "dist_token", "blocks.0.gamma_1"),
        options=OPTIONS,
        fresh=("decoder.",),
        class_layers=("decoder.*",),
        **COMMON,
    ),
    Layout(
        name="hf_mae",
        source="transformers ViTMAEForPreTraining",
        rules=hf_rules,
        marks=(
            "vit.embeddings.position_embeddings",
            "vit.encoder.layer.0.layernorm_before.weight",
            "decoder.mask_token",
            "decoder.decoder_embed.weight",
        ),
        options={"eps": 1e-12},
        from_config=from_config,
        from_tensors=hf_sizes,
        check=check_heads,
        prepare=lambda model, tensors, where: published_names(tensors),
        **COMMON,
    ),
)
