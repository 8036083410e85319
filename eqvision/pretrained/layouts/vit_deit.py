"""facebookresearch/deit and facebookresearch/mae: timm's names, and positions resampled without antialias.

deit/models.py (DeiT, with and without distillation), deit/models_v2.py (DeiT III, ``*_LS``), mae/models_vit.py and
mae/models_mae.py (checkpoint files); deit/main.py and mae/util/pos_embed.py for the resampling.
"""

from eqvision.backbones import VisionTransformer
from eqvision.classifiers import Classifier
from eqvision.heads import TokenHead
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts.vit_timm import BLOCKS, OPTIONS, TIMM, Names, fits, vit_rules
from eqvision.pretrained.resample import torch_bicubic

DEIT3 = Names(scales=("gamma_1", "gamma_2"))


def _fits_mae(model: Classifier) -> bool:
    return fits(model) and isinstance(model.head, TokenHead) and model.head.norm is None


def _fits_deit3(model: Classifier) -> bool:
    backbone = model.backbone
    if not fits(model) or not isinstance(backbone, VisionTransformer):
        return False
    return backbone.encoder.blocks.scale1 is not None and backbone.class_position is None


LAYOUTS = (
    # The whole of MAE's pre-training: the encoder is read. Its encoder alone has timm's names.
    Layout(
        name="mae_vit",
        source="facebookresearch/mae, pre-training with decoder",
        fits=_fits_mae,
        rules=lambda model: vit_rules(model, TIMM),
        marks=(*BLOCKS, "mask_token", "decoder_embed.weight"),
        ignored=("mask_token", "decoder_*"),
        options=OPTIONS,
        resample=torch_bicubic,
    ),
    # These files cannot be told from timm's, and it is the resampling alone that differs: only layout=... chooses it.
    Layout(
        name="facebook_vit",
        source="facebookresearch/deit and facebookresearch/mae",
        fits=fits,
        rules=lambda model: vit_rules(model, TIMM),
        marks=BLOCKS,
        unlike=("*",),
        options=OPTIONS,
        resample=torch_bicubic,
    ),
    Layout(
        name="facebook_deit3",
        source="facebookresearch/deit, DeiT III",
        fits=_fits_deit3,
        rules=lambda model: vit_rules(model, DEIT3),
        marks=(*BLOCKS, "blocks.0.gamma_1"),
        options={**OPTIONS, "position_on_class": False},
        resample=torch_bicubic,
    ),
)
