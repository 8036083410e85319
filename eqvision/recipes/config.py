"""The one frozen dataclass tree that describes a run. The command line's options and help come from here."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_type_hints

T = TypeVar("T")


@dataclass(frozen=True)
class ModelConfig:
    """Which model of the zoo, and its options."""

    name: str = "resnet20_cifar"
    """Name in the zoo; `eqvision list` shows them all."""
    image_size: int = 32
    """Height and width in pixels that images are brought to."""
    in_channels: int = 3
    """1 reads images as grey, 3 as RGB."""
    num_classes: int | None = None
    """Number of outputs; None takes it from the data."""
    dropout: float | None = None
    """Fraction of activations dropped in training; None keeps the model's default."""
    drop_path: float | None = None
    """Stochastic depth of the last block; None keeps the model's default."""
    remat: Literal["none", "dots", "full"] | None = None
    """What scanned models recompute in the backward pass to save memory."""
    unroll: int | None = None
    """Blocks compiled one after the other in each iteration of a scanned model."""
    attention: Literal["xla", "cudnn", "blocked"] | None = None
    """Implementation of attention."""


@dataclass(frozen=True)
class TaskConfig:
    """What is optimised and reported."""

    kind: Literal["single_label", "multi_label", "regression"] = "single_label"
    """single_label: one class per image. multi_label: any number of classes. regression: real values."""
    loss: Literal["cross_entropy", "focal", "squared_error", "absolute_error"] = "cross_entropy"
    """cross_entropy and focal for classes (softmax or sigmoid by kind), the errors for regression."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes, in [0, 1)."""


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from and how they are prepared."""

    kind: Literal["digits", "folder", "arrays"] = "folder"
    """digits: embedded handwritten digits. folder: {train,test}/CLASS/*.jpg. arrays: .npz or a folder of .npy."""
    path: str = ""
    """Folder or file; not used by `digits`."""
    train_split: str = "train"
    """Split to train on."""
    test_split: str = "test"
    """Split to evaluate on."""
    transform: Literal["imagenet", "cifar", "digits", "none"] = "cifar"
    """imagenet: random resized crop and flip. cifar: pad 4, crop, flip. digits: shift by a pixel. none: resize."""
    interpolation: str = "bicubic"
    """Filter of resizing: nearest, bilinear, bicubic, lanczos or box."""
    mean: tuple[float, ...] = (0.5,)
    """Mean of the channels in [0, 1]; one value serves all channels."""
    std: tuple[float, ...] = (0.25,)
    """Standard deviation of the channels in [0, 1]; one value serves all channels."""
    on_corrupt: Literal["raise", "skip"] = "raise"
    """What a corrupt image does: stop the run, or be counted and weigh nothing."""
    num_threads: int = 2
    """Threads that read and transform images."""


@dataclass(frozen=True)
class OptimizerConfig:
    """The update rule."""

    name: Literal["adamw", "sgd"] = "adamw"
    """adamw, or SGD with Nesterov momentum."""
    learning_rate: float = 1e-3
    """Peak learning rate; no scaling by batch size is applied."""
    weight_decay: float = 1e-4
    """Decoupled weight decay (AdamW) or L2 (SGD), on parameters of two and more axes only."""
    momentum: float = 0.9
    """Momentum of SGD, first decay rate of AdamW."""
    beta2: float = 0.999
    """Second decay rate of AdamW."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradient; None does not clip."""


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate as a function of the step."""

    kind: Literal["constant", "cosine", "linear"] = "cosine"
    """What follows the warm-up: the peak rate, or its decay to zero along a cosine or a line."""
    warmup_steps: int = 0
    """Steps in which the rate rises linearly from zero."""


@dataclass(frozen=True)
class LoopConfig:
    """How long, how often, and in which precision."""

    epochs: float = 10.0
    """Passes over the training data."""
    batch_size: int = 128
    """Global batch over all devices and hosts."""
    eval_batch_size: int = 256
    """Global batch of evaluation."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations; parameters and statistics stay float32."""
    log_every: int = 20
    """Steps between rows of metrics.csv; a NaN loss stops the run within as many."""
    eval_every: int | None = None
    """Steps between evaluations; None evaluates after each epoch."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; None saves after each evaluation."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""


@dataclass(frozen=True)
class TrainConfig:
    """A run: a pure function of this configuration (with its seed) and the step."""

    out: str = ""
    """Run folder; empty means runs/RECIPE."""
    seed: int = 0
    """Seed of initialisation, sample order, augmentation and dropout."""
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dictionaries of plain values, as they are written to config.yaml."""
    items = dataclasses.asdict(config).items()
    return {name: _plain(value) for name, value in items}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def from_dict(kind: type[T], values: dict[str, Any]) -> T:
    """The dataclass ``kind`` from nested dictionaries. Raises ValueError for a field that it does not have."""
    hints = get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {', '.join(unknown)}; it has {', '.join(hints)}")
    return kind(**{name: _typed(hints[name], value) for name, value in values.items()})


def _typed(hint: Any, value: Any) -> Any:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_dict(hint, value)
    return tuple(value) if isinstance(value, list) else value


def difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """One line for each value that differs: ``name: old -> new``."""
    lines = []
    for name in sorted({*old, *new}):
        before, after = old.get(name, "absent"), new.get(name, "absent")
        if isinstance(before, dict) and isinstance(after, dict):
            lines += difference(before, after, f"{prefix}{name}.")
        elif before != after:
            lines.append(f"{prefix}{name}: {before} -> {after}")
    return lines
