"""ViT of google-research/vision_transformer: the ``.npz`` files of the ViT, SAM and AugReg papers.

Published files have the names that Flax gave before its ``linen`` interface: one running number over all parts of a
block (``LayerNorm_0``, ``MultiHeadDotProductAttention_1``, ``LayerNorm_2``, ``MlpBlock_3``), which are converted as
vit_jax/checkpoint.py reads them. The position table has a row for the class token. ``pre_logits`` is in the
ImageNet-21k files of the first paper only. Positions are resampled by ``interpolate_posembed`` of the same file:
SciPy's linear zoom.
"""

from functools import partial

from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts.vit_flax import Names, flax_vit_rules, is_plain_vit
from eqvision.pretrained.resample import scipy_zoom

PRE_LINEN = Names(attention="MultiHeadDotProductAttention_1", norm2="LayerNorm_2", mlp="MlpBlock_3")


LAYOUT = Layout(
    name="google_vit",
    source="google-research/vision_transformer ViT",
    fits=is_plain_vit,
    rules=partial(flax_vit_rules, names=PRE_LINEN),
    marks=(
        "embedding/kernel",
        "Transformer/encoderblock_0/LayerNorm_2/scale",
        "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel",
    ),
    unlike=("conv_root/kernel",),  # a hybrid's
    options={"activation": "gelu_tanh"},
    resample=scipy_zoom,
)
