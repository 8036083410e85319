"""Names and shapes of the tensors in published files of R-CNNs, written by hand from the published modules.

``PUBLISHED`` are the sizes of ResNet-50-FPN on COCO, ``TOY`` small ones. Pooled maps are 7x7 in both. Nothing here
knows eqvision's layouts.
"""

from typing import NamedTuple

BINS = 7


class Sizes(NamedTuple):
    """``width`` of the stem, ``blocks`` of each stage, channels of the pyramid, width of the heads, classes."""

    width: int
    blocks: tuple[int, ...]
    fpn: int
    head: int
    classes: int

    @property
    def stages(self):
        """Inner channels; the outer ones are four times as many."""
        return tuple(self.width << i for i in range(4))


TOY = Sizes(4, (1, 1, 1, 1), 8, 12, 3)
PUBLISHED = Sizes(64, (3, 4, 6, 3), 256, 1024, 80)


def conv(name, i, o, k, bias=True):
    yield f"{name}.weight", (o, i, k, k)
    if bias:
        yield f"{name}.bias", (o,)


def linear(name, i, o):
    yield f"{name}.weight", (o, i)
    yield f"{name}.bias", (o,)


def norm(name, c, tracked=False):
    for each in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.{each}", (c,)
    if tracked:
        yield f"{name}.num_batches_tracked", ()


def torch_resnet(s, prefix, tracked=False):
    """torchvision's names, which mmdet's are too."""
    yield from conv(f"{prefix}.conv1", 3, s.width, 7, bias=False)
    yield from norm(f"{prefix}.bn1", s.width, tracked)
    before = s.width
    for stage, width in enumerate(s.stages, 1):
        for block in range(s.blocks[stage - 1]):
            name = f"{prefix}.layer{stage}.{block}"
            for number, (i, o, k) in enumerate(((before, width, 1), (width, width, 3), (width, 4 * width, 1)), 1):
                yield from conv(f"{name}.conv{number}", i, o, k, bias=False)
                yield from norm(f"{name}.bn{number}", o, tracked)
            if not block:
                yield from conv(f"{name}.downsample.0", before, 4 * width, 1, bias=False)
                yield from norm(f"{name}.downsample.1", 4 * width, tracked)
            before = 4 * width


# torchvision: 0 is the background, and boxes and masks have a column for it


def torchvision_2019(s, masks=False):
    """As in fasterrcnn_resnet50_fpn_coco-258fb6c6.pth; its norms are frozen, so nothing is tracked."""
    yield from torch_resnet(s, "backbone.body")
    for level, width in enumerate(s.stages):
        yield from conv(f"backbone.fpn.inner_blocks.{level}", 4 * width, s.fpn, 1)
    for level in range(4):
        yield from conv(f"backbone.fpn.layer_blocks.{level}", s.fpn, s.fpn, 3)
    yield from conv("rpn.head.conv", s.fpn, s.fpn, 3)
    yield from torchvision_heads(s)
    if masks:
        for number in range(1, 5):
            yield from conv(f"roi_heads.mask_head.mask_fcn{number}", s.fpn, s.fpn, 3)
        yield from torchvision_mask_predictor(s)


def torchvision_heads(s):
    yield from conv("rpn.head.cls_logits", s.fpn, 3, 1)
    yield from conv("rpn.head.bbox_pred", s.fpn, 12, 1)
    yield from linear("roi_heads.box_head.fc6", s.fpn * BINS * BINS, s.head)
    yield from linear("roi_heads.box_head.fc7", s.head, s.head)
    yield from torchvision_predictor(s)


def torchvision_predictor(s):
    yield from linear("roi_heads.box_predictor.cls_score", s.head, s.classes + 1)
    yield from linear("roi_heads.box_predictor.bbox_pred", s.head, 4 * (s.classes + 1))


def torchvision_mask_predictor(s):
    yield "roi_heads.mask_predictor.conv5_mask.weight", (s.fpn, s.fpn, 2, 2)
    yield "roi_heads.mask_predictor.conv5_mask.bias", (s.fpn,)
    yield from conv("roi_heads.mask_predictor.mask_fcn_logits", s.fpn, s.classes + 1, 1)


def torchvision_today(s, masks=False):
    """As torchvision 0.13 and newer write the same model."""
    yield from torch_resnet(s, "backbone.body")
    for level, width in enumerate(s.stages):
        yield from conv(f"backbone.fpn.inner_blocks.{level}.0", 4 * width, s.fpn, 1)
    for level in range(4):
        yield from conv(f"backbone.fpn.layer_blocks.{level}.0", s.fpn, s.fpn, 3)
    yield from conv("rpn.head.conv.0.0", s.fpn, s.fpn, 3)
    yield from torchvision_heads(s)
    if masks:
        for number in range(4):
            yield from conv(f"roi_heads.mask_head.{number}.0", s.fpn, s.fpn, 3)
        yield from torchvision_mask_predictor(s)


def torchvision_v2(s, masks=False):
    """Batch norms everywhere but before the proposals, where there are two convolutions."""
    yield from torch_resnet(s, "backbone.body", tracked=True)
    for level, width in enumerate(s.stages):
        yield from conv(f"backbone.fpn.inner_blocks.{level}.0", 4 * width, s.fpn, 1, bias=False)
        yield from norm(f"backbone.fpn.inner_blocks.{level}.1", s.fpn, True)
    for level in range(4):
        yield from conv(f"backbone.fpn.layer_blocks.{level}.0", s.fpn, s.fpn, 3, bias=False)
        yield from norm(f"backbone.fpn.layer_blocks.{level}.1", s.fpn, True)
    for number in range(2):
        yield from conv(f"rpn.head.conv.{number}.0", s.fpn, s.fpn, 3)
    yield from conv("rpn.head.cls_logits", s.fpn, 3, 1)
    yield from conv("rpn.head.bbox_pred", s.fpn, 12, 1)
    for number in range(4):
        yield from conv(f"roi_heads.box_head.{number}.0", s.fpn, s.fpn, 3, bias=False)
        yield from norm(f"roi_heads.box_head.{number}.1", s.fpn, True)
    yield from linear("roi_heads.box_head.5", s.fpn * BINS * BINS, s.head)
    yield from torchvision_predictor(s)
    if masks:
        for number in range(4):
            yield from conv(f"roi_heads.mask_head.{number}.0", s.fpn, s.fpn, 3, bias=False)
            yield from norm(f"roi_heads.mask_head.{number}.1", s.fpn, True)
        yield from torchvision_mask_predictor(s)


# detectron2: the background is last, and boxes and masks have none


def detectron2_resnet(s, prefix):
    def part(name, i, o, k):
        yield from conv(f"{prefix}.{name}", i, o, k, bias=False)
        yield from norm(f"{prefix}.{name}.norm", o)

    yield from part("stem.conv1", 3, s.width, 7)
    before = s.width
    for stage, width in enumerate(s.stages, 2):
        for block in range(s.blocks[stage - 2]):
            name = f"res{stage}.{block}"
            if not block:
                yield from part(f"{name}.shortcut", before, 4 * width, 1)
            yield from part(f"{name}.conv1", before, width, 1)
            yield from part(f"{name}.conv2", width, width, 3)
            yield from part(f"{name}.conv3", width, 4 * width, 1)
            before = 4 * width


def detectron2(s, masks=False, cascade=False):
    """As in mask_rcnn_R_50_FPN_3x/137849600/model_final_f10217.pkl."""
    yield from detectron2_resnet(s, "backbone.bottom_up")
    for level, width in enumerate(s.stages, 2):
        yield from conv(f"backbone.fpn_lateral{level}", 4 * width, s.fpn, 1)
        yield from conv(f"backbone.fpn_output{level}", s.fpn, s.fpn, 3)
    yield from conv("proposal_generator.rpn_head.conv", s.fpn, s.fpn, 3)
    yield from conv("proposal_generator.rpn_head.objectness_logits", s.fpn, 3, 1)
    yield from conv("proposal_generator.rpn_head.anchor_deltas", s.fpn, 12, 1)
    for level in range(5):
        yield f"proposal_generator.anchor_generator.cell_anchors.{level}", (3, 4)
    for number in (".0", ".1", ".2") if cascade else ("",):
        yield from linear(f"roi_heads.box_head{number}.fc1", s.fpn * BINS * BINS, s.head)
        yield from linear(f"roi_heads.box_head{number}.fc2", s.head, s.head)
        yield from linear(f"roi_heads.box_predictor{number}.cls_score", s.head, s.classes + 1)
        yield from linear(f"roi_heads.box_predictor{number}.bbox_pred", s.head, 4 if cascade else 4 * s.classes)
    if masks:
        for number in range(1, 5):
            yield from conv(f"roi_heads.mask_head.mask_fcn{number}", s.fpn, s.fpn, 3)
        yield "roi_heads.mask_head.deconv.weight", (s.fpn, s.fpn, 2, 2)
        yield "roi_heads.mask_head.deconv.bias", (s.fpn,)
        yield from conv("roi_heads.mask_head.predictor", s.fpn, s.classes, 1)
    yield "pixel_mean", (3, 1, 1)
    yield "pixel_std", (3, 1, 1)


# mmdet: the background is last


def mmdet(s, masks=False, cascade=False):
    """As in mask_rcnn_r50_fpn_1x_coco_20200205-d4b0c5d6.pth."""
    yield from torch_resnet(s, "backbone", tracked=True)
    for level, width in enumerate(s.stages):
        yield from conv(f"neck.lateral_convs.{level}.conv", 4 * width, s.fpn, 1)
        yield from conv(f"neck.fpn_convs.{level}.conv", s.fpn, s.fpn, 3)
    yield from conv("rpn_head.rpn_conv", s.fpn, s.fpn, 3)
    yield from conv("rpn_head.rpn_cls", s.fpn, 3, 1)
    yield from conv("rpn_head.rpn_reg", s.fpn, 12, 1)
    for number in (".0", ".1", ".2") if cascade else ("",):
        head = f"roi_head.bbox_head{number}"
        yield from linear(f"{head}.fc_cls", s.head, s.classes + 1)
        yield from linear(f"{head}.fc_reg", s.head, 4 if cascade else 4 * s.classes)
        yield from linear(f"{head}.shared_fcs.0", s.fpn * BINS * BINS, s.head)
        yield from linear(f"{head}.shared_fcs.1", s.head, s.head)
    for number in ((".0", ".1", ".2") if cascade else ("",)) if masks else ():
        mask = f"roi_head.mask_head{number}"
        for place in range(4):
            yield from conv(f"{mask}.convs.{place}.conv", s.fpn, s.fpn, 3)
        yield f"{mask}.upsample.weight", (s.fpn, s.fpn, 2, 2)
        yield f"{mask}.upsample.bias", (s.fpn,)
        yield from conv(f"{mask}.conv_logits", s.fpn, s.classes, 1)


# detectron2's ViTDet: windows of 14x14 and blocks that see all, positions of the pretraining with a class token


class VitSizes(NamedTuple):
    """``sides`` in patches: of the pretraining, of a window, of the image; ``whole`` are the blocks without windows."""

    width: int
    depth: int
    heads: int
    mlp: int
    sides: tuple[int, int, int]
    whole: tuple[int, ...]
    fpn: int
    head: int
    classes: int


TOY_VIT = VitSizes(8, 4, 2, 12, (3, 2, 4), (1, 3), 8, 12, 3)
VIT_B = VitSizes(768, 12, 12, 3072, (14, 14, 64), (2, 5, 8, 11), 256, 1024, 80)


def affine(name, c):
    yield f"{name}.weight", (c,)
    yield f"{name}.bias", (c,)


def normed(name, i, o, k):
    """A convolution without a bias and a layer norm over channels."""
    yield from conv(name, i, o, k, bias=False)
    yield from affine(f"{name}.norm", o)


def up(name, i, o):
    yield f"{name}.weight", (i, o, 2, 2)
    yield f"{name}.bias", (o,)


def vitdet(s, cascade=False):
    """As in ViTDet/COCO/mask_rcnn_vitdet_b/f325346929/model_final_61ccd1.pkl."""
    net, d = "backbone.net", s.width
    yield f"{net}.pos_embed", (1, s.sides[0] ** 2 + 1, d)
    yield from conv(f"{net}.patch_embed.proj", 3, d, 16)
    for number in range(s.depth):
        block, side = f"{net}.blocks.{number}", s.sides[2 if number in s.whole else 1]
        yield from affine(f"{block}.norm1", d)
        for letter in "hw":
            yield f"{block}.attn.rel_pos_{letter}", (2 * side - 1, d // s.heads)
        yield from linear(f"{block}.attn.qkv", d, 3 * d)
        yield from linear(f"{block}.attn.proj", d, d)
        yield from affine(f"{block}.norm2", d)
        yield from linear(f"{block}.mlp.fc1", d, s.mlp)
        yield from linear(f"{block}.mlp.fc2", s.mlp, d)
    yield from up("backbone.simfp_2.0", d, d // 2)
    yield from affine("backbone.simfp_2.1", d // 2)
    yield from up("backbone.simfp_2.3", d // 2, d // 4)
    yield from up("backbone.simfp_3.0", d, d // 2)
    for first, width in (("2.4", d // 4), ("3.1", d // 2), ("4.0", d), ("5.1", d)):
        level, place = first.split(".")
        yield from normed(f"backbone.simfp_{first}", width, s.fpn, 1)
        yield from normed(f"backbone.simfp_{level}.{int(place) + 1}", s.fpn, s.fpn, 3)
    for number in range(2):
        yield from conv(f"proposal_generator.rpn_head.conv.conv{number}", s.fpn, s.fpn, 3)
    yield from conv("proposal_generator.rpn_head.objectness_logits", s.fpn, 3, 1)
    yield from conv("proposal_generator.rpn_head.anchor_deltas", s.fpn, 12, 1)
    for number in (".0", ".1", ".2") if cascade else ("",):
        for place in range(1, 5):
            yield from normed(f"roi_heads.box_head{number}.conv{place}", s.fpn, s.fpn, 3)
        yield from linear(f"roi_heads.box_head{number}.fc1", s.fpn * BINS * BINS, s.head)
        yield from linear(f"roi_heads.box_predictor{number}.cls_score", s.head, s.classes + 1)
        yield from linear(f"roi_heads.box_predictor{number}.bbox_pred", s.head, 4 if cascade else 4 * s.classes)
    for number in range(1, 5):
        yield from normed(f"roi_heads.mask_head.mask_fcn{number}", s.fpn, s.fpn, 3)
    yield from up("roi_heads.mask_head.deconv", s.fpn, s.fpn)
    yield from conv("roi_heads.mask_head.predictor", s.fpn, s.classes, 1)
