"""The configuration of a run that trains an open-vocabulary detector (OWL-ViT). What it shares with other runs is in
``config.py``."""

from dataclasses import dataclass, field
from typing import Literal

from eqvision.losses.open_vocabulary import OpenVocabularyLossConfig
from eqvision.recipes.config import (
    CheckpointConfig,
    LogConfig,
    LoopConfig,
    MeshConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from eqvision.recipes.contrastive_config import TokenizerConfig


@dataclass(frozen=True)
class OpenVocabularyModelConfig:
    """Which open-vocabulary detector of the zoo, and its options."""

    name: str = "owlvit_b16"
    """Name in the zoo, of an OWL-ViT."""
    in_channels: int = 3
    """1 reads images as grey, 3 as RGB."""
    length: int = 16
    """Tokens of a query, those at its beginning and end among them; what is longer is cut."""
    drop_path: float | None = None
    """Stochastic depth of the image tower; None keeps the model's default."""
    text_drop_path: float | None = None
    """Stochastic depth of the text tower; None keeps the model's default."""
    remat: Literal["none", "dots", "full"] | None = None
    """What scanned towers recompute in the backward pass to save memory."""
    unroll: int | None = None
    """Blocks compiled one after the other in each iteration of a scanned tower."""
    attention: Literal["xla", "cudnn", "blocked"] | None = None
    """Implementation of attention."""


@dataclass(frozen=True)
class OpenVocabularyDataConfig:
    """Where images and boxes come from, how they are prepared, and what is asked of them."""

    kind: Literal["coco", "digits"] = "coco"
    """coco: a COCO or LVIS instances file with its images. digits: scenes of embedded handwritten digits."""
    path: str = ""
    """Folder with annotations/*.json and the images of each split; not used by `digits`."""
    train_split: str = "train"
    """Split to train on."""
    test_split: str = "val"
    """Split to evaluate on."""
    length: int | None = None
    """digits: number of training scenes; None takes 4096."""
    size: int = 768
    """Side of the square that images are brought to."""
    fit: Literal["pad", "squeeze"] = "pad"
    """pad: images keep their shape and lie at the upper left. squeeze: both sides to the size."""
    padding: float = 0.5
    """Value of the padding in [0, 1]: 0.5 in OWL-ViT, 0 in the second version."""
    mosaics: tuple[int, ...] = (1, 2, 3)
    """Training: images along a side of a mosaic; the size must be a multiple of each."""
    mosaic_probabilities: tuple[float, ...] = (0.4, 0.3, 0.3)
    """Training: how often each of `mosaics` is made."""
    flip: float = 0.5
    """Training: probability of a horizontal flip."""
    crop: tuple[float, float] = (0.3, 1.0)
    """Training: smallest and largest share of the image's area in a random region; 1 1 cuts nothing."""
    least_left: float = 0.6
    """Training: objects of which less than this share is left by the cut are not looked for."""
    keep_empty: bool = True
    """coco: train on images without objects too."""
    max_objects: int = 100
    """Objects of an image that can be targets; of more, the largest are kept."""
    class_names: tuple[str, ...] = ()
    """Names to ask for the classes with; empty takes those of the data, for digits zero to nine."""
    templates: tuple[str, ...] = ()
    """Training: sentences that names are put into, `{}` for the name; empty takes the name alone and 13 sentences for
    photos of our own (published weights were trained with CLIP's 80), for digits a few short ones."""
    test_templates: tuple[str, ...] = ()
    """Evaluation: sentences whose embeddings are averaged; empty takes the 13 for photos (published:
    CLIP's best 7), for digits the name alone."""
    max_queries: int = 100
    """Training: names that are asked of an image."""
    num_negatives: int = 50
    """Training: names of what is not in the image, drawn as often as they are elsewhere in the data."""
    merge_iou: float = 0.9
    """Training: objects that overlap by this IoU or more become one with both names; above 1 none do."""
    hide_rare: bool = False
    """LVIS: rare classes are not trained on, so that their AP is zero-shot."""
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    """Mean of the channels in [0, 1]; one value serves all channels."""
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    """Standard deviation of the channels in [0, 1]; one value serves all channels."""
    count: int = 300
    """Evaluation: objects that are kept of each image."""
    on_corrupt: Literal["raise", "skip"] = "raise"
    """What a corrupt image does: stop the run, or be counted and weigh nothing."""
    num_threads: int = 2
    """Threads that read and transform images."""


@dataclass(frozen=True)
class OpenVocabularyConfig:
    """A run that trains an open-vocabulary detector: a pure function of this configuration (with its seed) and the
    step."""

    out: str = ""
    """Run folder; empty means runs/RECIPE."""
    seed: int = 0
    """Seed of initialisation, sample order, augmentation, questions and dropout."""
    init: str = ""
    """What the run starts from: a run folder, or published weights as MODEL or MODEL:SOURCE (file, hf:organisation/
    repository, URL or tag), of an OWL-ViT or, for its towers, a CLIP; with --tokenizer.path for their vocabulary."""
    allow_config_change: bool = False
    """Resume although options differ that change the numbers of the run."""
    model: OpenVocabularyModelConfig = field(default_factory=OpenVocabularyModelConfig)
    task: OpenVocabularyLossConfig = field(default_factory=OpenVocabularyLossConfig)
    data: OpenVocabularyDataConfig = field(default_factory=OpenVocabularyDataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    log: LogConfig = field(default_factory=LogConfig)
