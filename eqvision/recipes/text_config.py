"""The configuration of a run that trains a language model. What it shares with other runs is in ``config.py``."""

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
class LanguageModelConfig:
    """Which language model of the zoo, and its options."""

    name: str = "bert_b"
    """Name in the zoo: a BERT for hidden words, a T5 for spans."""
    length: int = 128
    """Tokens of a text as the model reads it, those around it among them."""
    vocab_size: int | None = None
    """Rows of the table of words; None takes the vocabulary's. More leave room."""
    norm_order: Literal["pre", "post"] | None = None
    """BERT: norms in front of each layer or behind it; None keeps the published ones, behind."""
    mimetic: bool | None = None
    """Begins with attention to what is near, as small texts need; None is no."""
    dropout: float | None = None
    """Fraction of activations dropped in training; None keeps the model's default."""
    remat: Literal["none", "dots", "full"] | None = None
    """What scanned models recompute in the backward pass to save memory."""
    unroll: int | None = None
    """Blocks compiled one after the other in each iteration of a scanned model."""
    attention: Literal["xla", "cudnn", "blocked"] | None = None
    """Implementation of attention."""


@dataclass(frozen=True)
class LanguageTaskConfig:
    """What is taken from a text, for the model to tell."""

    objective: Literal["hidden_words", "spans"] = "hidden_words"
    """hidden_words: single tokens, in the text (BERT). spans: stretches, written one after the other (T5)."""
    share: float = 0.15
    """Share of the tokens that is taken."""
    mean_span: float = 3.0
    """spans: mean number of tokens in each."""
    next_sentence: bool = True
    """hidden_words: texts are pairs, and the model also tells whether the second follows the first."""
    short: float = 0.1
    """hidden_words: share of pairs of a random smaller length, as BERT was trained."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all words, in [0, 1)."""
    z_loss: float = 0.0
    """spans: factor of the squared logarithm of the softmax's normaliser; T5 was trained with 1e-4."""


@dataclass(frozen=True)
class TextTokenizerConfig:
    """How texts become numbers. The run folder keeps what was used in tokenizer.json."""

    path: str = ""
    """Vocabulary file or folder (hidden_words: BERT's, spans: T5's); empty makes one of the training text."""
    size: int = 8192
    """Most tokens of a vocabulary made of the training text."""
    lowercase: bool = True
    """hidden_words: texts are made lower case, and accents are stripped."""
    num_sentinels: int = 100
    """spans: tokens of the vocabulary that stand for a span."""
    sample_bytes: int = 100_000_000
    """A longer training text is sampled, evenly, when a vocabulary is made of it."""


@dataclass(frozen=True)
class TextDataConfig:
    """Where the text comes from. Its last part is kept for evaluation."""

    path: str = ""
    """A text file, or a folder with *.txt, which are read in order of their names; UTF-8."""
    documents: Literal["blank_line", "file"] = "blank_line"
    """hidden_words: what ends a document. Pairs of texts that follow each other are taken from inside one."""
    validation_share: float = 0.1
    """Share of the text, at its end, that is not trained on."""
    test_split: Literal["validation", "train"] = "validation"
    """Part to evaluate on."""
    num_threads: int = 2
    """Threads that make examples."""


@dataclass(frozen=True)
class LanguageConfig:
    """A run that trains a language model: a pure function of this configuration (with its seed) and the step."""

    out: str = ""
    """Run folder; empty means runs/RECIPE."""
    seed: int = 0
    """Seed of initialisation, sample order, what is hidden, and dropout."""
    init: str = ""
    """Language models begin fresh: leave it empty."""
    allow_config_change: bool = False
    """Resume although options differ that change the numbers of the run."""
    model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    task: LanguageTaskConfig = field(default_factory=LanguageTaskConfig)
    tokenizer: TextTokenizerConfig = field(default_factory=TextTokenizerConfig)
    data: TextDataConfig = field(default_factory=TextDataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    log: LogConfig = field(default_factory=LogConfig)
