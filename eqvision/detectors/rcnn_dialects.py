"""In what R-CNNs of torchvision, detectron2 and mmdet differ. Weights of one give wrong boxes under another's rules."""

from dataclasses import dataclass
from typing import Literal

from eqvision.names import nearest
from eqvision.ops.iou_assignment import ROI_RULES, RPN_RULES, IouRule
from eqvision.ops.mask_ops import PasteRule
from eqvision.ops.roi_align import LevelRule

Background = Literal["first", "last"]


Name = Literal["torchvision", "detectron2", "mmdet"]


@dataclass(frozen=True)
class ProposalRule:
    """From anchors to proposals: the best of each level, cut off at the image, thinned out, the best of all."""

    per_level: int
    """Best anchors of each level before suppression."""
    kept: int
    """Best of all levels after it."""
    overlap: float = 0.7
    """IoU above which the better of two boxes of a level suppresses the other."""
    smallest: float = 0.0
    """Least width and height, in pixels."""
    strict: bool = True
    """Sides must be above ``smallest``, not equal."""
    by_probability: bool = False
    """Compare sigmoids and not logits: in float32 those above 16.6 are all 1, and tie."""


@dataclass(frozen=True)
class SampleRule:
    """Which boxes are trained on: ``count`` of each image, at most ``positive`` (a share) of them with an object."""

    count: int
    positive: float
    match: IouRule


@dataclass(frozen=True)
class RCNNDialect:
    """All numbers of an R-CNN that are no weights. Change some by ``dataclasses.replace``."""

    name: Name
    """Of anchors, pyramid and start of the heads."""
    background: Background
    """Which column of the class logits is no object; with ``first``, boxes and masks have one for it too."""
    train_proposals: ProposalRule
    test_proposals: ProposalRule
    anchor_sample: SampleRule
    box_sample: SampleRule
    level_rule: LevelRule
    sampling_ratio: int
    """Samples of RoIAlign for each bin and axis, 0 for as many as its size needs."""
    aligned: bool
    measured_strides: bool = False
    """Anchors are (size of image // size of map) pixels apart, not the nominal stride."""
    clamp_shrinking: bool = False
    mask_threshold: float | None = 0.5
    """Mask targets are 1 from this mean on; None: the mean itself."""
    smallest_box: float = 0.0
    """Least width and height of a detection, in pixels; a side of exactly this much is enough. 0: no limit."""
    score_threshold: float = 0.05
    overlap: float = 0.5
    """IoU above which the better of two detections of a class suppresses the other."""
    class_rule: str = "exact"
    """How classes are told apart there, a name in ``ops.CLASS_RULES``."""
    paste: PasteRule = "detectron2"
    """The rule by which masks are put into images."""


TORCHVISION = RCNNDialect(
    name="torchvision",
    background="first",
    train_proposals=ProposalRule(2000, 2000, smallest=1e-3, strict=False, by_probability=True),
    test_proposals=ProposalRule(1000, 1000, smallest=1e-3, strict=False, by_probability=True),
    anchor_sample=SampleRule(256, 0.5, RPN_RULES["torchvision"]),
    box_sample=SampleRule(512, 0.25, ROI_RULES["torchvision"]),
    level_rule="torchvision",
    sampling_ratio=2,
    aligned=False,
    measured_strides=True,
    mask_threshold=None,
    smallest_box=1e-2,
    paste="torchvision",
)
DETECTRON2 = RCNNDialect(
    name="detectron2",
    background="last",
    train_proposals=ProposalRule(2000, 1000),
    test_proposals=ProposalRule(1000, 1000),
    anchor_sample=SampleRule(256, 0.5, RPN_RULES["detectron2"]),
    box_sample=SampleRule(512, 0.25, ROI_RULES["detectron2"]),
    level_rule="detectron2",
    sampling_ratio=0,
    aligned=True,
)
MMDET = RCNNDialect(
    name="mmdet",
    background="last",
    train_proposals=ProposalRule(2000, 1000),
    test_proposals=ProposalRule(1000, 1000),
    anchor_sample=SampleRule(256, 0.5, RPN_RULES["mmdet"]),
    box_sample=SampleRule(512, 0.25, ROI_RULES["mmdet"]),
    level_rule="mmdet",
    sampling_ratio=0,
    aligned=True,
    clamp_shrinking=True,
)
RCNN_DIALECTS: dict[str, RCNNDialect] = {each.name: each for each in (TORCHVISION, DETECTRON2, MMDET)}


def rcnn_dialect(name: str) -> RCNNDialect:
    """Raises UnknownNameError with the nearest name."""
    if name not in RCNN_DIALECTS:
        raise nearest(name, list(RCNN_DIALECTS), "dialect")
    return RCNN_DIALECTS[name]
