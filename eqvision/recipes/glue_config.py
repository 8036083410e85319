"""The configuration of a run that fine-tunes a BERT on GLUE. What it shares with other runs is in ``config.py``."""

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

GlueTaskName = Literal["cola", "sst2", "mrpc", "qqp", "stsb", "mnli_matched", "mnli_mismatched", "qnli", "rte", "wnli"]


@dataclass(frozen=True)
class TextClassifierConfig:
    """Which classifier of texts, and what it begins with."""

    name: str = "bert_b_classifier"
    """Name in the zoo: bert_ti_classifier, bert_b_classifier ..."""
    weights: str = ""
    """What it begins with: published weights (folder, file, hf:organisation/repository), or the run folder of a BERT
    of the same size; empty begins fresh. They are read again when the run resumes."""
    length: int = 128
    """Tokens of a text or a pair as the model reads it, those around it among them."""
    norm_order: Literal["pre", "post"] | None = None
    """Without weights: norms in front of each layer or behind it; None keeps the published ones, behind."""
    dropout: float | None = None
    """Fraction of activations dropped in training; None keeps that of the weights, else the model's default."""
    remat: Literal["none", "dots", "full"] | None = None
    """What scanned models recompute in the backward pass to save memory."""
    unroll: int | None = None
    """Blocks compiled one after the other in each iteration of a scanned model."""
    attention: Literal["xla", "cudnn", "blocked"] | None = None
    """Implementation of attention."""


@dataclass(frozen=True)
class GlueTokenizerConfig:
    """How texts become numbers. The run folder keeps what was used in tokenizer.json."""

    path: str = ""
    """Vocabulary of BERT: vocab.txt, tokenizer.json, or a folder with either. Empty takes what lies beside the weights;
    without weights one is made of the training texts."""
    lowercase: bool = True
    """vocab.txt, and vocabularies that are made: texts are made lower case, and accents are stripped."""
    size: int = 8192
    """Most tokens of a vocabulary that is made."""


@dataclass(frozen=True)
class GlueDataConfig:
    """Which task, and where its tables lie."""

    task: GlueTaskName = "sst2"
    """Task of GLUE."""
    path: str = ""
    """GLUE's folder, with CoLA, SST-2 ... in it, or the task's own; gluebenchmark.com/tasks has the archives."""
    test_split: Literal["dev", "train"] = "dev"
    """Table to evaluate on; those of the test split have no labels."""
    num_threads: int = 2
    """Threads that make batches."""


@dataclass(frozen=True)
class GlueConfig:
    """A run that fine-tunes a classifier of texts: a pure function of this configuration (with its seed), and of the
    weights that it begins with."""

    out: str = ""
    """Run folder; empty means runs/RECIPE."""
    seed: int = 0
    """Seed of the new layers, sample order and dropout."""
    init: str = ""
    """Leave it empty: --model.weights says what the model begins with."""
    allow_config_change: bool = False
    """Resume although options differ that change the numbers of the run."""
    model: TextClassifierConfig = field(default_factory=TextClassifierConfig)
    tokenizer: GlueTokenizerConfig = field(default_factory=GlueTokenizerConfig)
    data: GlueDataConfig = field(default_factory=GlueDataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    log: LogConfig = field(default_factory=LogConfig)
