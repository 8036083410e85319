"""transformers' ConvNeXt: ``ConvNextForImageClassification``, ``ConvNextV2ForImageClassification``, and bare models.

Their last norm has the epsilon of ``config.json``, 1e-12 where it says nothing; all other norms have 1e-6.
"""

from collections.abc import Mapping
from typing import Any

from eqvision.classifiers import Classifier
from eqvision.names import nearest
from eqvision.pretrained.config import check_config
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts.convnext_blocks import (
    FIRST_CONV,
    ConvNeXtNames,
    convnext_rules,
    is_convnext,
    is_v1,
    is_v2,
)
from eqvision.pretrained.layouts.vit_hf import ACTIVATIONS
from eqvision.pretrained.rules import Rule

HEAD_EPS = 1e-12


def names(prefix: str) -> ConvNeXtNames:
    stages = f"{prefix}encoder.stages"
    return ConvNeXtNames(
        stem=(f"{prefix}embeddings.patch_embeddings", f"{prefix}embeddings.layernorm"),
        downsample=lambda stage: (f"{stages}.{stage}.downsampling_layer.1", f"{stages}.{stage}.downsampling_layer.0"),
        block=lambda stage: f"{stages}.{stage}.layers.{{}}",
        conv="dwconv",
        norm="layernorm",
        fc1="pwconv1",
        fc2="pwconv2",
        scale="layer_scale_parameter",
        grn=("grn.weight", "grn.bias"),
        head_norm=f"{prefix}layernorm",
        head="classifier",
    )


def v1_rules(model: Classifier) -> tuple[Rule, ...]:
    return convnext_rules(model, names("convnext."))


def v2_rules(model: Classifier) -> tuple[Rule, ...]:
    return convnext_rules(model, names("convnextv2."), grn_axes=(1, 1, 1))


def backbone_rules(model: Classifier) -> tuple[Rule, ...]:
    return convnext_rules(model, names(""), grn_axes=(1, 1, 1))


def from_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Activation, and epsilon of the last norm.

    Raises WeightsError where ConvNeXt here is another, UnknownNameError for an activation that does not exist here.
    """
    check_config(config, {"patch_size": 4}, "ConvNeXt")
    activation = config.get("hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        raise nearest(activation, list(ACTIVATIONS), "hidden_act of config.json")
    return {"activation": ACTIVATIONS[activation], "head_eps": float(config.get("layer_norm_eps", HEAD_EPS))}


LAYOUT = Layout(
    name="hf_convnext",
    source="transformers ConvNextForImageClassification",
    fits=is_v1,
    rules=v1_rules,
    marks=("convnext.embeddings.patch_embeddings.weight", "convnext.encoder.stages.0.layers.0.dwconv.weight"),
    options={"head_eps": HEAD_EPS},
    from_config=from_config,
    first_conv=FIRST_CONV,
)
V2_LAYOUT = Layout(
    name="hf_convnextv2",
    source="transformers ConvNextV2ForImageClassification",
    fits=is_v2,
    rules=v2_rules,
    marks=("convnextv2.embeddings.patch_embeddings.weight", "convnextv2.encoder.stages.0.layers.0.dwconv.weight"),
    options=LAYOUT.options,
    from_config=from_config,
    first_conv=FIRST_CONV,
)
BACKBONE_LAYOUT = Layout(
    name="hf_convnext_backbone",
    source="transformers ConvNextModel and ConvNextV2Model",
    fits=is_convnext,
    rules=backbone_rules,
    marks=("embeddings.patch_embeddings.weight", "encoder.stages.0.layers.0.dwconv.weight"),
    options=LAYOUT.options,
    from_config=from_config,
    first_conv=FIRST_CONV,
)
LAYOUTS = (LAYOUT, V2_LAYOUT, BACKBONE_LAYOUT)
