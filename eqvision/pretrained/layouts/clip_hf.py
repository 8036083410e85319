"""Names of transformers' ``CLIPModel`` and ``SiglipModel``, as ``save_pretrained`` writes them.

Vocabulary and number of positions are those of the file; eps, GELU and the end token come from ``config.json``, where
the end token 2 stands for the highest id (transformers' modeling_clip.py). ``pre_layrnorm`` is CLIP's own spelling.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from eqvision.backbones import ClipText, VisionTransformer
from eqvision.heads import AttentionPool, AttentionPoolEmbedding, ClassTokenProjection
from eqvision.multimodal import Clip
from eqvision.names import nearest
from eqvision.pretrained.config import check_config
from eqvision.pretrained.errors import WeightsError
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts.detr_blocks import affine, linear
from eqvision.pretrained.layouts.vit_hf import ACTIVATIONS
from eqvision.pretrained.position import square_table
from eqvision.pretrained.resample import torch_bicubic
from eqvision.pretrained.rules import CONV, LINEAR, SAME, Op, Rule, chain, elementwise, reshaped, split

ARGMAX_EOS = 2  # what config.json says where the end of a text is its highest id
UNBATCHED = elementwise(lambda x: x[None], lambda x: x[0])


def grid_table(prefix: int) -> Op:
    """(prefix + h * w, d) of a square grid <-> ``prefix`` leaves (d,), and then the grid (h, w, d)."""
    return chain(UNBATCHED, square_table(prefix))


def clip_rules(model: Clip) -> tuple[Rule, ...]:
    assert isinstance(model.image_tower, VisionTransformer)
    return (
        *vision_rules(model.image_tower, "image_tower", "vision_model", pre_norm="pre_layrnorm"),
        *text_rules(model.text_tower, "text_tower", "text_model"),
        Rule("image_head.linear.weight", "visual_projection.weight", LINEAR),
        Rule("text_head.linear.weight", "text_projection.weight", LINEAR),
        Rule("logit_scale", "logit_scale"),
    )


def siglip_rules(model: Clip) -> tuple[Rule, ...]:
    assert isinstance(model.image_tower, VisionTransformer)
    assert isinstance(model.image_head, AttentionPoolEmbedding)
    return (
        *vision_rules(model.image_tower, "image_tower", "vision_model"),
        *attention_pool_rules(model.image_head.pool, "image_head.pool", "vision_model.head"),
        *text_rules(model.text_tower, "text_tower", "text_model"),
        *linear("text_head.linear", "text_model.head"),
        Rule("logit_scale", "logit_scale", reshaped((1,), ())),
        Rule("logit_bias", "logit_bias", reshaped((1,), ())),
    )


def vision_rules(tower: VisionTransformer, ours: str, theirs: str, *, pre_norm: str = "") -> list[Rule]:
    """The image tower of CLIP, SigLIP and OWL-ViT. ``pre_norm`` is what the norm before the blocks is called."""
    patches = f"{theirs}.embeddings.patch_embedding"
    table = [Rule(f"{ours}.patch_embed.weight", f"{patches}.weight", CONV)]
    if tower.patch_embed.bias is not None:
        table.append(Rule(f"{ours}.patch_embed.bias", f"{patches}.bias"))
    if tower.class_token is not None:
        table.append(Rule(f"{ours}.class_token", f"{theirs}.embeddings.class_embedding"))
    positions = [f"{ours}.class_position"] if tower.class_position is not None else []
    table.append(
        Rule(
            (*positions, f"{ours}.position.weight"),
            f"{theirs}.embeddings.position_embedding.weight",
            grid_table(len(positions)),
        )
    )
    if tower.pre_norm is not None:
        table += affine(f"{ours}.pre_norm", f"{theirs}.{pre_norm}")
    table += block_rules(tower.encoder.depth, f"{ours}.encoder.blocks", f"{theirs}.encoder.layers.{{}}")
    return table + affine(f"{ours}.norm", f"{theirs}.post_layernorm")


def text_rules(tower: ClipText, ours: str, theirs: str) -> list[Rule]:
    """The text tower of CLIP, SigLIP and OWL-ViT."""
    return [
        Rule(f"{ours}.token_embedding.weight", f"{theirs}.embeddings.token_embedding.weight"),
        Rule(f"{ours}.position.weight", f"{theirs}.embeddings.position_embedding.weight"),
        *block_rules(tower.encoder.depth, f"{ours}.encoder.blocks", f"{theirs}.encoder.layers.{{}}"),
        *affine(f"{ours}.norm", f"{theirs}.final_layer_norm"),
    ]


def block_rules(depth: int, ours: str, theirs: str) -> list[Rule]:
    each = tuple(range(depth))
    table = [*affine(f"{ours}.norm1", f"{theirs}.layer_norm1", each)]
    for name, part in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("out", "out_proj")):
        table += linear(f"{ours}.attention.{name}", f"{theirs}.self_attn.{part}", each)
    table += affine(f"{ours}.norm2", f"{theirs}.layer_norm2", each)
    table += linear(f"{ours}.mlp.fc1", f"{theirs}.mlp.fc1", each)
    return table + linear(f"{ours}.mlp.fc2", f"{theirs}.mlp.fc2", each)


def attention_pool_rules(pool: AttentionPool, ours: str, theirs: str) -> list[Rule]:
    """SigLIP's pooling, whose attention is torch's own."""
    shape = tuple(pool.probe.shape)
    return [
        Rule(f"{ours}.probe", f"{theirs}.probe", reshaped((1, *shape), shape)),
        *fused_attention(f"{ours}.attention", f"{theirs}.attention"),
        *affine(f"{ours}.norm", f"{theirs}.layernorm"),
        *linear(f"{ours}.mlp.fc1", f"{theirs}.mlp.fc1"),
        *linear(f"{ours}.mlp.fc2", f"{theirs}.mlp.fc2"),
    ]


def fused_attention(ours: str, theirs: str, each: tuple[int, ...] | None = None) -> list[Rule]:
    """``torch.nn.MultiheadAttention``: one tensor for the weights of query, key and value, one for their biases."""
    table = []
    for part, op in (("weight", LINEAR), ("bias", SAME)):
        names = tuple(f"{ours}.{name}.{part}" for name in ("query", "key", "value"))
        table.append(Rule(names, f"{theirs}.in_proj_{part}", split(3, op), each))
    return [*table, *linear(f"{ours}.out", f"{theirs}.out_proj", each)]


def from_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Vocabulary and number of positions. Raises WeightsError where the file has no such tables."""
    sizes = {}
    for size, table in (("vocab_size", "token"), ("length", "position")):
        name = f"text_model.embeddings.{table}_embedding.weight"
        if name not in tensors:
            raise WeightsError(f"the file has no tensor {name}, which CLIP and SigLIP have")
        sizes[size] = tensors[name].shape[0]
    return sizes


def from_config(config: Mapping[str, Any], *, activation: str, eps: float) -> dict[str, Any]:
    """The builder's arguments from ``config.json``; the other arguments are transformers' defaults.

    Raises UnknownNameError for an activation that is not here, WeightsError for towers that differ in it or in eps.
    """
    towers = [config.get(f"{tower}_config") or {} for tower in ("text", "vision")]
    found = {}
    for name, default in (("hidden_act", activation), ("layer_norm_eps", eps)):
        text, vision = (tower.get(name, default) for tower in towers)
        if text != vision:
            raise WeightsError(f"config.json: {name} is {text} of texts and {vision} of images; expected one for both")
        found[name] = text
    if found["hidden_act"] not in ACTIVATIONS:
        raise nearest(found["hidden_act"], list(ACTIVATIONS), "hidden_act of config.json")
    return {"activation": ACTIVATIONS[found["hidden_act"]], "eps": float(found["layer_norm_eps"])}


def clip_from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    end = (config.get("text_config") or {}).get("eos_token_id", 49407)
    if not isinstance(end, int):
        raise WeightsError(f"config.json: eos_token_id of text_config is {end!r}; expected one number")
    end_id = None if end == ARGMAX_EOS else end
    return {**from_config(config, activation="quick_gelu", eps=1e-5), "end_id": end_id}


def check(model: Clip, config: Mapping[str, Any], kind: str) -> None:
    """Raises WeightsError for another kind of model, and for another number of heads, which no shape shows."""
    check_config(config, {"model_type": kind}, "the model")
    assert isinstance(model.image_tower, VisionTransformer)
    for name, tower in (("text_config", model.text_tower), ("vision_config", model.image_tower)):
        heads = tower.encoder.blocks.attention.num_heads
        check_config(config.get(name) or {}, {"num_attention_heads": heads}, f"the model ({name})")


def is_clip_vit(model: Clip) -> bool:
    return isinstance(model.image_tower, VisionTransformer) and isinstance(model.image_head, ClassTokenProjection)


def _layout(name: str, source: str, rules: Any, fits: Any, marks: tuple[str, ...], options: Any, kind: str) -> Layout:
    return Layout(
        name=name,
        source=source,
        fits=fits,
        rules=rules,
        marks=("text_model.embeddings.token_embedding.weight", *marks, "logit_scale"),
        unlike=("class_head.*", "owlvit.*", "owlv2.*"),
        ignored=("*.embeddings.position_ids",),
        from_config=options,
        from_tensors=from_tensors,
        check=partial(check, kind=kind),
        resample=torch_bicubic,
        positions="image_tower.position.weight",
        image_tower="image_tower",
        first_conv="image_tower.patch_embed.weight",
        classes="",
        kind=Clip,
    )


LAYOUTS = (
    _layout(
        "hf_clip",
        "transformers CLIPModel",
        clip_rules,
        is_clip_vit,
        ("vision_model.embeddings.class_embedding", "visual_projection.weight"),
        clip_from_config,
        "clip",
    ),
    _layout(
        "hf_siglip",
        "transformers SiglipModel",
        siglip_rules,
        lambda model: isinstance(model.image_head, AttentionPoolEmbedding),
        ("vision_model.head.probe", "logit_bias"),
        partial(from_config, activation="gelu_pytorch_tanh", eps=1e-6),
        "siglip",
    ),
)
