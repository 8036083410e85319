"""Names of transformers' ``OwlViTForObjectDetection`` and ``Owlv2ForObjectDetection``, as ``save_pretrained`` writes.

CLIP's image projection and temperature are in these files and have no part in detection: they are not read, and not
written. Vocabulary and number of positions are those of the file; eps and GELU of the towers come from
``config.json``. The end of a text is always its highest id there.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from eqvision.detectors.owlvit import OwlViT
from eqvision.pretrained.config import check_config
from eqvision.pretrained.errors import WeightsError
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts.clip_hf import from_config, text_rules, vision_rules
from eqvision.pretrained.layouts.detr_blocks import affine, linear
from eqvision.pretrained.resample import torch_bicubic
from eqvision.pretrained.rules import LINEAR, Rule


def rules(model: OwlViT, prefix: str) -> tuple[Rule, ...]:
    """``prefix`` stands before the towers: ``owlvit`` or ``owlv2``."""
    table = [
        *vision_rules(model.backbone, "backbone", f"{prefix}.vision_model", pre_norm="pre_layernorm"),
        *text_rules(model.text_tower, "text_tower", f"{prefix}.text_model"),
        Rule("text_head.linear.weight", f"{prefix}.text_projection.weight", LINEAR),
        *affine("merge_norm", "layer_norm"),
        *linear("head.classes.embed", "class_head.dense0"),
        *linear("head.classes.shift", "class_head.logit_shift"),
        *linear("head.classes.scale", "class_head.logit_scale"),
    ]
    parts = {"boxes": "box_head"} | ({} if model.head.objectness is None else {"objectness": "objectness_head"})
    for ours, theirs in parts.items():
        for i in range(3):
            table += linear(f"head.{ours}.layers.{i}", f"{theirs}.dense{i}")
    return tuple(table)


def from_tensors(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, Any]:
    """Vocabulary and number of positions. Raises WeightsError where the file has no such tables."""
    sizes = {}
    for size, table in (("vocab_size", "token"), ("length", "position")):
        name = f"{prefix}.text_model.embeddings.{table}_embedding.weight"
        if name not in tensors:
            raise WeightsError(f"the file has no tensor {name}, which OWL-ViT has")
        sizes[size] = tensors[name].shape[0]
    return sizes


def options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The merging norm has the eps of the image tower."""
    found = from_config(config, activation="quick_gelu", eps=1e-5)
    return {**found, "merge_eps": found["eps"]}


def check(model: OwlViT, config: Mapping[str, Any], kind: str) -> None:
    """Raises WeightsError for another kind of model, and for another number of heads, which no shape shows."""
    check_config(config, {"model_type": kind}, "the model")
    for name, tower in (("text_config", model.text_tower), ("vision_config", model.backbone)):
        heads = tower.encoder.blocks.attention.num_heads
        check_config(config.get(name) or {}, {"num_attention_heads": heads}, f"the model ({name})")


def _layout(name: str, source: str, prefix: str, *, objectness: bool) -> Layout:
    head = "objectness_head.dense0.weight"
    return Layout(
        name=name,
        source=source,
        fits=lambda model: (model.head.objectness is not None) == objectness,
        rules=partial(rules, prefix=prefix),
        marks=(f"{prefix}.vision_model.pre_layernorm.weight", "class_head.dense0.weight", *((head,) * objectness)),
        unlike=() if objectness else (head,),
        ignored=(
            f"{prefix}.visual_projection.weight",
            f"{prefix}.logit_scale",
            "*.embeddings.position_ids",
            "box_bias",
        ),
        options={"head_activation": "gelu", "merge_eps": 1e-5},
        from_config=options,
        from_tensors=partial(from_tensors, prefix=prefix),
        check=partial(check, kind=prefix),
        resample=torch_bicubic,
        classes="",
        kind=OwlViT,
    )


LAYOUTS = (
    _layout("hf_owlvit", "transformers OwlViTForObjectDetection", "owlvit", objectness=False),
    _layout("hf_owlv2", "transformers Owlv2ForObjectDetection", "owlv2", objectness=True),
)
