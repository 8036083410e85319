"""MLP-Mixer of google-research/vision_transformer: the ``.npz`` files of the Mixer and SAM papers.

Names from vit_jax/models_mixer.py; kernels are (in, out) and (height, width, in, out), as ours are. LayerNorm has eps
1e-6 and GELU is the tanh form, Flax's defaults.
"""

from eqvision.backbones import Mixer
from eqvision.classifiers import Classifier
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts.vit_flax import dense_rules, mlp_rules, norm_rules
from eqvision.pretrained.rules import Rule


def is_mixer(model: Classifier) -> bool:
    """Whether a model is an MLP-Mixer."""
    return isinstance(model.backbone, Mixer)


def rules(model: Classifier) -> tuple[Rule, ...]:
    """Patches, blocks, the last norm and the head."""
    assert isinstance(model.backbone, Mixer)
    ours, theirs, each = "backbone.blocks", "MixerBlock_{}", tuple(range(model.backbone.depth))
    return (
        *dense_rules("backbone.patch_embed", "stem"),
        *norm_rules(f"{ours}.norm1", f"{theirs}/LayerNorm_0", each),
        *mlp_rules(f"{ours}.token_mlp", f"{theirs}/token_mixing", each),
        *norm_rules(f"{ours}.norm2", f"{theirs}/LayerNorm_1", each),
        *mlp_rules(f"{ours}.channel_mlp", f"{theirs}/channel_mixing", each),
        *norm_rules("backbone.norm", "pre_head_layer_norm"),
        *dense_rules("head.linear", "head"),
    )


LAYOUT = Layout(
    name="google_mixer",
    source="google-research/vision_transformer MLP-Mixer",
    fits=is_mixer,
    rules=rules,
    marks=("stem/kernel", "MixerBlock_0/token_mixing/Dense_0/kernel", "pre_head_layer_norm/scale"),
    options={"activation": "gelu_tanh"},
)
