"""facebookresearch/dinov2: dinov2/models/vision_transformer.py, dinov2/hub/backbones.py and dinov2/hub/classifiers.py.

Blocks as timm names them, but the gated MLP of the giant (``mlp.w12``, ``mlp.w3``). Registers join after the positions,
of which the class token has one. ``mask_token`` serves pre-training and is not read. The files of the hub hold the
backbone alone; ``state_dict()`` of a hub classifier (``dinov2_vitb14_lc``, ``layers=1``) holds both.
"""

from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts.vit_timm import (
    BLOCKS,
    OPTIONS,
    Names,
    fits,
    has_class_position,
    has_registers,
    vit_rules,
)
from eqvision.pretrained.resample import dinov2_bicubic, torch_bicubic_antialias

DINOV2 = Names(gated=("mlp.w12", "mlp.w3"), registers="register_tokens")
CLASSIFIER = DINOV2._replace(body="backbone.", head="linear_head")


def _layout(name: str, source: str, names: Names, registers: bool) -> Layout:
    """The hub builds models with registers with antialias and without the offset of 0.1."""
    marks = tuple(f"{names.body}{mark}" for mark in (*BLOCKS, "mask_token", "blocks.0.ls1.gamma"))
    theirs = f"{names.body}register_tokens"
    return Layout(
        name=name,
        source=source,
        fits=lambda model: fits(model) and has_class_position(model) and has_registers(model) == registers,
        rules=lambda model: vit_rules(model, names),
        marks=(*marks, theirs) if registers else marks,
        unlike=() if registers else (theirs,),
        ignored=(f"{names.body}mask_token",),
        options={**OPTIONS, "position_on_class": True},
        resample=torch_bicubic_antialias if registers else dinov2_bicubic,
    )


LAYOUTS = (
    _layout("dinov2_vit", "facebookresearch/dinov2", DINOV2, registers=False),
    _layout("dinov2_vit_reg", "facebookresearch/dinov2 with registers", DINOV2, registers=True),
    _layout("dinov2_linear", "facebookresearch/dinov2 linear classifier", CLASSIFIER, registers=False),
    _layout("dinov2_linear_reg", "facebookresearch/dinov2 linear classifier, registers", CLASSIFIER, registers=True),
)
