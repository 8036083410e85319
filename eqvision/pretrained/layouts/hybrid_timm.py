"""timm's ``vit_*_r26_s32_*``, ``vit_*_r50_*`` and ``vit_tiny_r_s16_p8_*`` (timm/models/vision_transformer_hybrid.py).

1e-8 is added to the variance of the weights and 1e-5 to that of the maps (timm/models/resnetv2.py), GELU is exact:
Google's weights, which timm offers too, therefore give slightly other numbers there than in ``hybrid_google.py``.
Without stages the root lies directly in ``patch_embed.backbone``.
"""

from eqvision.backbones import HybridViT
from eqvision.classifiers import Classifier
from eqvision.heads import TokenHead
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts.hybrid_blocks import StemNames, is_hybrid, stem_rules, transformer_rules
from eqvision.pretrained.layouts.vit_timm import TIMM, vit_rules
from eqvision.pretrained.resample import torch_bicubic_antialias
from eqvision.pretrained.rules import CONV, SAME, Rule

RESNET = "patch_embed.backbone"
STEM = StemNames(
    root=(f"{RESNET}.stem.conv", f"{RESNET}.stem.norm"),
    block=f"{RESNET}.stages.{{stage}}.blocks.{{{{}}}}.",
    first=0,
    convs=(("conv1", "norm1"), ("conv2", "norm2"), ("conv3", "norm3")),
    projection=("downsample.conv", "downsample.norm"),
    leaves=(".weight", ".weight", ".bias"),
    conv_op=CONV,
    norm_op=SAME,
)
ROOT_ONLY = STEM._replace(root=(f"{RESNET}.conv", f"{RESNET}.norm"))


def rules(model: Classifier) -> tuple[Rule, ...]:
    """ResNet, transformer and head."""
    assert isinstance(model.backbone, HybridViT)
    stem = stem_rules(model, STEM if model.backbone.stem.stages else ROOT_ONLY)
    return (*stem, *transformer_rules(model, lambda plain: vit_rules(plain, TIMM)))


def fits(model: Classifier) -> bool:
    """A hybrid without the tanh layer of ImageNet-21k, which timm left out."""
    return is_hybrid(model) and isinstance(model.head, TokenHead) and model.head.pre_logits is None


LAYOUT = Layout(
    name="timm_hybrid",
    source="timm VisionTransformer with HybridEmbed",
    fits=fits,
    rules=rules,
    marks=(f"{RESNET}.*conv.weight", f"{RESNET}.*norm.weight", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"),
    options={"activation": "gelu", "conv_eps": 1e-8, "conv_eps_on": "variance", "norm_eps": 1e-5},
    resample=torch_bicubic_antialias,
    positions="backbone.vit.position.weight",
    first_conv="backbone.stem.root.conv.weight",
)
