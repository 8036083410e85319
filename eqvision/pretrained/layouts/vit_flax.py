"""What the ViTs of Google's three code bases share: Flax's parameters of a transformer, as rules.

Kernels are (in, out) as ours are; those of attention keep heads apart: (d, heads, d / heads), and the one behind it
(heads, d / heads, d). Facts from vit_jax/models_vit.py (google-research/vision_transformer), big_vision/models/vit.py
and scenic/projects/baselines/vit.py. All three have LayerNorm with eps 1e-6 and the tanh GELU, Flax's defaults.
"""

from typing import NamedTuple

from eqvision.backbones import VisionTransformer
from eqvision.classifiers import Classifier
from eqvision.heads import AttentionPool, TokenHead
from eqvision.layers import PositionEmbedding2D
from eqvision.pretrained.position import square_table
from eqvision.pretrained.rules import Rule, reshaped

Each = tuple[int, ...] | None


class Names(NamedTuple):
    """Parameters that the code bases call differently; paths are joined by ``/``."""

    prefix: str = ""
    blocks: str = "encoderblock_{}"
    """``encoderblock`` where the blocks are stacked along a first axis, as ``nn.scan`` has them."""
    attention: str = "MultiHeadDotProductAttention_0"
    norm2: str = "LayerNorm_1"
    mlp: str = "MlpBlock_0"
    position: str = "Transformer/posembed_input/pos_embedding"
    head: str = "head"


def flax_vit_rules(model: Classifier, names: Names) -> tuple[Rule, ...]:
    """The whole classifier: patches, tokens, positions, blocks, pooling and head."""
    assert isinstance(model.backbone, VisionTransformer)
    assert isinstance(model.head, TokenHead)
    encoder = f"{names.prefix}Transformer"
    table = _embedding(model.backbone, names)
    table += _blocks(model.backbone, f"{encoder}/{names.blocks}", names)
    table += norm_rules("backbone.norm", f"{encoder}/encoder_norm")
    return (*table, *_head(model.head, names))


def is_plain_vit(model: Classifier) -> bool:
    """Whether a model is of the family; what of it a file lacks is then said leaf by leaf."""
    return isinstance(model.backbone, VisionTransformer) and isinstance(model.head, TokenHead)


def _embedding(vit: VisionTransformer, names: Names) -> list[Rule]:
    table = dense_rules("backbone.patch_embed", f"{names.prefix}embedding")
    if vit.class_token is not None:
        width = vit.channels[0]
        table.append(Rule("backbone.class_token", f"{names.prefix}cls", reshaped((1, 1, width), (width,))))
    if isinstance(vit.position, PositionEmbedding2D):
        tokens = () if vit.class_position is None else ("backbone.class_position",)
        ours = (*tokens, "backbone.position.weight")
        table.append(Rule(ours, f"{names.prefix}{names.position}", square_table(len(tokens))))
    return table


def _blocks(vit: VisionTransformer, theirs: str, names: Names) -> list[Rule]:
    ours, each = "backbone.encoder.blocks", tuple(range(vit.encoder.depth))
    width, heads = vit.channels[0], vit.encoder.blocks.attention.num_heads
    return [
        *norm_rules(f"{ours}.norm1", f"{theirs}/LayerNorm_0", each),
        *attention_rules(f"{ours}.attention", f"{theirs}/{names.attention}", width, heads, each),
        *norm_rules(f"{ours}.norm2", f"{theirs}/{names.norm2}", each),
        *mlp_rules(f"{ours}.mlp", f"{theirs}/{names.mlp}", each),
    ]


def _head(head: TokenHead, names: Names) -> list[Rule]:
    table = []
    if head.map_pool is not None:
        table += _map_rules(head.map_pool, "head.map_pool", f"{names.prefix}MAPHead_0")
    if head.pre_logits is not None:
        table += dense_rules("head.pre_logits", f"{names.prefix}pre_logits")
    return table + dense_rules("head.linear", f"{names.prefix}{names.head}")


def _map_rules(pool: AttentionPool, ours: str, theirs: str) -> list[Rule]:
    width = pool.probe.shape[1]
    return [
        Rule(f"{ours}.probe", f"{theirs}/probe", reshaped((1, 1, width), (1, width))),
        *attention_rules(
            f"{ours}.attention", f"{theirs}/MultiHeadDotProductAttention_0", width, pool.attention.num_heads
        ),
        *norm_rules(f"{ours}.norm", f"{theirs}/LayerNorm_0"),
        *mlp_rules(f"{ours}.mlp", f"{theirs}/MlpBlock_0"),
    ]


def dense_rules(ours: str, theirs: str, each: Each = None) -> list[Rule]:
    """``nn.Dense``."""
    return [
        Rule(f"{ours}.weight", f"{theirs}/kernel", each=each),
        Rule(f"{ours}.bias", f"{theirs}/bias", each=each),
    ]


def norm_rules(ours: str, theirs: str, each: Each = None) -> list[Rule]:
    """``nn.LayerNorm``."""
    return [
        Rule(f"{ours}.weight", f"{theirs}/scale", each=each),
        Rule(f"{ours}.bias", f"{theirs}/bias", each=each),
    ]


def mlp_rules(ours: str, theirs: str, each: Each = None) -> list[Rule]:
    """``MlpBlock``."""
    return dense_rules(f"{ours}.fc1", f"{theirs}/Dense_0", each) + dense_rules(f"{ours}.fc2", f"{theirs}/Dense_1", each)


def attention_rules(ours: str, theirs: str, width: int, heads: int, each: Each = None) -> list[Rule]:
    """``nn.MultiHeadDotProductAttention`` of ``width`` features in and out."""
    size = width // heads
    table = []
    for name in ("query", "key", "value"):
        kernel, bias = reshaped((width, heads, size), (width, width)), reshaped((heads, size), (width,))
        table.append(Rule(f"{ours}.{name}.weight", f"{theirs}/{name}/kernel", kernel, each))
        table.append(Rule(f"{ours}.{name}.bias", f"{theirs}/{name}/bias", bias, each))
    back = reshaped((heads, size, width), (width, width))
    table.append(Rule(f"{ours}.out.weight", f"{theirs}/out/kernel", back, each))
    table.append(Rule(f"{ours}.out.bias", f"{theirs}/out/bias", each=each))
    return table
