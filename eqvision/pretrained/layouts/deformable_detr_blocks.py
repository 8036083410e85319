"""What layouts of Deformable DETR share: all that stands outside the layers, deformable attention, and the heads."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from eqvision.backbones import ResNet
from eqvision.detectors import DeformableDETR
from eqvision.detectors.deformable_detr import ProposedQueries
from eqvision.pretrained.errors import WeightsError
from eqvision.pretrained.layouts.detr_blocks import affine, linear
from eqvision.pretrained.rules import CONV, Op, Rule, Tensors

# One table: position in the first half of the columns, content in the second.
QUERIES = Op(
    lambda theirs: tuple(np.split(theirs[0], 2, axis=1)),
    lambda ours: (np.concatenate(ours, axis=1),),
)


class HeadNames(NamedTuple):
    """Names of the heads with ``{}`` for the layer, and what other names of the same tensors begin with."""

    classes: str
    boxes: str
    inner: str
    """The decoder's own references to the heads: 'transformer.decoder.'."""


def outer_rules(model: DeformableDETR, projections: str, inner: str, queries: str) -> list[Rule]:
    """Projections, level embedding, and what makes queries; ``inner`` is what the transformer's names begin with."""
    table = [Rule("level_embed", f"{inner}.level_embed")]
    for i in range(len(model.projections)):
        ours, theirs = f"projections.{i}", f"{projections}.{i}"
        table += [Rule(f"{ours}.conv.weight", f"{theirs}.0.weight", CONV)]
        table += [Rule(f"{ours}.conv.bias", f"{theirs}.0.bias")]
        table += affine(f"{ours}.norm", f"{theirs}.1")
    if isinstance(model.queries, ProposedQueries):
        table += linear("queries.project", f"{inner}.enc_output") + affine("queries.norm", f"{inner}.enc_output_norm")
        table += linear("queries.embed", f"{inner}.pos_trans")
        return table + affine("queries.embed_norm", f"{inner}.pos_trans_norm")
    table += linear("queries.reference", f"{inner}.reference_points")
    return [*table, Rule(("queries.position", "queries.content"), queries, QUERIES)]


def deformable(ours: str, theirs: str, each: tuple[int, ...]) -> list[Rule]:
    """``MSDeformAttn``, whose parts are called alike everywhere."""
    parts = ("value_proj", "sampling_offsets", "attention_weights", "output_proj")
    return [rule for part in parts for rule in linear(f"{ours}.{part}", f"{theirs}.{part}", each)]


def head_rules(model: DeformableDETR, names: HeadNames) -> list[Rule]:
    """One head for all layers is the file's first."""
    each = tuple(range(model.head.count))
    table = linear("head.classes", names.classes, each)
    for i in range(len(model.head.boxes.layers)):
        table += linear(f"head.boxes.layers.{i}", f"{names.boxes}.layers.{i}", each)
    return table


def one_name_each(model: DeformableDETR, tensors: Tensors, names: HeadNames, where: str) -> dict[str, np.ndarray]:
    """The file's tensors with those of the heads under one name each.

    Files have them twice, as the model's and as the decoder's, or under either name; a head that all layers share
    once for each layer, or once. Raises WeightsError where copies differ, since then it is another model's file.
    """
    found: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        head = name.removeprefix(names.inner)
        kind = {"class_embed": names.classes, "bbox_embed": names.boxes}.get(head.split(".")[0])
        if kind is not None:
            layer, _, rest = head.split(".", 1)[1].partition(".")
            _put(found, f"{kind.format(layer)}.{rest}", tensor, name, where)
        else:
            found[name] = tensor
    for pattern in (names.classes, names.boxes):
        _share(found, pattern, model.head.count, model.decoder.depth, where)
    return found


def _put(found: dict[str, np.ndarray], name: str, tensor: np.ndarray, source: str, where: str) -> None:
    if name in found and not np.array_equal(found[name], tensor):
        raise WeightsError(f"{where}: {source} and {name} are one head in this layout, and their numbers differ")
    found[name] = tensor


def _share(found: dict[str, np.ndarray], pattern: str, count: int, depth: int, where: str) -> None:
    """One head stored for every layer -> the first; heads that the file ties -> one for every layer."""
    first = {name: found[name] for name in found if name.startswith(f"{pattern.format(0)}.")}
    others = range(1, max(count, depth))
    for name, tensor in first.items():
        rest = name.removeprefix(pattern.format(0))
        copies = [f"{pattern.format(i)}{rest}" for i in others]
        if count == 1:
            for copy in copies:
                if copy in found and not np.array_equal(found.pop(copy), tensor):
                    raise WeightsError(
                        f"{where}: {copy} differs from {name}, and this model has one head for all layers; "
                        "the file is of a model with box refinement: choose a name with _refine or _two_stage"
                    )
        elif not any(copy in found for copy in copies):
            found.update(dict.fromkeys(copies, tensor))


def is_resnet(model: DeformableDETR) -> bool:
    """Whether the backbone is one that published weights have."""
    return isinstance(model.backbone, ResNet) and model.backbone.pool_stem


def check_sizes(model: DeformableDETR, config: Mapping[str, object]) -> None:
    """Raises WeightsError where ``config.json`` has another number of heads or points, or another stride.

    The number of heads and of points show in the names only as their product.
    """
    encoder, decoder = model.encoder.layers.attention, model.decoder.layers
    expected = {
        "encoder_attention_heads": encoder.num_heads,
        "encoder_n_points": encoder.num_points,
        "decoder_attention_heads": decoder.self_attention.num_heads,
        "decoder_n_points": decoder.cross_attention.num_points,
        "dilation": model.backbone.strides[-1] == 16,
    }
    for name, ours in expected.items():
        if config.get(name, ours) != ours:
            raise WeightsError(
                f"config.json has {name} {config[name]} and the model has {ours}; "
                "choose the name with or without _dc5, or build the model with these sizes"
            )
