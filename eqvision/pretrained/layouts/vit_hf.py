"""Hugging Face's ViT, MAE, DeiT and DINOv2, under the names that ``save_pretrained`` writes.

Facts from transformers' modeling files of vit, vit_mae, deit, dinov2 and dinov2_with_registers. Since version 5 the
modules themselves have other names (``layers.0.attention.q_proj``), which transformers changes as it reads and writes:
files have the old ones. Models with a head keep the backbone below ``vit.``, ``deit.``, ``dinov2.``; files of a bare
backbone have no such prefix. eps, GELU and the bias of queries, keys and values come from ``config.json``.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from eqvision.backbones import VisionTransformer
from eqvision.classifiers import Classifier
from eqvision.heads import TokenHead
from eqvision.layers import Activation, GatedMLP, PositionEmbedding2D, TransformerStack
from eqvision.names import nearest
from eqvision.pretrained.config import check_config
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.position import square_table
from eqvision.pretrained.resample import torch_bicubic, torch_bicubic_antialias
from eqvision.pretrained.rules import CONV, LINEAR, Rule, reshaped, split

BLOCKS = "backbone.encoder.blocks"

# transformers' names (activations.py) of what both sides have
ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}


def config_options(config: Mapping[str, Any], eps: float) -> dict[str, Any]:
    """The builder's arguments from a ``config.json``; ``eps`` is what transformers has where the file has none.

    Raises UnknownNameError for an activation that does not exist here.
    """
    activation = config.get("hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        raise nearest(activation, list(ACTIVATIONS), "hidden_act of config.json")
    return {
        "eps": float(config.get("layer_norm_eps", eps)),
        "activation": ACTIVATIONS[activation],
        "use_qkv_bias": bool(config.get("qkv_bias", True)),
    }


def check_heads(model: Classifier, config: Mapping[str, Any]) -> None:
    """Raises WeightsError for another number of heads than the model's, which no shape shows."""
    heads = _backbone(model).encoder.blocks.attention.num_heads
    check_config(config, {"num_attention_heads": heads}, "the model")


def vit_rules(model: Classifier, prefix: str) -> tuple[Rule, ...]:
    """ViT and MAE; the pooler is read where the model has ``pre_logits``, which it is."""
    backbone = _backbone(model)
    table = [*_embedding(backbone, prefix), *_vit_blocks(backbone, prefix)]
    table += _layer_norm("backbone.norm", f"{prefix}layernorm")
    if isinstance(model.head, TokenHead) and model.head.pre_logits is not None:
        table += _linear("head.pre_logits", f"{prefix}pooler.dense")
    return tuple(table + _linear("head.linear", "classifier"))


def deit_distilled_rules(model: Classifier, prefix: str) -> tuple[Rule, ...]:
    """DeiT with a second head on the distillation token."""
    backbone = _backbone(model)
    table = [*_embedding(backbone, prefix), *_vit_blocks(backbone, prefix)]
    table += _layer_norm("backbone.norm", f"{prefix}layernorm")
    table += _linear("head.linear", "cls_classifier")
    return tuple(table + _linear("head.linear_distilled", "distillation_classifier"))


def dinov2_rules(model: Classifier, prefix: str) -> tuple[Rule, ...]:
    """DINOv2: layer scales, and for the largest model a gated MLP."""
    backbone = _backbone(model)
    table = [*_embedding(backbone, prefix), *_dinov2_blocks(backbone, prefix)]
    table += _layer_norm("backbone.norm", f"{prefix}layernorm")
    return tuple(table + _linear("head.linear", "classifier"))


def _backbone(model: Classifier) -> VisionTransformer:
    assert isinstance(model.backbone, VisionTransformer)
    return model.backbone


def _embedding(backbone: VisionTransformer, prefix: str) -> list[Rule]:
    theirs, width = f"{prefix}embeddings", backbone.channels[0]
    table = [
        Rule("backbone.patch_embed.weight", f"{theirs}.patch_embeddings.projection.weight", CONV),
        Rule("backbone.patch_embed.bias", f"{theirs}.patch_embeddings.projection.bias"),
    ]
    tokens = {"class_token": "cls_token", "distillation_token": "distillation_token"}
    for ours, name in tokens.items():
        if getattr(backbone, ours) is not None:
            table.append(Rule(f"backbone.{ours}", f"{theirs}.{name}", reshaped((1, 1, width), (width,))))
    if backbone.registers is not None:
        shape = backbone.registers.shape
        table.append(Rule("backbone.registers", f"{theirs}.register_tokens", reshaped((1, *shape), shape)))
    return table + _positions(backbone, f"{theirs}.position_embeddings")


def _positions(backbone: VisionTransformer, theirs: str) -> list[Rule]:
    if not isinstance(backbone.position, PositionEmbedding2D):
        return []
    own = (("class", backbone.class_position), ("distillation", backbone.distillation_position))
    ours = [f"backbone.{token}_position" for token, position in own if position is not None]
    return [Rule((*ours, "backbone.position.weight"), theirs, square_table(len(ours)))]


def _vit_blocks(backbone: VisionTransformer, prefix: str) -> list[Rule]:
    return block_rules(backbone.encoder, "backbone.encoder", f"{prefix}encoder.layer.{{}}")


def block_rules(stack: TransformerStack, ours: str, theirs: str) -> list[Rule]:
    """A stack, the leaf ``ours`` of our model; ``theirs`` has ``{}`` where the number of the block stands."""
    ours, each = f"{ours}.blocks", tuple(range(stack.depth))
    return [
        *_layer_norm(f"{ours}.norm1", f"{theirs}.layernorm_before", each),
        *_attention(stack, ours, theirs, each),
        *_layer_norm(f"{ours}.norm2", f"{theirs}.layernorm_after", each),
        *_linear(f"{ours}.mlp.fc1", f"{theirs}.intermediate.dense", each),
        *_linear(f"{ours}.mlp.fc2", f"{theirs}.output.dense", each),
    ]


def _dinov2_blocks(backbone: VisionTransformer, prefix: str) -> list[Rule]:
    theirs, each = f"{prefix}encoder.layer.{{}}", tuple(range(backbone.encoder.depth))
    gated = isinstance(backbone.encoder.blocks.mlp, GatedMLP)
    return [
        *_layer_norm(f"{BLOCKS}.norm1", f"{theirs}.norm1", each),
        *_attention(backbone.encoder, BLOCKS, theirs, each),
        Rule(f"{BLOCKS}.scale1.scale", f"{theirs}.layer_scale1.lambda1", each=each),
        *_layer_norm(f"{BLOCKS}.norm2", f"{theirs}.norm2", each),
        *(_gated_mlp(f"{theirs}.mlp", each) if gated else _mlp(f"{theirs}.mlp", each)),
        Rule(f"{BLOCKS}.scale2.scale", f"{theirs}.layer_scale2.lambda1", each=each),
    ]


def _attention(stack: TransformerStack, ours: str, theirs: str, each: tuple[int, ...]) -> list[Rule]:
    table = _linear(f"{ours}.attention.out", f"{theirs}.attention.output.dense", each)
    for name in ("query", "key", "value"):
        rules = _linear(f"{ours}.attention.{name}", f"{theirs}.attention.attention.{name}", each)
        table += rules if stack.blocks.attention.query.bias is not None else rules[:1]
    return table


def _mlp(theirs: str, each: tuple[int, ...]) -> list[Rule]:
    return _linear(f"{BLOCKS}.mlp.fc1", f"{theirs}.fc1", each) + _linear(f"{BLOCKS}.mlp.fc2", f"{theirs}.fc2", each)


def _gated_mlp(theirs: str, each: tuple[int, ...]) -> list[Rule]:
    """One tensor holds the gate and then the values that it multiplies."""
    ours = (f"{BLOCKS}.mlp.gate", f"{BLOCKS}.mlp.fc1")
    return [
        Rule((f"{ours[0]}.weight", f"{ours[1]}.weight"), f"{theirs}.weights_in.weight", split(2, LINEAR), each),
        Rule((f"{ours[0]}.bias", f"{ours[1]}.bias"), f"{theirs}.weights_in.bias", split(2), each),
        *_linear(f"{BLOCKS}.mlp.fc2", f"{theirs}.weights_out", each),
    ]


def _linear(ours: str, theirs: str, each: tuple[int, ...] | None = None) -> list[Rule]:
    return [
        Rule(f"{ours}.weight", f"{theirs}.weight", LINEAR, each),
        Rule(f"{ours}.bias", f"{theirs}.bias", each=each),
    ]


def _layer_norm(ours: str, theirs: str, each: tuple[int, ...] | None = None) -> list[Rule]:
    return [
        Rule(f"{ours}.weight", f"{theirs}.weight", each=each),
        Rule(f"{ours}.bias", f"{theirs}.bias", each=each),
    ]


# Parts that other models of transformers with nearly the same names have
OTHERS = (
    "*embeddings.distillation_token",
    "*embeddings.register_tokens",
    "*embeddings.detection_tokens",
    "*embeddings.patch_embeddings.backbone.*",
    "*.lambda_1",
)
NOT_READ = ("{}pooler.*", "{}embeddings.mask_token", "decoder.*")


def is_vit(model: Classifier) -> bool:
    """Whether a model is a ViT that normalises all tokens, with one linear layer behind it."""
    backbone = model.backbone
    return isinstance(backbone, VisionTransformer) and backbone.norm is not None and isinstance(model.head, TokenHead)


def is_deit(model: Classifier) -> bool:
    """Whether a model has a distillation token; DeiT's have one or two linear layers behind it."""
    return isinstance(model.backbone, VisionTransformer) and model.backbone.distillation_token is not None


def _vit(name: str, source: str, prefix: str) -> Layout:
    """``decoder.*`` is what masked models reconstruct the image by."""
    return Layout(
        name=name,
        source=source,
        fits=is_vit,
        rules=partial(vit_rules, prefix=prefix),
        marks=_marks(prefix, "layernorm_before"),
        unlike=OTHERS,
        ignored=tuple(pattern.format(prefix) for pattern in NOT_READ),
        options={"eps": 1e-12},
        from_config=partial(config_options, eps=1e-12),
        check=check_heads,
        resample=torch_bicubic,
    )


def _deit(name: str, source: str, rules: Callable[..., tuple[Rule, ...]], mark: str, *, distilled_head: bool) -> Layout:
    return Layout(
        name=name,
        source=source,
        fits=is_deit,
        rules=partial(rules, prefix="deit."),
        marks=(*_marks("deit.", "layernorm_before"), "deit.embeddings.distillation_token", mark),
        ignored=tuple(pattern.format("deit.") for pattern in NOT_READ),
        options={"eps": 1e-12, "distilled_head": distilled_head},
        from_config=partial(config_options, eps=1e-12),
        check=check_heads,
        resample=torch_bicubic,
    )


def _dinov2(name: str, source: str, prefix: str, *, registers: bool) -> Layout:
    token = f"{prefix}embeddings.register_tokens"
    return Layout(
        name=name,
        source=source,
        fits=is_vit,
        rules=partial(dinov2_rules, prefix=prefix),
        marks=(*_marks(prefix, "layer_scale1"), *((token,) if registers else ())),
        unlike=() if registers else (token,),
        ignored=(f"{prefix}embeddings.mask_token",),
        options={"eps": 1e-6},
        from_config=partial(config_options, eps=1e-6),
        check=check_heads,
        resample=torch_bicubic_antialias if registers else torch_bicubic,
    )


def _marks(prefix: str, part: str) -> tuple[str, ...]:
    layer = f"{prefix}encoder.layer.0"
    return (
        f"{prefix}embeddings.cls_token",
        f"{prefix}embeddings.position_embeddings",
        f"{layer}.attention.attention.query.weight",
        f"{layer}.{part}.*",
    )


LAYOUTS = (
    _vit("hf_vit", "transformers ViTForImageClassification, ViTMAEForPreTraining", "vit."),
    _vit("hf_vit_backbone", "transformers ViTModel, ViTMAEModel", ""),
    _deit(
        "hf_deit",
        "transformers DeiTForImageClassification",
        vit_rules,
        "classifier.weight",
        distilled_head=False,
    ),
    _deit(
        "hf_deit_distilled",
        "transformers DeiTForImageClassificationWithTeacher",
        deit_distilled_rules,
        "distillation_classifier.weight",
        distilled_head=True,
    ),
    _dinov2("hf_dinov2", "transformers Dinov2ForImageClassification", "dinov2.", registers=False),
    _dinov2("hf_dinov2_backbone", "transformers Dinov2Model", "", registers=False),
    _dinov2(
        "hf_dinov2_registers",
        "transformers Dinov2WithRegistersForImageClassification",
        "dinov2_with_registers.",
        registers=True,
    ),
    _dinov2("hf_dinov2_registers_backbone", "transformers Dinov2WithRegistersModel", "", registers=True),
)
