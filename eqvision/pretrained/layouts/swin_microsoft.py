"""microsoft/Swin-Transformer's names (models/swin_transformer.py): merging ends a stage.

Their files also hold what follows from the window and the image: the index of relative positions and the masks of
shifted windows. Their own reader throws both away (utils.py, ``load_pretrained``); here they are not read either.
"""

from eqvision.classifiers import Classifier
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts import swin_timm
from eqvision.pretrained.layouts.swin_blocks import TABLES, is_swin, microsoft_window, swin_rules
from eqvision.pretrained.rules import Rule

NAMES = swin_timm.NAMES._replace(merging=lambda stage: f"layers.{stage - 1}.downsample", head="head")


def rules(model: Classifier) -> tuple[Rule, ...]:
    return swin_rules(model, NAMES)


LAYOUT = Layout(
    name="microsoft_swin",
    source="microsoft/Swin-Transformer",
    fits=is_swin,
    rules=rules,
    marks=(
        "patch_embed.norm.weight",
        "layers.0.blocks.0.attn.relative_position_bias_table",
        "layers.0.downsample.reduction.weight",
    ),
    ignored=("*.attn.relative_position_index", "*.attn_mask"),
    # Their classifier takes one image size only, so the rule shows on none; Hugging Face has theirs for small maps.
    options={"window_rule": "huggingface"},
    tables=TABLES,
    resample_tables=microsoft_window,
)
