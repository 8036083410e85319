"""timm's ``mixer_*`` (timm/models/mlp_mixer.py): LayerNorm eps 1e-6, the exact GELU."""

from eqvision.backbones import Mixer
from eqvision.classifiers import Classifier
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts.mixer_google import is_mixer
from eqvision.pretrained.rules import CONV, LINEAR, SAME, Op, Rule


def rules(model: Classifier) -> tuple[Rule, ...]:
    """Patches, blocks, the last norm and the head."""
    assert isinstance(model.backbone, Mixer)
    each = tuple(range(model.backbone.depth))
    parts = (
        ("norm1", "norm1", SAME),
        ("token_mlp.fc1", "mlp_tokens.fc1", LINEAR),
        ("token_mlp.fc2", "mlp_tokens.fc2", LINEAR),
        ("norm2", "norm2", SAME),
        ("channel_mlp.fc1", "mlp_channels.fc1", LINEAR),
        ("channel_mlp.fc2", "mlp_channels.fc2", LINEAR),
    )
    blocks = [_pair(f"backbone.blocks.{ours}", f"blocks.{{}}.{theirs}", op, each) for ours, theirs, op in parts]
    return (
        *_pair("backbone.patch_embed", "stem.proj", CONV),
        *(rule for pair in blocks for rule in pair),
        *_pair("backbone.norm", "norm", SAME),
        *_pair("head.linear", "head", LINEAR),
    )


def _pair(ours: str, theirs: str, op: Op, each: tuple[int, ...] | None = None) -> tuple[Rule, Rule]:
    return Rule(f"{ours}.weight", f"{theirs}.weight", op, each), Rule(f"{ours}.bias", f"{theirs}.bias", each=each)


LAYOUT = Layout(
    name="timm_mixer",
    source="timm MlpMixer",
    fits=is_mixer,
    rules=rules,
    marks=("stem.proj.weight", "blocks.0.mlp_tokens.fc1.weight", "blocks.0.mlp_channels.fc1.weight"),
    options={"activation": "gelu"},
)
