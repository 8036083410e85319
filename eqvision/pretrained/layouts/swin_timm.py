"""timm's Swin: merging begins a stage, and the head lies below ``head.fc`` (timm/models/swin_transformer.py)."""

from eqvision.classifiers import Classifier
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts.swin_blocks import TABLES, SwinNames, is_swin, swin_rules, timm_window
from eqvision.pretrained.rules import Rule

NAMES = SwinNames(
    patch_embed="patch_embed.proj",
    patch_norm="patch_embed.norm",
    block=lambda stage: f"layers.{stage}.blocks.{{}}",
    merging=lambda stage: f"layers.{stage}.downsample",
    norm1="norm1",
    qkv=("attn.qkv",),
    out="attn.proj",
    table="attn.relative_position_bias_table",
    norm2="norm2",
    fc1="mlp.fc1",
    fc2="mlp.fc2",
    norm="norm",
    head="head.fc",
)


def rules(model: Classifier) -> tuple[Rule, ...]:
    return swin_rules(model, NAMES)


LAYOUT = Layout(
    name="timm_swin",
    source="timm SwinTransformer",
    fits=is_swin,
    rules=rules,
    marks=(
        "patch_embed.norm.weight",
        "layers.0.blocks.0.attn.relative_position_bias_table",
        "layers.1.downsample.reduction.weight",
    ),
    # Stages that end with merging are the original's; so is a file with the head's weights directly below ``head``.
    unlike=("layers.0.downsample.*", "head.weight"),
    options={"window_rule": "timm"},
    tables=TABLES,
    resample_tables=timm_window,
)
