"""The configuration of a run that trains CLIP or SigLIP on images with captions. What it shares with other runs is in
``config.py``."""

from dataclasses import dataclass, field
from typing import Literal

from eqvision.recipes.config import (
    CheckpointConfig,
    LogConfig,
    LoopConfig,
    MeshConfig,
    OptimizerConfig,
    ScheduleConfig,
)


@dataclass(frozen=True)
class ClipModelConfig:
    """Which model of images and text, and its options."""

    name: str = "clip_vit_b32"
    """Name in the zoo, of a CLIP or SigLIP."""
    image_size: int = 224
    """Height and width in pixels that images are brought to."""
    in_channels: int = 3
    """1 reads images as grey, 3 as RGB."""
    length: int = 77
    """Tokens of a text, those at its beginning and end among them; what is longer is cut."""
    dropout: float | None = None
    """Fraction of activations dropped in training; None keeps the model's default."""
    drop_path: float | None = None
    """Stochastic depth of the last blocks; None keeps the model's default."""
    remat: Literal["none", "dots", "full"] | None = None
    """What scanned towers recompute in the backward pass to save memory."""
    unroll: int | None = None
    """Blocks compiled one after the other in each iteration of a scanned tower."""
    attention: Literal["xla", "cudnn", "blocked"] | None = None
    """Implementation of attention."""


@dataclass(frozen=True)
class ContrastiveLossConfig:
    """How pairs are told from what is no pair, among all images and texts of the global batch."""

    loss: Literal["softmax", "sigmoid"] = "softmax"
    """softmax: which text is whose and the other way round (CLIP). sigmoid: each pair by itself (SigLIP)."""
    chunk: int = 1024
    """Texts that a device compares its images with at a time; it decides memory, and nothing else but rounding."""


@dataclass(frozen=True)
class TokenizerConfig:
    """How captions become numbers. The run folder keeps what was used in tokenizer.json."""

    kind: Literal["clip_bpe", "wordpiece", "unigram"] = "clip_bpe"
    """clip_bpe: byte pairs, as CLIP has. wordpiece: as BERT has. unigram: as T5 and SigLIP have."""
    path: str = ""
    """Vocabulary file or folder; empty makes one of the training captions."""
    size: int = 8192
    """Most tokens of a vocabulary made of the captions."""
    pad: str = ""
    """Token that fills texts up; empty takes the kind's own. SigLIP, which sees it, has `</s>`."""


@dataclass(frozen=True)
class PairsDataConfig:
    """Where images and captions come from and how they are prepared."""

    kind: Literal["folder", "coco", "digits"] = "folder"
    """folder: {train,val}/ with captions.jsonl, captions.tsv or a text file beside each image. coco: a captions JSON of
    COCO for each split. digits: embedded handwritten digits and sentences about them."""
    path: str = ""
    """Folder of the data; not used by `digits`."""
    train_split: str = "train"
    """Split to train on."""
    test_split: str = "val"
    """Split to evaluate on."""
    transform: Literal["crop", "digits", "none"] = "crop"
    """crop: a random region of `scale`, and in evaluation the middle square. digits: shift by a pixel. none: the middle
    square. No flip, which would turn what captions say of left and right."""
    scale: tuple[float, float] = (0.9, 1.0)
    """crop: smallest and largest share of the image's area."""
    interpolation: str = "bicubic"
    """Filter of resizing: nearest, bilinear, bicubic, lanczos or box."""
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    """Mean of the channels in [0, 1]; one value serves all channels."""
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    """Standard deviation of the channels in [0, 1]; one value serves all channels."""
    zero_shot_path: str = ""
    """Images in a folder for each class (SPLIT/CLASS/*.jpg, `_` is a space), whose classes are told by their names in
    each evaluation; empty is off. `digits` have classes of their own."""
    zero_shot_split: str = "val"
    """Split of these."""
    templates: tuple[str, ...] = ()
    """Sentences that classes are asked for with, `{}` for the name; empty takes 13 for photos, for digits two that no
    caption has. The vectors of all sentences are averaged."""
    templates_file: str = ""
    """File with such sentences, one a line, in their place."""
    on_corrupt: Literal["raise", "skip"] = "raise"
    """What a corrupt image does: stop the run, or be counted and weigh nothing."""
    num_threads: int = 2
    """Threads that read and transform images."""


@dataclass(frozen=True)
class ContrastiveConfig:
    """A run that trains a model of images and text: a pure function of this configuration (with its seed) and the
    step."""

    out: str = ""
    """Run folder; empty means runs/RECIPE."""
    seed: int = 0
    """Seed of initialisation, sample order, choice of captions, augmentation and dropout."""
    init: str = ""
    """What the run starts from: a run folder, or published weights as MODEL or MODEL:SOURCE (file, hf:organisation/
    repository, URL or tag), with --tokenizer.path for the vocabulary that belongs to them."""
    allow_config_change: bool = False
    """Resume although options differ that change the numbers of the run."""
    model: ClipModelConfig = field(default_factory=ClipModelConfig)
    task: ContrastiveLossConfig = field(default_factory=ContrastiveLossConfig)
    data: PairsDataConfig = field(default_factory=PairsDataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    log: LogConfig = field(default_factory=LogConfig)
