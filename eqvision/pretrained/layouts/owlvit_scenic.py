"""Names of Scenic's OWL-ViT and OWLv2: Flax parameters joined by ``/``.

Facts from scenic/projects/owl_vit: models.py (also how the names of earlier files differ), layers.py, clip/layers.py.
The heads have Flax's tanh GELU, and the norm behind the product with the class token its eps 1e-6; CLIP's towers are as
everywhere. CLIP's temperature has no part in detection. Positions are resampled by ``resize_posemb`` of utils.py:
SciPy's linear zoom.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from eqvision.detectors.owlvit import OwlViT
from eqvision.pretrained.errors import WeightsError
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts.clip_hf import grid_table
from eqvision.pretrained.layouts.vit_flax import attention_rules, dense_rules, norm_rules
from eqvision.pretrained.resample import scipy_zoom
from eqvision.pretrained.rules import Rule

CLIP = "backbone/clip"
TOKENS = f"{CLIP}/text/token_embedding/embedding"
POSITIONS = f"{CLIP}/text/positional_embedding"


def rules(model: OwlViT) -> tuple[Rule, ...]:
    visual, text = f"{CLIP}/visual", f"{CLIP}/text"
    table = [
        Rule("backbone.patch_embed.weight", f"{visual}/conv1/kernel"),
        Rule("backbone.class_token", f"{visual}/class_embedding"),
        Rule(("backbone.class_position", "backbone.position.weight"), f"{visual}/positional_embedding", grid_table(1)),
        *norm_rules("backbone.pre_norm", f"{visual}/ln_pre"),
        *_blocks(model.backbone.encoder, "backbone.encoder.blocks", visual),
        *norm_rules("backbone.norm", f"{visual}/ln_post"),
        Rule("text_tower.token_embedding.weight", TOKENS),
        Rule("text_tower.position.weight", POSITIONS),
        *_blocks(model.text_tower.encoder, "text_tower.encoder.blocks", text),
        *norm_rules("text_tower.norm", f"{text}/ln_final"),
        Rule("text_head.linear.weight", f"{text}/text_projection/kernel"),
        *norm_rules("merge_norm", "backbone/merged_class_token"),
        *dense_rules("head.classes.embed", "class_head/Dense_0"),
        *dense_rules("head.classes.shift", "class_head/logit_shift"),
        *dense_rules("head.classes.scale", "class_head/logit_scale"),
    ]
    parts = {"boxes": "obj_box_head"} | ({} if model.head.objectness is None else {"objectness": "objectness_head"})
    for ours, theirs in parts.items():
        for i in range(3):
            table += dense_rules(f"head.{ours}.layers.{i}", f"{theirs}/Dense_{i}")
    return tuple(table)


def _blocks(stack: Any, ours: str, tower: str) -> list[Rule]:
    theirs, each = f"{tower}/transformer/resblocks_{{}}", tuple(range(stack.depth))
    width, heads = stack.blocks.attention.query.weight.shape[-1], stack.blocks.attention.num_heads
    return [
        *norm_rules(f"{ours}.norm1", f"{theirs}/ln_0", each),
        *attention_rules(f"{ours}.attention", f"{theirs}/attn", width, heads, each),
        *norm_rules(f"{ours}.norm2", f"{theirs}/ln_1", each),
        *dense_rules(f"{ours}.mlp.fc1", f"{theirs}/mlp/c_fc", each),
        *dense_rules(f"{ours}.mlp.fc2", f"{theirs}/mlp/c_proj", each),
    ]


def with_new_names(model: Any, tensors: Mapping[str, np.ndarray], where: str) -> Mapping[str, np.ndarray]:
    """Blocks were ``resblocks.0`` and their norms ``ln_1`` and ``ln_2``; a tower is of one kind or the other."""
    new = {re.sub(r"/resblocks\.(\d+)/", r"/resblocks_\1/", name): tensor for name, tensor in tensors.items()}
    for tower in ("visual", "text"):
        block = f"{CLIP}/{tower}/transformer/resblocks_"
        if not any(name.startswith(block) and "/ln_0/" in name for name in new):
            new = {_renumbered(name) if name.startswith(block) else name: tensor for name, tensor in new.items()}
    return new


def _renumbered(name: str) -> str:
    return re.sub(r"/ln_([12])/", lambda found: f"/ln_{int(found[1]) - 1}/", name)


def from_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Vocabulary and number of positions. Raises WeightsError where the file has no such tables."""
    absent = [name for name in (TOKENS, POSITIONS) if name not in tensors]
    if absent:
        raise WeightsError(f"the file has no tensor {', '.join(absent)}, which OWL-ViT has")
    return {"vocab_size": tensors[TOKENS].shape[0], "length": tensors[POSITIONS].shape[0]}


def _layout(name: str, source: str, *, objectness: bool) -> Layout:
    head = "objectness_head/Dense_0/kernel"
    return Layout(
        name=name,
        source=source,
        fits=lambda model: (model.head.objectness is not None) == objectness,
        rules=rules,
        marks=(f"{CLIP}/visual/conv1/kernel", "obj_box_head/Dense_0/kernel", *((head,) * objectness)),
        unlike=("obj_mask_head/*", *(() if objectness else (head,))),
        ignored=(f"{CLIP}/logit_scale", "class_head/padding", "class_head/padding_bias"),
        options={"head_activation": "gelu_tanh", "merge_eps": 1e-6},
        from_tensors=from_tensors,
        prepare=with_new_names,
        resample=scipy_zoom,
        classes="",
        kind=OwlViT,
    )


LAYOUTS = (
    _layout("scenic_owlvit", "Scenic OWL-ViT", objectness=False),
    _layout("scenic_owlv2", "Scenic OWLv2", objectness=True),
)
