"""Names of transformers' GIT (``GitForCausalLM``): the decoder of text and the projection of the image's features.

The tower that makes these features (``git.image_encoder``) is a CLIP and is not read, nor what is added to features of
the frames of a video (``git.img_temporal_embedding``). Vocabulary, number of positions and width of the features are
those of the file; eps, GELU and dropout come from ``config.json``.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from eqvision.language import TextDecoder
from eqvision.names import nearest
from eqvision.pretrained.config import check_config
from eqvision.pretrained.errors import WeightsError
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts.detr_blocks import affine, linear
from eqvision.pretrained.layouts.vit_hf import ACTIVATIONS
from eqvision.pretrained.rules import Rule

PROJECTION = "git.visual_projection.visual_projection"


def rules(model: TextDecoder) -> tuple[Rule, ...]:
    table = [
        Rule("token_embedding.weight", "git.embeddings.word_embeddings.weight"),
        Rule("position.weight", "git.embeddings.position_embeddings.weight"),
        *affine("embedding_norm", "git.embeddings.LayerNorm"),
        *linear("projection.linear", f"{PROJECTION}.0"),
        *affine("projection.norm", f"{PROJECTION}.1"),
        *linear("head", "output"),
    ]
    each, blocks, layer = tuple(range(model.decoder.depth)), "decoder.blocks", "git.encoder.layer.{}"
    for name in ("query", "key", "value"):
        table += linear(f"{blocks}.attention.{name}", f"{layer}.attention.self.{name}", each)
    table += linear(f"{blocks}.attention.out", f"{layer}.attention.output.dense", each)
    table += affine(f"{blocks}.norm1", f"{layer}.attention.output.LayerNorm", each)
    table += linear(f"{blocks}.mlp.fc1", f"{layer}.intermediate.dense", each)
    table += linear(f"{blocks}.mlp.fc2", f"{layer}.output.dense", each)
    return (*table, *affine(f"{blocks}.norm3", f"{layer}.output.LayerNorm", each))


def from_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Sizes of the tables and of the image's features. Raises WeightsError where the file has none of them."""
    names = {
        "vocab_size": ("git.embeddings.word_embeddings.weight", 0),
        "max_positions": ("git.embeddings.position_embeddings.weight", 0),
        "prefix_width": (f"{PROJECTION}.0.weight", 1),
    }
    absent = [name for name, _ in names.values() if name not in tensors]
    if absent:
        raise WeightsError(f"the file has no tensor {', '.join(absent)}, which GIT has")
    return {size: tensors[name].shape[axis] for size, (name, axis) in names.items()}


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


def check(model: TextDecoder, config: Mapping[str, Any]) -> None:
    """Raises WeightsError where config.json tells of other heads or another vocabulary."""
    expected = {
        "model_type": "git",
        "vocab_size": model.vocab_size,
        "num_attention_heads": model.decoder.blocks.attention.num_heads,
    }
    check_config(config, expected, "GIT")


def _is_git(model: TextDecoder) -> bool:
    post = model.decoder.blocks.norm_order == "post"
    return post and model.projection is not None and model.decoder.blocks.cross_attention is None


LAYOUT = Layout(
    name="hf_git",
    source="transformers GitForCausalLM",
    kind=TextDecoder,
    fits=_is_git,
    rules=rules,
    marks=(f"{PROJECTION}.0.weight", "git.embeddings.word_embeddings.weight", "output.weight"),
    ignored=("git.image_encoder.*", "git.img_temporal_embedding.*", "git.embeddings.position_ids"),
    from_config=from_config,
    from_tensors=from_tensors,
    check=check,
    positions="",
    first_conv="",
    classes="",
)
