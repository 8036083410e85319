"""Hybrid ViT of google-research/vision_transformer: the ``.npz`` files R+Ti/16, R26+S/32, R50+B/16, R50+L/32.

Names from vit_jax/models_resnet.py and models_vit.py; the transformer's are those of ``vit_google.py``, and the
ImageNet-21k weights of R50+B/16 have ``pre_logits``. 1e-5 is added to the standard deviation of the weights, and 1e-6,
Flax's default, to the variance of the maps; convolutions and pooling are padded as TensorFlow does ("SAME").
Published group norms have shape (1, 1, 1, c); vit_jax/checkpoint.py reads these and (c,) alike.
"""

import numpy as np

from eqvision.classifiers import Classifier
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts.hybrid_blocks import StemNames, is_hybrid, stem_rules, transformer_rules
from eqvision.pretrained.layouts.vit_flax import flax_vit_rules
from eqvision.pretrained.layouts.vit_google import PRE_LINEN
from eqvision.pretrained.resample import scipy_zoom
from eqvision.pretrained.rules import SAME, Rule, ShapeError, elementwise


def _flat(x: np.ndarray) -> np.ndarray:
    if x.shape[:-1] not in ((), (1, 1, 1)):
        raise ShapeError(x.shape, (1, 1, 1, x.shape[-1]))
    return x.reshape(-1)


STEM = StemNames(
    root=("conv_root", "gn_root"),
    block="block{stage}/unit{{}}/",
    first=1,
    convs=(("conv1", "gn1"), ("conv2", "gn2"), ("conv3", "gn3")),
    projection=("conv_proj", "gn_proj"),
    leaves=("/kernel", "/scale", "/bias"),
    conv_op=SAME,
    norm_op=elementwise(_flat, lambda x: x.reshape(1, 1, 1, -1)),
)


def rules(model: Classifier) -> tuple[Rule, ...]:
    """ResNet, transformer and head."""
    return (*stem_rules(model, STEM), *transformer_rules(model, lambda plain: flax_vit_rules(plain, PRE_LINEN)))


LAYOUT = Layout(
    name="google_hybrid",
    source="google-research/vision_transformer R+ViT",
    fits=is_hybrid,
    rules=rules,
    marks=(
        "conv_root/kernel",
        "gn_root/scale",
        "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel",
    ),
    options={"activation": "gelu_tanh", "conv_eps": 1e-5, "conv_eps_on": "deviation", "norm_eps": 1e-6},
    resample=scipy_zoom,
    positions="backbone.vit.position.weight",
    first_conv="backbone.stem.root.conv.weight",
)
