"""ViT of google-research/big_vision: ``.npz`` files whose names are joined by ``/``.

Facts from big_vision/models/vit.py. The training state around the parameters (``load_params`` of big_vision/utils.py)
is left out as the file is read. Of SigLIP's files the image encoder, ``img/``, is read. Blocks are apart
(``encoderblock_0``) or stacked (``encoderblock``, from ``scan=True``). The position table is added before a class token
joins, and has no row for one; it is resampled by SciPy's linear zoom.
"""

from functools import partial

from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts.vit_flax import Names, flax_vit_rules, is_plain_vit
from eqvision.pretrained.resample import scipy_zoom


def _layout(name: str, prefix: str, ignored: tuple[str, ...], *, stacked: bool) -> Layout:
    blocks = "encoderblock" if stacked else "encoderblock_{}"
    block = f"{prefix}Transformer/{blocks.format(0)}"
    return Layout(
        name=f"{name}_stacked" if stacked else name,
        source=f"big_vision ViT{', blocks stacked' if stacked else ''}",
        fits=is_plain_vit,
        rules=partial(flax_vit_rules, names=Names(prefix=prefix, blocks=blocks, position="pos_embedding")),
        marks=(
            f"{prefix}embedding/kernel",
            f"{block}/MultiHeadDotProductAttention_0/query/kernel",
            f"{block}/LayerNorm_1/scale",
        ),
        # Scenic's names, which differ in these
        unlike=(f"{prefix}Transformer/posembed_input/pos_embedding", f"{prefix}output_projection/kernel"),
        ignored=ignored,
        options={"activation": "gelu_tanh", "position_on_class": False},
        resample=scipy_zoom,
    )


# The text encoder, and temperature and bias of SigLIP's loss.
TEXT = ("txt/*", "t", "b")

LAYOUTS = tuple(
    _layout(name, prefix, ignored, stacked=stacked)
    for name, prefix, ignored in (("big_vision_vit", "", ()), ("big_vision_siglip", "img/", TEXT))
    for stacked in (False, True)
)
