"""Segment Anything: the official ``.pth`` files, and transformers' ``SamModel``."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from eqvision.pretrained.errors import WeightsError
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts.detr_blocks import affine, linear
from eqvision.pretrained.rules import CONV, LINEAR, Rule, elementwise, split
from eqvision.segmenters.sam import SAM

ROW = elementwise(lambda x: x[0], lambda x: x[None])  # torch.nn.Embedding of one vector, and (1, h, w, d)
TRANSPOSED = elementwise(lambda x: x.transpose(2, 3, 0, 1), lambda x: x.transpose(2, 3, 0, 1))
POINTWISE = elementwise(lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None])  # a 1x1 convolution
KINDS = (0, 1, 2, 3)


class Names(NamedTuple):
    """Where the two origins differ; ``norm`` has a place for the number."""

    encoder: str
    patch_embed: str
    blocks: str
    norm: str
    neck: tuple[str, str, str, str]
    matrix: str
    kinds: str
    mask_convs: tuple[str, str, str]
    mask_norms: tuple[str, str]
    last_norm: str
    up: tuple[str, str, str]
    mlp_layer: Callable[[int, int], str]
    """(number, how many) -> name of a layer inside an MLP of the decoder."""


OFFICIAL = Names(
    encoder="image_encoder",
    patch_embed="patch_embed.proj",
    blocks="blocks",
    norm="norm{}",
    neck=("neck.0", "neck.1", "neck.2", "neck.3"),
    matrix="prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    kinds="point_embeddings",
    mask_convs=("mask_downscaling.0", "mask_downscaling.3", "mask_downscaling.6"),
    mask_norms=("mask_downscaling.1", "mask_downscaling.4"),
    last_norm="norm_final_attn",
    up=("output_upscaling.0", "output_upscaling.1", "output_upscaling.3"),
    mlp_layer=lambda number, count: f"layers.{number}",
)
HUGGING_FACE = Names(
    encoder="vision_encoder",
    patch_embed="patch_embed.projection",
    blocks="layers",
    norm="layer_norm{}",
    neck=("neck.conv1", "neck.layer_norm1", "neck.conv2", "neck.layer_norm2"),
    matrix="shared_image_embedding.positional_embedding",
    kinds="point_embed",
    mask_convs=("mask_embed.conv1", "mask_embed.conv2", "mask_embed.conv3"),
    mask_norms=("mask_embed.layer_norm1", "mask_embed.layer_norm2"),
    last_norm="layer_norm_final_attn",
    up=("upscale_conv1", "upscale_layer_norm", "upscale_conv2"),
    mlp_layer=lambda number, count: {0: "proj_in", count - 1: "proj_out"}.get(number, f"layers.{number - 1}"),
)
TIED = "prompt_encoder.shared_embedding.positional_embedding"


def official_rules(model: SAM) -> tuple[Rule, ...]:
    return (*_encoder(model, OFFICIAL), *_prompts(OFFICIAL), *_decoder(model, OFFICIAL))


def hf_rules(model: SAM) -> tuple[Rule, ...]:
    return (*_encoder(model, HUGGING_FACE), *_prompts(HUGGING_FACE), *_decoder(model, HUGGING_FACE))


def _encoder(model: SAM, names: Names) -> list[Rule]:
    table = _conv("backbone.patch_embed", f"{names.encoder}.{names.patch_embed}")
    table.append(Rule("backbone.position", f"{names.encoder}.pos_embed", ROW))
    for kind in ("window", "global"):
        numbers = tuple(i for i, step in enumerate(model.backbone.steps) if step == kind)
        if numbers:
            table += _block(f"backbone.{kind}_blocks", f"{names.encoder}.{names.blocks}.{{}}", names, numbers)
    for i, part in enumerate(("reduce", "output")):
        ours, (conv, norm) = f"neck.levels.0.{part}", names.neck[2 * i : 2 * i + 2]
        table.append(Rule(f"{ours}.conv.weight", f"{names.encoder}.{conv}.weight", CONV))
        table += affine(f"{ours}.norm", f"{names.encoder}.{norm}")
    return table


def _block(ours: str, theirs: str, names: Names, each: tuple[int, ...]) -> list[Rule]:
    """The blocks of one kind, whose numbers in the network are ``each``."""
    table = affine(f"{ours}.norm1", f"{theirs}.{names.norm.format(1)}", each)
    table += affine(f"{ours}.norm2", f"{theirs}.{names.norm.format(2)}", each)
    for kind, op in (("weight", split(3, LINEAR)), ("bias", split(3))):
        parts = tuple(f"{ours}.attention.{name}.{kind}" for name in ("query", "key", "value"))
        table.append(Rule(parts, f"{theirs}.attn.qkv.{kind}", op, each=each))
    table += linear(f"{ours}.attention.out", f"{theirs}.attn.proj", each)
    for name, letter in (("rows", "h"), ("columns", "w")):
        table.append(Rule(f"{ours}.attention.{name}", f"{theirs}.attn.rel_pos_{letter}", each=each))
    table += linear(f"{ours}.mlp.fc1", f"{theirs}.mlp.lin1", each)
    return table + linear(f"{ours}.mlp.fc2", f"{theirs}.mlp.lin2", each)


def _prompts(names: Names) -> list[Rule]:
    ours, theirs = "prompts", "prompt_encoder"
    table = [Rule(f"{ours}.position.matrix", names.matrix)]
    table.append(Rule(f"{ours}.kinds", f"{theirs}.{names.kinds}.{{}}.weight", ROW, each=KINDS))
    table.append(Rule(f"{ours}.no_point", f"{theirs}.not_a_point_embed.weight", ROW))
    table.append(Rule(f"{ours}.no_mask", f"{theirs}.no_mask_embed.weight", ROW))
    for i in (0, 1):
        table += _conv(f"{ours}.masks.convs.{i}", f"{theirs}.{names.mask_convs[i]}")
        table += affine(f"{ours}.masks.norms.{i}", f"{theirs}.{names.mask_norms[i]}")
    last = f"{theirs}.{names.mask_convs[2]}"
    return [*table, Rule(f"{ours}.masks.out.weight", f"{last}.weight", POINTWISE),
            Rule(f"{ours}.masks.out.bias", f"{last}.bias")]  # fmt: skip


def _decoder(model: SAM, names: Names) -> list[Rule]:
    ours, theirs, head = "head", "mask_decoder", model.head
    table = [Rule(f"{ours}.quality_token", f"{theirs}.iou_token.weight", ROW)]
    table.append(Rule(f"{ours}.mask_tokens", f"{theirs}.mask_tokens.weight"))
    for i in range(len(head.transformer.blocks)):
        table += _two_way(f"{ours}.transformer.blocks.{i}", f"{theirs}.transformer.layers.{i}", names)
    table += _attention(f"{ours}.transformer.read", f"{theirs}.transformer.final_attn_token_to_image")
    table += affine(f"{ours}.transformer.norm", f"{theirs}.transformer.{names.last_norm}")
    for part, name in (("up1", names.up[0]), ("up2", names.up[2])):
        table.append(Rule(f"{ours}.{part}.weight", f"{theirs}.{name}.weight", TRANSPOSED))
        table.append(Rule(f"{ours}.{part}.bias", f"{theirs}.{name}.bias"))
    table += affine(f"{ours}.up_norm", f"{theirs}.{names.up[1]}")
    masks, layers = tuple(range(head.mask_tokens.shape[0])), len(head.vectors.layers)
    for i in range(layers):
        name = f"{theirs}.output_hypernetworks_mlps.{{}}.{names.mlp_layer(i, layers)}"
        table += linear(f"{ours}.vectors.layers.{i}", name, masks)
    layers = len(head.quality.layers)
    for i in range(layers):
        table += linear(f"{ours}.quality.layers.{i}", f"{theirs}.iou_prediction_head.{names.mlp_layer(i, layers)}")
    return table


def _two_way(ours: str, theirs: str, names: Names) -> list[Rule]:
    table = _attention(f"{ours}.among", f"{theirs}.self_attn")
    table += _attention(f"{ours}.read", f"{theirs}.cross_attn_token_to_image")
    table += _attention(f"{ours}.write", f"{theirs}.cross_attn_image_to_token")
    for i in (1, 2, 3, 4):
        table += affine(f"{ours}.norm{i}", f"{theirs}.{names.norm.format(i)}")
    return table + linear(f"{ours}.mlp.fc1", f"{theirs}.mlp.lin1") + linear(f"{ours}.mlp.fc2", f"{theirs}.mlp.lin2")


def _attention(ours: str, theirs: str) -> list[Rule]:
    projections = (("query", "q"), ("key", "k"), ("value", "v"), ("out", "out"))
    return [rule for name, short in projections for rule in linear(f"{ours}.{name}", f"{theirs}.{short}_proj")]


def _conv(ours: str, theirs: str) -> list[Rule]:
    return [Rule(f"{ours}.weight", f"{theirs}.weight", CONV), Rule(f"{ours}.bias", f"{theirs}.bias")]


def untied(model: SAM, tensors: Mapping[str, np.ndarray], where: str) -> Mapping[str, np.ndarray]:
    """The matrix of positions goes by two names in memory, and in files by either or both.

    Raises WeightsError where they differ.
    """
    if TIED not in tensors:
        return tensors
    matrix, name = tensors[TIED], HUGGING_FACE.matrix
    if name in tensors and not np.array_equal(tensors[name], matrix):
        raise WeightsError(f"{where}: {name} and {TIED} are one matrix in SamModel, and differ in this file")
    return {**{each: x for each, x in tensors.items() if each != TIED}, name: matrix}


def from_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The epsilon of the decoder's norms."""
    return {"eps": float(config.get("mask_decoder_config", {}).get("layer_norm_eps", 1e-6))}


def check(model: SAM, config: Mapping[str, Any]) -> None:
    """Raises WeightsError where config.json tells of other heads, windows or global blocks, which no shape shows."""
    backbone, vision, decoder = (model.backbone, *(config.get(f"{n}_config", {}) for n in ("vision", "mask_decoder")))
    blocks = backbone.window_blocks or backbone.global_blocks
    assert blocks is not None
    global_blocks = [i for i, step in enumerate(backbone.steps) if step == "global"]
    expected = {
        "vision_config.num_attention_heads": (vision, blocks.attention.num_heads),
        "vision_config.window_size": (vision, backbone.window),
        "vision_config.global_attn_indexes": (vision, global_blocks),
        "mask_decoder_config.num_attention_heads": (decoder, model.head.transformer.read.num_heads),
    }
    for name, (part, ours) in expected.items():
        theirs = part.get(name.rpartition(".")[2], ours)
        if theirs != ours:
            raise WeightsError(f"config.json has {name} {theirs} and the model has {ours}; choose another model")


# The number of "classes" is that of masks; the IoU of one more is predicted.
OFFICIAL_LAYOUT = Layout(
    name="official_sam",
    source="facebookresearch/segment-anything",
    kind=SAM,
    fits=lambda model: True,
    rules=official_rules,
    marks=(
        "image_encoder.blocks.0.attn.qkv.weight",
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
        "mask_decoder.iou_prediction_head.layers.0.weight",
    ),
    positions="backbone.position",
    classes="head.quality.layers.2.bias",
    no_object=1,
)
HF_LAYOUT = Layout(
    name="hf_sam",
    source="transformers SamModel",
    kind=SAM,
    fits=lambda model: True,
    rules=hf_rules,
    marks=(
        "vision_encoder.layers.0.attn.qkv.weight",
        "prompt_encoder.point_embed.0.weight",
        "mask_decoder.iou_prediction_head.proj_in.weight",
    ),
    options={"eps": 1e-6},
    from_config=from_config,
    check=check,
    prepare=untied,
    positions="backbone.position",
    classes="head.quality.layers.2.bias",
    no_object=1,
)
LAYOUTS = (OFFICIAL_LAYOUT, HF_LAYOUT)
