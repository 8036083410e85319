"""ViT of google-research/scenic: Flax checkpoints, names joined by ``/``.

Facts from scenic/projects/baselines/vit.py. The training state around the parameters (``TrainState`` of
scenic/train_lib/train_utils.py) is left out as the file is read. The position table has a row for the class token;
positions are resampled by ``_merge_params`` of the first file: SciPy's linear zoom.
"""

from functools import partial

from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts.vit_flax import Names, flax_vit_rules, is_plain_vit
from eqvision.pretrained.resample import scipy_zoom

LAYOUT = Layout(
    name="scenic_vit",
    source="Scenic ViT",
    fits=is_plain_vit,
    rules=partial(flax_vit_rules, names=Names(head="output_projection")),
    marks=(
        "embedding/kernel",
        "Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel",
        "output_projection/kernel",
    ),
    unlike=("conv_root/kernel",),  # a hybrid's
    options={"activation": "gelu_tanh"},
    resample=scipy_zoom,
)
