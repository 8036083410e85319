"""torchvision's proposal network and RoI heads, small and random, and the same weights in ours."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eqvision.detectors import RCNN, TORCHVISION, ProposalRule
from eqvision.heads import RoIBoxHead, RoIMaskHead, RPNHead
from eqvision.ops.iou_assignment import ROI_RULES, RPN_RULES

STRIDES = (4, 8, 16, 32, 64)
CHANNELS, WIDTH, CLASSES = 8, 24, 4
SIZE = (96, 128)
ANCHORS = ((8.0,), (16.0,), (32.0,), (64.0,), (128.0,))
ALL = 8192  # draws every box there is, so nothing is left to chance
LEVEL, KEPT = 60, 40


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


def random_maps(rng, count=2, size=SIZE):
    shapes = [(count, -(-size[0] // s), -(-size[1] // s), CHANNELS) for s in STRIDES]
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


# torchvision


def greedy(boxes, scores, threshold):
    """In place of torchvision's ``nms``, whose kernel cannot be loaded beside a CPU build of PyTorch."""
    import torch
    from torchvision.ops import box_iou

    order = torch.argsort(scores, descending=True, stable=True).tolist()
    overlaps, kept = box_iou(boxes, boxes), []
    for row in order:
        if not kept or overlaps[row, kept].max() <= threshold:
            kept.append(row)
    return torch.tensor(kept, dtype=torch.int64)


def torch_heads(*, v2=False, seed=0):
    """(RegionProposalNetwork, RoIHeads) with random weights and statistics, in double precision nowhere."""
    import torch
    from torchvision.models.detection import faster_rcnn, mask_rcnn, roi_heads, rpn
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    torch.manual_seed(seed)
    generator = AnchorGenerator(tuple((int(s),) for (s,) in ANCHORS), ((0.5, 1.0, 2.0),) * 5)
    top = {"pre_nms_top_n": {"training": LEVEL, "testing": LEVEL}, "nms_thresh": 0.7}
    top |= {"post_nms_top_n": {"training": KEPT, "testing": KEPT}}
    proposer = rpn.RegionProposalNetwork(generator, rpn.RPNHead(CHANNELS, 3, 2 if v2 else 1), 0.7, 0.3, ALL, 0.5, **top)
    norm = torch.nn.BatchNorm2d if v2 else None
    box_head = faster_rcnn.TwoMLPHead(CHANNELS * 49, WIDTH)
    if v2:
        box_head = faster_rcnn.FastRCNNConvFCHead((CHANNELS, 7, 7), [CHANNELS] * 4, [WIDTH], norm_layer=norm)
    names = ["0", "1", "2", "3"]
    heads = roi_heads.RoIHeads(
        MultiScaleRoIAlign(names, 7, 2),
        box_head,
        faster_rcnn.FastRCNNPredictor(WIDTH, CLASSES + 1),
        0.5,
        0.5,
        ALL,
        0.25,
        None,
        0.05,
        0.5,
        100,
        MultiScaleRoIAlign(names, 14, 2),
        mask_rcnn.MaskRCNNHeads(CHANNELS, (CHANNELS,) * 4, 1, norm_layer=norm),
        mask_rcnn.MaskRCNNPredictor(CHANNELS, CHANNELS, CLASSES + 1),
    )
    for module in (proposer, heads):
        _shake(module)
    return proposer, heads


def _shake(module):
    """Every parameter and buffer random; logits far enough apart that no order hangs on the last bit."""
    import torch

    with torch.no_grad():
        for name, value in module.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif value.is_floating_point() and not name.startswith("anchor"):
                fan = value[0].numel() if value.ndim > 1 else 1
                value.normal_(0, (2 / fan) ** 0.5 if value.ndim > 1 else 0.2)


def copied(model, state, proposer, heads):
    """``model`` and ``state`` with the weights of torchvision's modules."""
    names = {f"rpn.{k}": v for k, v in proposer.state_dict().items()}
    names |= {f"roi.{k}": v for k, v in heads.state_dict().items()}
    read = lambda name: np.asarray(names.pop(name).detach())  # noqa: E731

    def conv(layer, name):
        layer = eqx.tree_at(lambda c: c.weight, layer, jnp.asarray(read(f"{name}.weight").transpose(2, 3, 1, 0)))
        return layer if layer.bias is None else eqx.tree_at(lambda c: c.bias, layer, jnp.asarray(read(f"{name}.bias")))

    def linear(layer, name, rows=lambda w: w):
        weight, bias = jnp.asarray(rows(read(f"{name}.weight")).T), jnp.asarray(read(f"{name}.bias"))
        return eqx.tree_at(lambda each: (each.weight, each.bias), layer, (weight, bias))

    def by_place(weight):  # torch's order of the first layer is channels, y, x
        return weight.reshape(len(weight), CHANNELS, 7, 7).transpose(0, 2, 3, 1).reshape(len(weight), -1)

    def normed(layer, convolution, norm):
        nonlocal state
        layer = eqx.tree_at(lambda c: c.conv, layer, conv(layer.conv, convolution))
        if layer.norm is None:
            return layer
        affine = tuple(jnp.asarray(read(f"{norm}.{name}")) for name in ("weight", "bias"))
        new = eqx.tree_at(lambda n: (n.weight, n.bias), layer.norm, affine)
        statistics = tuple(jnp.asarray(read(f"{norm}.running_{x}")) for x in ("mean", "var"))
        names.pop(f"{norm}.num_batches_tracked")
        state = state.set(new.stats, statistics)
        return eqx.tree_at(lambda c: c.norm, layer, new)

    rpn, box, mask = model.rpn, model.box_heads[0], model.mask_head
    linears = ["roi.box_head.5"] if box.convs else ["roi.box_head.fc6", "roi.box_head.fc7"]
    new = [normed(c, f"rpn.head.conv.{i}.0", "") for i, c in enumerate(rpn.convs)]
    new += [conv(rpn.logits, "rpn.head.cls_logits"), conv(rpn.deltas, "rpn.head.bbox_pred")]
    new += [normed(c, f"roi.box_head.{i}.0", f"roi.box_head.{i}.1") for i, c in enumerate(box.convs)]
    new += [linear(box.layers[0], linears[0], by_place)]
    new += [linear(*each) for each in zip(box.layers[1:], linears[1:], strict=True)]
    new += [linear(box.logits, "roi.box_predictor.cls_score"), linear(box.deltas, "roi.box_predictor.bbox_pred")]
    new += [normed(c, f"roi.mask_head.{i}.0", f"roi.mask_head.{i}.1") for i, c in enumerate(mask.convs)]
    up = [
        read("roi.mask_predictor.conv5_mask.weight").transpose(2, 3, 0, 1),
        read("roi.mask_predictor.conv5_mask.bias"),
    ]
    new += [eqx.tree_at(lambda c: (c.weight, c.bias), mask.upsample, tuple(jnp.asarray(x) for x in up))]
    new += [conv(mask.logits, "roi.mask_predictor.mask_fcn_logits")]
    assert not names, f"not read: {list(names)}"
    return eqx.tree_at(lambda m: _parts(m, len(box.convs)), model, new), state


def _parts(model, convs):
    rpn, box, mask = model.rpn, model.box_heads[0], model.mask_head
    before = [*rpn.convs, rpn.logits, rpn.deltas, *(box.convs[i] for i in range(convs))]
    return [*before, *box.layers, box.logits, box.deltas, *mask.convs, mask.upsample, mask.logits]


def torch_maps(maps):
    """By name, channels first, with gradients."""
    import torch

    arrays = [torch.from_numpy(np.array(level).transpose(0, 3, 1, 2).copy()) for level in maps]
    names = ["0", "1", "2", "3", "pool"]
    return {name: array.requires_grad_() for name, array in zip(names, arrays, strict=True)}
