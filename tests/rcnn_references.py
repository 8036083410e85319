"""torchvision's proposal network, RoI heads and whole Mask R-CNN, small and random, and the same weights in ours."""

import dataclasses
from collections.abc import Iterator

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eqvision.backbones.resnet import DEPTHS
from eqvision.detectors import RCNN, TORCHVISION, ProposalRule, rcnn_resnet_fpn
from eqvision.heads import RoIBoxHead, RoIMaskHead, RPNHead
from eqvision.ops.iou_assignment import ROI_RULES, RPN_RULES

STRIDES = (4, 8, 16, 32, 64)
CHANNELS, WIDTH, CLASSES, THIN = 8, 24, 4, 8
SIZE = (96, 128)
ANCHORS = ((8.0,), (16.0,), (32.0,), (64.0,), (128.0,))
ALL = 8192  # draws every box there is, so nothing is left to chance
LEVEL, KEPT = 60, 40
DEPTH = 14  # a ResNet of one bottleneck in each stage


class GivenMaps(eqx.Module):
    """Stands for backbone and neck, where features are given."""

    channels: tuple[int, ...] = eqx.field(static=True, default=(CHANNELS,) * 5)
    strides: tuple[int, ...] = eqx.field(static=True, default=STRIDES)
    in_channels: int = eqx.field(static=True, default=3)

    def __call__(self, images, state, *, train=False, key=None):
        raise NotImplementedError

    def intermediates(self, images, state, layers):
        raise NotImplementedError


def dialect(anchors=ALL, boxes=ALL, **options):
    """torchvision's, with small numbers of proposals; ``anchors`` and ``boxes`` are how many are drawn."""
    rules = {
        name: ProposalRule(LEVEL, KEPT, smallest=1e-3, strict=False, by_probability=True)
        for name in ("train_proposals", "test_proposals")
    }
    anchor = dataclasses.replace(TORCHVISION.anchor_sample, count=anchors, match=RPN_RULES["torchvision"])
    box = dataclasses.replace(TORCHVISION.box_sample, count=boxes, match=ROI_RULES["torchvision"])
    return dataclasses.replace(TORCHVISION, anchor_sample=anchor, box_sample=box, **rules, **options)


def head_model(rule, *, v2=False, key=None):
    """An R-CNN of heads alone."""
    key = jax.random.key(0) if key is None else key
    norm = "batch" if v2 else "none"
    box = {"num_convs": 4 if v2 else 0, "num_linears": 1 if v2 else 2, "width": WIDTH, "norm": norm, "key": key}
    columns = CLASSES + (rule.background == "first")
    return eqx.nn.make_with_state(
        lambda: RCNN(
            GivenMaps(),
            GivenMaps(),
            RPNHead(CHANNELS, depth=2 if v2 else 1, key=key),
            (RoIBoxHead(CHANNELS, num_outputs=CLASSES + 1, num_boxes=columns, **box),),
            RoIMaskHead(CHANNELS, num_outputs=columns, width=CHANNELS, norm=norm, key=key),
            dialect=rule,
            num_classes=CLASSES,
            anchor_sizes=ANCHORS,
        )
    )()


def whole_model(rule, monkeypatch, *, v2=False):
    """A Mask R-CNN of our builder, on a ResNet that is as thin and short as ``torch_mask_rcnn``'s."""
    monkeypatch.setitem(DEPTHS, DEPTH, ((1, 1, 1, 1), True))
    options = {"dialect": rule, "masks": True, "v2": v2, "norm": "batch" if v2 else "frozen", "num_classes": CLASSES}
    sizes = {"backbone_width": THIN, "width": CHANNELS, "head_width": WIDTH, "anchor_sizes": ANCHORS}
    return eqx.nn.make_with_state(rcnn_resnet_fpn)(DEPTH, **options, **sizes, key=jax.random.key(0))


def random_maps(rng, count=2, size=SIZE):
    shapes = [(count, -(-size[0] // s), -(-size[1] // s), CHANNELS) for s in STRIDES]
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


# torchvision


def torch_heads(*, v2=False, seed=0):
    """(RegionProposalNetwork, RoIHeads) with random weights and statistics; all anchors and boxes are drawn."""
    whole = torch_mask_rcnn(v2=v2, seed=seed)
    return whole.rpn, whole.roi_heads


def torch_mask_rcnn(*, v2=False, seed=0, anchors=ALL, boxes=ALL):
    """``maskrcnn_resnet50_fpn`` or its ``_v2``, thin and short, with random weights and statistics."""
    import torch
    from torchvision.models.detection import MaskRCNN, anchor_utils, faster_rcnn, mask_rcnn, rpn
    from torchvision.models.detection._utils import overwrite_eps

    torch.manual_seed(seed)
    norm = torch.nn.BatchNorm2d if v2 else None
    box_head = faster_rcnn.TwoMLPHead(CHANNELS * 49, WIDTH)
    if v2:
        box_head = faster_rcnn.FastRCNNConvFCHead((CHANNELS, 7, 7), [CHANNELS] * 4, [WIDTH], norm_layer=norm)
    drawn = {"rpn_batch_size_per_image": anchors, "box_batch_size_per_image": boxes}
    top = {f"rpn_{when}_nms_top_n_{mode}": n for when, n in (("pre", LEVEL), ("post", KEPT)) for mode in MODES}
    model = MaskRCNN(
        _torch_backbone(norm),
        min_size=SIZE[0],
        max_size=SIZE[1],
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
        rpn_anchor_generator=anchor_utils.AnchorGenerator(ANCHORS, ((0.5, 1.0, 2.0),) * 5),
        rpn_head=rpn.RPNHead(CHANNELS, 3, 2 if v2 else 1),
        box_head=box_head,
        box_predictor=faster_rcnn.FastRCNNPredictor(WIDTH, CLASSES + 1),
        mask_head=mask_rcnn.MaskRCNNHeads(CHANNELS, (CHANNELS,) * 4, 1, norm_layer=norm),
        mask_predictor=mask_rcnn.MaskRCNNPredictor(CHANNELS, CHANNELS, CLASSES + 1),
        **drawn,
        **top,
        _skip_resize=True,
    )
    if not v2:
        overwrite_eps(model, 0.0)  # as for the published weights
    _shake(model)
    return model


MODES = ("train", "test")


def _torch_backbone(norm):
    """torchvision's ResNet has 64 channels in its stem; this one has ``THIN``."""
    from torch import nn
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.models.resnet import Bottleneck, ResNet
    from torchvision.ops import FrozenBatchNorm2d
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

    class ThinResNet(ResNet):
        def _make_layer(self, block, planes, *rest, **options):
            if planes == 64:
                self.inplanes, self.bn1 = THIN, self._norm_layer(THIN)
                self.conv1 = nn.Conv2d(3, THIN, 7, stride=2, padding=3, bias=False)
            return super()._make_layer(block, planes * THIN // 64, *rest, **options)

    body = ThinResNet(Bottleneck, [1, 1, 1, 1], num_classes=1, norm_layer=norm or FrozenBatchNorm2d)
    layers = {f"layer{i + 1}": str(i) for i in range(4)}
    channels = [4 * THIN * 2**i for i in range(4)]
    return BackboneWithFPN(body, layers, channels, CHANNELS, LastLevelMaxPool(), norm)


def _shake(module):
    """Every parameter and buffer random. Boxes move by little: in slivers of 0.03 pixels any overlap is rounding."""
    import torch

    with torch.no_grad():
        for name, value in module.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif value.ndim > 1:
                scale = 0.1 if "head.bbox_pred" in name else 1.0
                value.normal_(0, scale * value[0].numel() ** -0.5)
            elif value.is_floating_point():
                own_weight = name.endswith("weight") and value.ndim == 1  # of a norm
                value.normal_(1.0 if own_weight else 0.0, 0.2)


def torch_maps(maps):
    """By name, channels first, with gradients."""
    import torch

    arrays = [torch.from_numpy(np.array(level).transpose(0, 3, 1, 2).copy()) for level in maps]
    names = ["0", "1", "2", "3", "pool"]
    return {name: array.requires_grad_() for name, array in zip(names, arrays, strict=True)}


# Weights: where they are in ours, how they are read, and what torchvision calls them


def head_names(*modules):
    """Of (RegionProposalNetwork, RoIHeads), as in a whole model."""
    named = zip(("rpn", "roi_heads"), modules, strict=True)
    return {f"{part}.{name}": value for part, module in named for name, value in module.state_dict().items()}


def copied(model, state, names):
    """``model`` and ``state`` with arrays of torchvision by name, all of which must find a place."""
    state = jax.tree.map(lambda x: x, state)  # ``set`` makes the one that it is given unusable
    names = {name: np.asarray(value.detach()) for name, value in names.items() if "num_batches" not in name}
    for path, reader, name in _table(model):
        layer = _at(model, path)
        own = {part: names.pop(f"{name}.{part}") for part in PARTS if f"{name}.{part}" in names}
        assert own, f"no arrays of {name}"
        statistics = tuple(jnp.asarray(own[part]) for part in ("running_mean", "running_var") if part in own)
        if hasattr(layer, "stats"):
            state = state.set(layer.stats, statistics)
        fields = {part: READERS[reader](array) for part, array in own.items() if hasattr(layer, part)}
        old = [getattr(layer, part) for part in fields]
        assert [x.shape for x in old] == [x.shape for x in fields.values()], f"shapes of {name}"
        model = eqx.tree_at(
            lambda m, p=path, f=fields: [getattr(_at(m, p), part) for part in f], model, [*fields.values()]
        )
    assert not names, f"not read: {list(names)}"
    return model, state


PARTS = ("weight", "bias", "running_mean", "running_var")


def _at(model, path):
    for step in path.split("."):
        model = model[int(step)] if step.isdigit() else getattr(model, step)
    return model


def _moved(*axes):
    return lambda x: jnp.asarray(x.transpose(axes) if x.ndim > 1 else x)


def _by_place(x):
    """torch's order of the first linear layer is channels, y, x."""
    return jnp.asarray(x.reshape(len(x), CHANNELS, 7, 7).transpose(2, 3, 1, 0).reshape(-1, len(x)) if x.ndim > 1 else x)


READERS = {
    "conv": _moved(2, 3, 1, 0),
    "transposed": _moved(2, 3, 0, 1),
    "linear": _moved(1, 0),
    "first linear": _by_place,
    "norm": jnp.asarray,
}


def _table(model) -> Iterator[tuple[str, str, str]]:
    if not isinstance(model.backbone, GivenMaps):
        yield from _backbone_table(model)
    box, mask = model.box_heads[0], model.mask_head
    yield from _normed(model.rpn.convs, "rpn.convs.{}", "rpn.head.conv.{}")
    yield "rpn.logits", "conv", "rpn.head.cls_logits"
    yield "rpn.deltas", "conv", "rpn.head.bbox_pred"
    yield from _normed(box.convs, "box_heads.0.convs.{}", "roi_heads.box_head.{}")
    linears = ["5"] if box.convs else ["fc6", "fc7"]
    for i, name in enumerate(linears):
        yield f"box_heads.0.layers.{i}", "linear" if i else "first linear", f"roi_heads.box_head.{name}"
    yield "box_heads.0.logits", "linear", "roi_heads.box_predictor.cls_score"
    yield "box_heads.0.deltas", "linear", "roi_heads.box_predictor.bbox_pred"
    yield from _normed(mask.convs, "mask_head.convs.{}", "roi_heads.mask_head.{}")
    yield "mask_head.upsample", "transposed", "roi_heads.mask_predictor.conv5_mask"
    yield "mask_head.logits", "conv", "roi_heads.mask_predictor.mask_fcn_logits"


def _backbone_table(model):
    body = "backbone.body"
    yield from _pair("backbone.stem", f"{body}.conv1", f"{body}.bn1")
    for i, stage in enumerate(model.backbone.stages):
        for j, block in enumerate(stage):
            ours, theirs = f"backbone.stages.{i}.{j}", f"{body}.layer{i + 1}.{j}"
            for k in range(len(block.convs)):
                yield from _pair(f"{ours}.convs.{k}", f"{theirs}.conv{k + 1}", f"{theirs}.bn{k + 1}")
            if block.projection is not None:
                yield from _pair(f"{ours}.projection", f"{theirs}.downsample.0", f"{theirs}.downsample.1")
    yield from _normed(model.neck.laterals, "neck.laterals.{}", "backbone.fpn.inner_blocks.{}")
    yield from _normed(model.neck.outputs, "neck.outputs.{}", "backbone.fpn.layer_blocks.{}")


def _pair(ours, conv, norm):
    yield f"{ours}.conv", "conv", conv
    yield f"{ours}.norm", "norm", norm


def _normed(layers, ours, theirs):
    """``NormedConv`` and ``Conv2dNormActivation``."""
    for i, layer in enumerate(layers):
        yield f"{ours.format(i)}.conv", "conv", f"{theirs.format(i)}.0"
        if layer.norm is not None:
            yield f"{ours.format(i)}.norm", "norm", f"{theirs.format(i)}.1"
