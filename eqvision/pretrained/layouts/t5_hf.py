"""Names of transformers' T5 and mT5: ``T5ForConditionalGeneration`` (and ``MT5...``), ``T5EncoderModel``.

Files have the table of words under up to four names; version 1.1 and mT5 have an output layer of their own. Vocabulary
and number of buckets are those of the file, dropout and the farthest bucket come from ``config.json``.
"""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from eqvision.backbones import T5Encoder
from eqvision.language import T5
from eqvision.layers.decoder import DecoderStack
from eqvision.layers.mlp import GatedMLP
from eqvision.pretrained.config import check_config
from eqvision.pretrained.errors import WeightsError
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.rules import LINEAR, Rule

log = logging.getLogger("eqvision.pretrained")

WORDS = "shared.weight"
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
BIAS = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
UMT5 = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"  # which has one in each block
# Of files of the first years: a table that nothing reads
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def encoder_rules(model: T5Encoder, ours: str = "") -> tuple[Rule, ...]:
    """The encoder below the name ``ours``, which ends in a dot or is empty."""
    return (
        Rule(f"{ours}token_embedding.weight", WORDS),
        Rule(f"{ours}relative.weight", f"encoder.{BIAS}"),
        *_stack_rules(model.stack, f"{ours}stack", "encoder", mlp=1),
        Rule(f"{ours}norm.weight", "encoder.final_layer_norm.weight"),
    )


def rules(model: T5) -> tuple[Rule, ...]:
    table = [
        *encoder_rules(model.encoder, "encoder."),
        Rule("relative.weight", f"decoder.{BIAS}"),
        *_stack_rules(model.decoder, "decoder", "decoder", mlp=2),
        Rule("norm.weight", "decoder.final_layer_norm.weight"),
    ]
    return tuple(table if model.head is None else [*table, Rule("head.weight", "lm_head.weight", LINEAR)])


def _stack_rules(stack: DecoderStack, ours: str, theirs: str, *, mlp: int) -> list[Rule]:
    """``mlp`` is the MLP's number among the parts of a block."""
    ours, layer, each = f"{ours}.blocks", f"{theirs}.block.{{}}.layer", tuple(range(stack.depth))
    table = _attention(f"{ours}.attention", f"{layer}.0.SelfAttention", each)
    table.append(Rule(f"{ours}.norm1.weight", f"{layer}.0.layer_norm.weight", each=each))
    if stack.blocks.cross_attention is not None:
        table += _attention(f"{ours}.cross_attention", f"{layer}.1.EncDecAttention", each)
        table.append(Rule(f"{ours}.norm2.weight", f"{layer}.1.layer_norm.weight", each=each))
    gated = isinstance(stack.blocks.mlp, GatedMLP)
    names = {"gate": "wi_0", "fc1": "wi_1", "fc2": "wo"} if gated else {"fc1": "wi", "fc2": "wo"}
    for our, their in names.items():
        weight = f"{layer}.{mlp}.DenseReluDense.{their}.weight"
        table.append(Rule(f"{ours}.mlp.{our}.weight", weight, LINEAR, each))
    return [*table, Rule(f"{ours}.norm3.weight", f"{layer}.{mlp}.layer_norm.weight", each=each)]


def _attention(ours: str, theirs: str, each: tuple[int, ...]) -> list[Rule]:
    names = {"query": "q", "key": "k", "value": "v", "out": "o"}
    return [Rule(f"{ours}.{our}.weight", f"{theirs}.{their}.weight", LINEAR, each) for our, their in names.items()]


def with_one_table(model: Any, tensors: Mapping[str, np.ndarray], where: str) -> Mapping[str, np.ndarray]:
    """The table of words under one name.

    An output layer that version 1.0 ties to it is dropped. Where a file has none for a model with its own, transformers
    takes the table, and so it is copied. Raises WeightsError where copies differ.
    """
    new = dict(tensors)
    tied = isinstance(model, T5) and model.head is None
    for name in (*COPIES, *(("lm_head.weight",) if tied else ())):
        copy = new.pop(name, None)
        if copy is not None and not np.array_equal(new.setdefault(WORDS, copy), copy):
            raise WeightsError(
                f"{where}: {WORDS} and {name} are one tensor in this model, and differ in the file; "
                "a file of version 1.1 or of mT5 is for the models t5_v1_1_... and mt5_..."
            )
    if isinstance(model, T5) and not tied and "lm_head.weight" not in new and WORDS in new:
        log.info("%s: no lm_head.weight; the output layer begins as the table of words", where)
        new["lm_head.weight"] = new[WORDS]
    return new


def from_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Sizes of the tables. Raises WeightsError where the file has none."""
    words = next((name for name in (WORDS, *COPIES, "lm_head.weight") if name in tensors), None)
    if words is None or f"encoder.{BIAS}" not in tensors:
        raise WeightsError(f"the file has no tensor {WORDS} or no encoder.{BIAS}, which T5 has")
    return {"vocab_size": tensors[words].shape[0], "num_buckets": tensors[f"encoder.{BIAS}"].shape[0]}


def from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "max_distance": int(config.get("relative_attention_max_distance", 128)),
        "dropout": float(config.get("dropout_rate", 0.1)),
    }


def check(model: Any, config: Mapping[str, Any]) -> None:
    """Raises WeightsError where config.json tells of another kind of model, other heads or another MLP."""
    encoder = model.encoder if isinstance(model, T5) else model
    attention = encoder.stack.blocks.attention
    expected = {
        "vocab_size": encoder.vocab_size,
        "num_heads": attention.num_heads,
        "d_kv": attention.query.weight.shape[-1] // attention.num_heads,
        "feed_forward_proj": "gated-gelu" if isinstance(encoder.stack.blocks.mlp, GatedMLP) else "relu",
        "layer_norm_epsilon": encoder.norm.eps,
    }
    if isinstance(model, T5):
        expected["scale_decoder_outputs"] = model.head is None
    # mT5 says false as it has no such thing, and encoders say nothing of outputs.
    kinds = ("t5", "mt5")
    if config.get("model_type", "t5") not in kinds:
        expected["model_type"] = " or ".join(kinds)
    check_config(config, expected, "T5")


def _layout(name: str, source: str, kind: type, table: Any, marks: tuple[str, ...], ignored: tuple[str, ...]) -> Layout:
    return Layout(
        name=name,
        source=source,
        kind=kind,
        fits=lambda model: True,
        rules=table,
        marks=(f"encoder.{BIAS}", "encoder.final_layer_norm.weight", *marks),
        unlike=(UMT5,),
        ignored=ignored,
        from_config=from_config,
        from_tensors=from_tensors,
        check=check,
        prepare=with_one_table,
        positions="",
        first_conv="",
        classes="",
    )


LAYOUTS = (
    _layout(
        "hf_t5",
        "transformers T5ForConditionalGeneration, MT5ForConditionalGeneration",
        T5,
        rules,
        (f"decoder.{BIAS}", "decoder.block.0.layer.1.EncDecAttention.q.weight"),
        (UNUSED,),
    ),
    _layout(
        "hf_t5_encoder",
        "transformers T5EncoderModel, T5ForConditionalGeneration, MT5ForConditionalGeneration",
        T5Encoder,
        encoder_rules,
        (),
        ("decoder.*", "lm_head.weight"),
    ),
)
