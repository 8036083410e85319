"""Names of transformers' BERT: ``BertForPreTraining``, ``BertForMaskedLM``, ``BertForSequenceClassification`` and
``BertModel``, as hub files have them.

Models with a head keep the encoder below ``bert.``. Files of the first years call the scale and shift of norms gamma
and beta. The decoder's weight is the table of words, and its bias has two names; files have these copies or not.
Vocabulary, positions, segments and whether there is a head for next sentences are those of the file; eps, GELU and
dropout come from ``config.json``.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from eqvision.backbones import BertEncoder
from eqvision.language import BertPretraining, TextClassifier
from eqvision.names import nearest
from eqvision.pretrained.config import check_config
from eqvision.pretrained.errors import WeightsError
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts.detr_blocks import affine, linear
from eqvision.pretrained.layouts.vit_hf import ACTIVATIONS
from eqvision.pretrained.rules import Rule

MLM = "cls.predictions"
OLD = {".gamma": ".weight", ".beta": ".bias"}


def encoder_rules(model: BertEncoder, ours: str, theirs: str) -> list[Rule]:
    """The encoder below the names ``ours`` and ``theirs``, which end in a dot or are empty."""
    table = [
        Rule(f"{ours}token_embedding.weight", f"{theirs}embeddings.word_embeddings.weight"),
        Rule(f"{ours}position.weight", f"{theirs}embeddings.position_embeddings.weight"),
        Rule(f"{ours}segment_embedding.weight", f"{theirs}embeddings.token_type_embeddings.weight"),
        *affine(f"{ours}embedding_norm", f"{theirs}embeddings.LayerNorm"),
    ]
    each, blocks, layer = tuple(range(model.encoder.depth)), f"{ours}encoder.blocks", f"{theirs}encoder.layer.{{}}"
    for name in ("query", "key", "value"):
        table += linear(f"{blocks}.attention.{name}", f"{layer}.attention.self.{name}", each)
    table += linear(f"{blocks}.attention.out", f"{layer}.attention.output.dense", each)
    table += affine(f"{blocks}.norm1", f"{layer}.attention.output.LayerNorm", each)
    table += linear(f"{blocks}.mlp.fc1", f"{layer}.intermediate.dense", each)
    table += linear(f"{blocks}.mlp.fc2", f"{layer}.output.dense", each)
    return table + affine(f"{blocks}.norm2", f"{layer}.output.LayerNorm", each)


def backbone_rules(model: BertEncoder, prefix: str) -> tuple[Rule, ...]:
    return tuple(encoder_rules(model, "", prefix))


def pretraining_rules(model: BertPretraining) -> tuple[Rule, ...]:
    table = encoder_rules(model.backbone, "backbone.", "bert.")
    table += linear("words.linear", f"{MLM}.transform.dense") + affine("words.norm", f"{MLM}.transform.LayerNorm")
    table.append(Rule("words.bias", f"{MLM}.bias"))
    if model.pooler is not None:
        table += linear("pooler.linear", "bert.pooler.dense") + linear("next_sentence", "cls.seq_relationship")
    return tuple(table)


def classifier_rules(model: TextClassifier, prefix: str) -> tuple[Rule, ...]:
    table = encoder_rules(model.backbone, "backbone.", prefix)
    return (*table, *linear("pooler.linear", f"{prefix}pooler.dense"), *linear("head", "classifier"))


def with_new_names(model: Any, tensors: Mapping[str, np.ndarray], where: str) -> Mapping[str, np.ndarray]:
    """Norms by their names of today, and one tensor where files have a copy.

    Raises WeightsError where what is one tensor in transformers are two that differ.
    """
    new = {_renamed(name): tensor for name, tensor in tensors.items()}
    table = "bert.embeddings.word_embeddings.weight"
    _drop_copy(new, f"{MLM}.decoder.weight", table, where)
    _drop_copy(new, f"{MLM}.decoder.bias", f"{MLM}.bias", where)
    return new


def _renamed(name: str) -> str:
    return next((name.removesuffix(old) + now for old, now in OLD.items() if name.endswith(f"LayerNorm{old}")), name)


def _drop_copy(tensors: dict[str, np.ndarray], copy: str, name: str, where: str) -> None:
    if copy not in tensors:
        return
    found = tensors.pop(copy)
    if not np.array_equal(tensors.setdefault(name, found), found):
        raise WeightsError(
            f"{where}: {name} and {copy} are one tensor in BERT, and differ in this file; "
            "a model whose output table is not that of its words is none of these layouts"
        )


def from_tensors(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, Any]:
    """Sizes of the three tables; a file without one is refused later, with all that it lacks."""
    tables = {"vocab_size": "word", "max_positions": "position", "num_segments": "token_type"}
    names = {size: f"{prefix}embeddings.{kind}_embeddings.weight" for size, kind in tables.items()}
    return {size: tensors[name].shape[0] for size, name in names.items() if name in tensors}


def pretraining_from_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {**from_tensors(tensors, "bert."), "next_sentence": "cls.seq_relationship.weight" in tensors}


def from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The builder's arguments from ``config.json``. Raises UnknownNameError for an activation that is not here."""
    activation = config.get("hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        raise nearest(activation, list(ACTIVATIONS), "hidden_act of config.json")
    return {
        "eps": float(config.get("layer_norm_eps", 1e-12)),
        "activation": ACTIVATIONS[activation],
        "dropout": float(config.get("hidden_dropout_prob", 0.1)),
    }


def check(model: Any, config: Mapping[str, Any]) -> None:
    """Raises WeightsError where config.json tells of other heads, another vocabulary or another kind of attention."""
    encoder = model if isinstance(model, BertEncoder) else model.backbone
    expected = {
        "model_type": "bert",
        "vocab_size": encoder.vocab_size,
        "num_attention_heads": encoder.encoder.blocks.attention.num_heads,
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    }
    check_config(config, expected, "BERT")


def _layout(
    name: str,
    source: str,
    kind: type,
    rules: Any,
    *,
    prefix: str,
    marks: tuple[str, ...] = (),
    unlike: tuple[str, ...] = (),
    ignored: tuple[str, ...] = (),
    classes: str = "",
    tables: Any = None,
) -> Layout:
    """``prefix`` stands before the encoder's names; files of other models with such names have a word between."""
    first = (f"{prefix}embeddings.token_type_embeddings.weight", f"{prefix}encoder.layer.0.attention.self.query.weight")
    return Layout(
        name=name,
        source=source,
        kind=kind,
        fits=lambda model: True,
        rules=rules,
        marks=(*first, *marks),
        unlike=unlike,
        ignored=(f"{prefix}embeddings.position_ids", *ignored),
        options={"eps": 1e-12},
        from_config=from_config,
        from_tensors=tables or partial(from_tensors, prefix=prefix),
        check=check,
        prepare=with_new_names,
        positions="",
        first_conv="",
        classes=classes,
        class_layers=("head.*",) if classes else (),
    )


HEADS = ("pooler.*", "cls.*", "classifier.*")
LAYOUTS = (
    _layout(
        "hf_bert",
        "transformers BertForPreTraining, BertForMaskedLM",
        BertPretraining,
        pretraining_rules,
        prefix="bert.",
        marks=(f"{MLM}.transform.dense.weight",),
        ignored=("bert.pooler.*",),  # early files have it without a head behind it
        tables=pretraining_from_tensors,
    ),
    _layout(
        "hf_bert_classifier",
        "transformers BertForSequenceClassification",
        TextClassifier,
        partial(classifier_rules, prefix="bert."),
        prefix="bert.",
        ignored=("cls.*",),
        classes="head.bias",
    ),
    _layout(
        "hf_bert_classifier_backbone",
        "transformers BertModel",
        TextClassifier,
        partial(classifier_rules, prefix=""),
        prefix="",
        classes="head.bias",
    ),
    _layout(
        "hf_bert_encoder",
        "transformers BertForPreTraining, BertForMaskedLM, BertForSequenceClassification",
        BertEncoder,
        partial(backbone_rules, prefix="bert."),
        prefix="bert.",
        ignored=tuple(f"bert.{name}" if name == "pooler.*" else name for name in HEADS),
    ),
    _layout(
        "hf_bert_encoder_backbone",
        "transformers BertModel",
        BertEncoder,
        partial(backbone_rules, prefix=""),
        prefix="",
        ignored=("pooler.*",),
    ),
)
