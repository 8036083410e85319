"""R-CNNs on ViTDet, ConvNeXt and Swin: tensors as detectron2 publishes them, and images of all shapes."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvision.backbones.convnext import ConvNeXtSize
from eqvision.backbones.swin import SwinSize
from eqvision.backbones.vit import ViTSize
from eqvision.backbones.vitdet import VitDet
from eqvision.detectors import (
    cascade_mask_rcnn_vitdet_b,
    mask_rcnn_vitdet_b,
    mask_rcnn_vitdet_h,
    mask_rcnn_vitdet_l,
    rcnn_convnext_fpn,
    rcnn_on_vitdet,
    rcnn_swin_fpn,
)
from eqvision.names import UnknownNameError
from eqvision.types import PaddedImages

KEY = jax.eval_shape(jax.random.key, 0)
ANCHORS = ((8.0,), (16.0,), (32.0,), (64.0,), (128.0,))
TINY = {"num_classes": 3, "width": 16, "head_width": 16, "anchor_sizes": ANCHORS}


def abstract(build, **options):
    return eqx.filter_eval_shape(lambda key: eqx.nn.make_with_state(build)(**options, key=key), KEY)


def sizes(tree):
    return sorted(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def affine(*shape):
    return [shape, shape[:1]]


def conv_norm(out, inner, window):
    return [(out, inner, window, window), (out,), (out,)]


def published_backbone(d, depth, heads, whole):
    """Shapes under ``backbone.net`` without the class token's row of ``pos_embed``."""
    shapes = [(1, 196, d), *affine(d, 3, 16, 16)]
    for i in range(depth):
        side = 64 if i in whole else 14
        shapes += [(d,)] * 4 + affine(3 * d, d) + affine(d, d) + affine(4 * d, d) + affine(d, 4 * d)
        shapes += [(2 * side - 1, d // heads)] * 2
    return shapes


def published_neck(d):
    """Those of ``backbone.simfp_2`` to ``simfp_5``; transposed convolutions are (in, out, 2, 2)."""
    up = [(d, d // 2, 2, 2), (d // 2,)]
    quarter = [*up, (d // 2,), (d // 2,), (d // 2, d // 4, 2, 2), (d // 4,)]
    ends = [conv_norm(256, inner, 1) + conv_norm(256, 256, 3) for inner in (d // 4, d // 2, d, d)]
    return [*quarter, *up, *(shape for end in ends for shape in end)]


RPN = [*affine(256, 256, 3, 3), *affine(256, 256, 3, 3), *affine(3, 256, 1, 1), *affine(12, 256, 1, 1)]
FOUR = conv_norm(256, 256, 3) * 4
MASK = [*FOUR, (256, 256, 2, 2), (256,), *affine(80, 256, 1, 1)]


def box_head(boxes):
    return [*FOUR, *affine(1024, 256 * 7 * 7), *affine(81, 1024), *affine(4 * boxes, 1024)]


def count(shapes):
    return sorted(math.prod(shape) for shape in shapes)


@pytest.mark.parametrize(
    ("build", "size", "total"),
    [
        (mask_rcnn_vitdet_b, (768, 12, 12, (2, 5, 8, 11)), 110_895_024),
        (mask_rcnn_vitdet_l, (1024, 24, 16, (5, 11, 17, 23)), 330_683_632),
        (mask_rcnn_vitdet_h, (1280, 32, 16, (7, 15, 23, 31)), 661_202_480),
        (cascade_mask_rcnn_vitdet_b, (768, 12, 12, (2, 5, 8, 11)), 141_160_222),
    ],
)
def test_tensors_of_detectron2(build, size, total):
    """Li et al. 2022 count 111, 331 and 662 million parameters, and 141 million for the cascade."""
    model, _ = abstract(build)
    assert sum(sizes(model.backbone)) == sum(count(published_backbone(*size)))
    assert sizes(model.neck) == count(published_neck(size[0]))
    assert sizes(model.rpn) == count(RPN)
    cascade = build is cascade_mask_rcnn_vitdet_b
    assert len(model.box_heads) == (3 if cascade else 1)
    assert all(sizes(head) == count(box_head(1 if cascade else 80)) for head in model.box_heads)
    assert sizes(model.mask_head) == count(MASK)
    assert sum(sizes(model)) == total


def test_unknown_sizes():
    with pytest.raises(UnknownNameError, match="tiny"):
        abstract(rcnn_convnext_fpn, size="tini")
    with pytest.raises(UnknownNameError, match=r"\bb\b"):
        abstract(rcnn_swin_fpn, size="x")
    with pytest.raises(UnknownNameError, match="mmdet"):
        abstract(rcnn_swin_fpn, dialect="mmdetection")


# Images


def tiny_vitdet(*, key):
    keys = jax.random.split(key)
    size = ViTSize(width=16, depth=2, mlp_dim=32, num_heads=2)
    net = VitDet(size, 16, image_size=64, position_size=32, window=3, global_blocks=(1,), key=keys[0])
    return rcnn_on_vitdet(net, **TINY, key=keys[1])


def tiny_convnext(*, key):
    return rcnn_convnext_fpn(ConvNeXtSize((1, 1, 1, 1), (8, 16, 24, 32)), **TINY, key=key)


def tiny_swin(*, key):
    return rcnn_swin_fpn(SwinSize(8, (2, 2, 2, 2), (1, 1, 2, 2)), 4, **TINY, key=key)


def inputs_of(height, width):
    return PaddedImages(jax.random.normal(jax.random.key(1), (1, height, width, 3)), jnp.array([[height, width]]))


@pytest.mark.slow
@pytest.mark.parametrize("build", [tiny_vitdet, tiny_convnext, tiny_swin])
def test_images_of_all_shapes(build):
    """Maps of one that 32 does not divide are computed, those of others planned, and so are the objects."""
    model, state = eqx.nn.make_with_state(build)(key=jax.random.key(0))
    for side in ((64, 64), (128, 128), (64, 112)):
        maps, _ = eqx.filter_eval_shape(model.features, inputs_of(*side), state)
        assert [x.shape[1:3] for x in maps[:3]] == [(side[0] // s, side[1] // s) for s in (4, 8, 16)]
        assert len(maps) == 5
    maps, _ = eqx.filter_jit(model.features)(inputs_of(48, 80), state)
    assert all(np.isfinite(x).all() and np.any(x) for x in maps)
    found, _ = eqx.filter_eval_shape(model, inputs_of(48, 80), state)
    assert found.masks.shape == (1, 100, 28, 28)


@pytest.mark.slow
def test_objects_of_a_vitdet():
    model, state = eqx.nn.make_with_state(tiny_vitdet)(key=jax.random.key(0))
    found, _ = eqx.filter_jit(model)(inputs_of(48, 80), state)
    assert all(np.isfinite(x).all() for x in found)
    assert found.valid.any()
