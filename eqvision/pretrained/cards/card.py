"""What is known of one published file of weights."""

from dataclasses import dataclass

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
# openai/CLIP, clip/clip.py: of its training images
OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# Evaluation of many models by one program, with the preprocessing of the card.
TIMM_RESULTS = "https://github.com/huggingface/pytorch-image-models/blob/main/results/results-imagenet.csv"


@dataclass(frozen=True)
class Preprocessing:
    """How images are prepared for a model that was trained elsewhere."""

    size: int
    """Height and width in pixels."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Mean of the channels in [0, 1]; one value serves all channels."""
    std: tuple[float, ...] = IMAGENET_STD
    """Standard deviation of the channels in [0, 1]; one value serves all channels."""
    interpolation: str = "bicubic"
    """Pillow's filter by which images are resized."""
    crop_fraction: float = 0.875
    """The shorter side is resized to the size over this share, then the middle is cut out; 0 resizes both sides to the
    size and cuts nothing, as Hugging Face's ViTImageProcessor does."""
    longest: int = 0
    """Detectors: the shorter side is resized to the size, unless the longer one would be over this; 0: not so."""


@dataclass(frozen=True)
class Card:
    """One published file."""

    name: str
    """Model of the zoo."""
    tag: str
    """Which of the model's files: how it was trained."""
    layout: str
    """Names of its tensors, a key of ``LAYOUTS``."""
    location: str
    """``hf:organisation/repository[:file]``, or an https address; ``#NAME`` is what the file is called there."""
    sha256: str | None
    """Digest of the file, or the first hex digits of it where only those are published; None: not published."""
    licence: str
    """SPDX name."""
    preprocessing: Preprocessing
    """As ``metric`` was measured."""
    metric: str
    """Published figure, or that the weights are for fine-tuning."""
    source: str
    """Where the figure is published."""
    note: str = ""
    """What else is to be known of the file."""


def top1(percent: float, data: str = "ImageNet-1k") -> str:
    """Text of an accuracy."""
    return f"{data} top-1 {percent:g} %"
