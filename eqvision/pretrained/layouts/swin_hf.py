"""transformers' Swin: ``SwinForImageClassification`` and the bare ``SwinModel``.

The names are those that are published and that ``save_pretrained`` writes (transformers 5 has others in memory, see
its conversion_mapping.py). Older files also hold the index of relative positions, which follows from the window.
"""

from collections.abc import Mapping
from typing import Any

from eqvision.classifiers import Classifier
from eqvision.names import nearest
from eqvision.pretrained.config import check_config
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts.swin_blocks import SwinNames, is_swin, swin_rules
from eqvision.pretrained.layouts.vit_hf import ACTIVATIONS
from eqvision.pretrained.rules import Rule


def names(prefix: str) -> SwinNames:
    return SwinNames(
        patch_embed=f"{prefix}embeddings.patch_embeddings.projection",
        patch_norm=f"{prefix}embeddings.norm",
        block=lambda stage: f"{prefix}encoder.layers.{stage}.blocks.{{}}",
        merging=lambda stage: f"{prefix}encoder.layers.{stage - 1}.downsample",
        norm1="layernorm_before",
        qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
        out="attention.output.dense",
        table="attention.self.relative_position_bias_table",
        norm2="layernorm_after",
        fc1="intermediate.dense",
        fc2="output.dense",
        norm=f"{prefix}layernorm",
        head="classifier",
    )


def rules(model: Classifier) -> tuple[Rule, ...]:
    return swin_rules(model, names("swin."))


def backbone_rules(model: Classifier) -> tuple[Rule, ...]:
    return swin_rules(model, names(""))


def from_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Activation and epsilon.

    Raises WeightsError where Swin here is another, UnknownNameError for an activation that does not exist here.
    """
    expected = {"patch_size": 4, "mlp_ratio": 4.0, "qkv_bias": True, "use_absolute_embeddings": False}
    check_config(config, expected, "Swin")
    activation = config.get("hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        raise nearest(activation, list(ACTIVATIONS), "hidden_act of config.json")
    return {"activation": ACTIVATIONS[activation], "eps": float(config.get("layer_norm_eps", 1e-5))}


LAYOUT = Layout(
    name="hf_swin",
    source="transformers SwinForImageClassification",
    fits=is_swin,
    rules=rules,
    marks=(
        "swin.embeddings.patch_embeddings.projection.weight",
        "swin.encoder.layers.0.blocks.0.attention.self.relative_position_bias_table",
    ),
    ignored=("*.attention.self.relative_position_index",),
    options={"window_rule": "huggingface"},
    from_config=from_config,
)
BACKBONE_LAYOUT = Layout(
    name="hf_swin_backbone",
    source="transformers SwinModel",
    fits=is_swin,
    rules=backbone_rules,
    marks=(
        "embeddings.patch_embeddings.projection.weight",
        "encoder.layers.0.blocks.0.attention.self.relative_position_bias_table",
    ),
    ignored=LAYOUT.ignored,
    options=LAYOUT.options,
    from_config=from_config,
)
LAYOUTS = (LAYOUT, BACKBONE_LAYOUT)
