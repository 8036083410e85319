"""The one frozen dataclass tree that describes a run. The command line's options and help come from here."""

from dataclasses import dataclass, field
from typing import Literal


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

    kind: Literal["digits", "folder", "arrays", "tar", "array_record", "tfds", "huggingface"] = "folder"
    """digits: embedded handwritten digits. folder: {train,test}/CLASS/*.jpg. arrays: .npz or a folder of .npy.
    tar: shards as WebDataset writes them. array_record: a folder of ArrayRecord files. tfds: a prepared TFDS data set.
    huggingface: a data set saved by Hugging Face `datasets`."""
    path: str = ""
    """Folder or file; not used by `digits`."""
    mixture: dict[str, float] = field(default_factory=dict)
    """Several paths of that kind with the share of training examples that each gives; replaces `path` in training."""
    train_split: str = "train"
    """Split to train on."""
    test_split: str = "test"
    """Split to evaluate on."""
    transform: Literal["imagenet", "cifar", "digits", "none"] = "cifar"
    """imagenet: random resized crop and flip. cifar: pad 4, crop, flip. digits: shift by a pixel. none: resize."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """imagenet: least and largest share of the image's area that a random crop has."""
    interpolation: str = "bicubic"
    """Filter of resizing: nearest, bilinear, bicubic, lanczos or box."""
    crop_fraction: float | None = None
    """Evaluation: the shorter side is resized to the size over this share, then the middle is cut out. None takes the
    transform's own (imagenet 0.875, the others 1); 0 resizes both sides to the size and cuts nothing."""
    mean: tuple[float, ...] = (0.5,)
    """Mean of the channels in [0, 1]; one value serves all channels."""
    std: tuple[float, ...] = (0.25,)
    """Standard deviation of the channels in [0, 1]; one value serves all channels."""
    on_corrupt: Literal["raise", "skip"] = "raise"
    """What a corrupt image does: stop the run, or be counted and weigh nothing."""
    exclude: str = ""
    """File written by `eqvision data check`: examples named there are left out of training."""
    num_threads: int = 2
    """Threads that read and transform images."""
    num_workers: int = 0
    """Processes that read and transform images; 0 uses the threads alone, which is faster on small hosts."""
    decoder: Literal["pillow", "fast"] = "pillow"
    """Training images only: pillow, or OpenCV and simplejpeg (extra [fast]). Evaluation always uses Pillow."""


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes to training images beyond the crop and flip of data.transform."""

    policy: Literal["none", "randaugment", "trivialaugment", "autoaugment", "three_augment"] = "none"
    """On the host, image by image, after crop and flip. autoaugment takes CIFAR-10's table with the cifar transform."""
    num_ops: int = 2
    """RandAugment: operations for each image."""
    magnitude: float = 9.0
    """RandAugment: strength, 0 to 10."""
    magnitude_std: float = 0.0
    """RandAugment: standard deviation of the strength; timm and DeiT train with 0.5."""
    color_jitter: float = 0.0
    """Largest relative change of brightness, contrast and saturation; 0 is off, but three_augment then takes 0.3."""
    random_erasing: float = 0.0
    """Probability that a region is replaced by noise (on the device); DeiT trains with 0.25."""
    mixup: float = 0.0
    """Alpha of the Beta distribution of mixup (on the device); 0 is off."""
    cutmix: float = 0.0
    """Alpha of the Beta distribution of CutMix (on the device); 0 is off. With both, each batch takes one of them."""
    cutmix_share: float = 0.5
    """Share of batches that take CutMix where both are on."""
    repeats: int = 1
    """How often each image appears in a batch, each time augmented anew (Hoffer et al. 2020). It must divide the batch
    size; an epoch then sees 1 / repeats of the images."""


@dataclass(frozen=True)
class OptimizerConfig:
    """The update rule."""

    name: str = "adamw"
    """adamw, sgd, lamb, lion, muon, adafactor (big_vision's), or any optimizer of optax by its name there."""
    learning_rate: float = 1e-3
    """Peak learning rate; no scaling by batch size is applied."""
    weight_decay: float = 1e-4
    """Decoupled weight decay (SGD: L2), on parameters of two and more axes only."""
    momentum: float | None = None
    """Momentum of SGD and Muon, first decay rate of the others; None keeps the optimizer's own (0.9, muon 0.95)."""
    beta2: float | None = None
    """Second decay rate of the adaptive ones; None keeps the optimizer's own (0.999, lion 0.99)."""
    eps: float | None = None
    """Added to the denominator of the adaptive ones; None keeps the optimizer's own."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradient; None does not clip."""
    clip_value: float | None = None
    """Largest absolute value of each element of the gradient."""
    clip_adaptive: float | None = None
    """Largest ratio of a unit's gradient norm to its parameter norm (Brock et al. 2021); 0.01 is common."""
    learning_rate_multipliers: dict[str, float] = field(default_factory=dict)
    """Regular expression of parameter names -> factor of the learning rate; the first that matches counts."""
    weight_decays: dict[str, float] = field(default_factory=dict)
    """Regular expression of parameter names -> weight decay instead of the one above; the first that matches counts."""
    freeze: tuple[str, ...] = ()
    """Regular expressions of parameters that do not train."""
    layer_decay: float | None = None
    """Layer-wise decay: each block's rate is this factor times the next one's; 0.65 to 0.85 in fine-tuning."""
    ema: float | None = None
    """Decay of the exponential moving average of the parameters, which is then what is evaluated; 0.9999 is common."""
    ema_warmup: bool = True
    """Begin the average with the smaller decay (1 + step) / (10 + step)."""


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate as a function of the step: warm-up times kind times cooldown."""

    kind: Literal["constant", "cosine", "linear", "polynomial", "step", "rsqrt", "cosine_restarts"] = "cosine"
    """From the peak after the warm-up: constant, to the end value along a cosine, a line or a power, in steps, as the
    inverse square root of the step, or along a cosine that starts again."""
    warmup_steps: int = 0
    """Steps in which the rate rises linearly from zero; a shorter run ends before the peak."""
    cooldown_steps: int = 0
    """Last steps, in which the rate falls linearly to zero (with constant: warm-up, stable, decay)."""
    end_fraction: float = 0.0
    """Rate at the end as a share of the peak, for cosine, linear, polynomial and cosine_restarts."""
    power: float = 2.0
    """Exponent of polynomial."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """step: shares of the run after which the rate is multiplied by `factor`."""
    factor: float = 0.1
    """step: what the rate is multiplied by."""
    timescale: int = 10_000
    """rsqrt: steps after which the rate has fallen by 1 / sqrt(2)."""
    num_cycles: int = 3
    """cosine_restarts: how often the cosine runs."""


@dataclass(frozen=True)
class DistillConfig:
    """Learning from another model's outputs."""

    teacher: str = ""
    """Run folder of the teacher; empty is off."""
    kind: Literal["logit", "token"] = "logit"
    """logit: Kullback-Leibler divergence of softened outputs (Hinton et al. 2015). token: the squared distance of
    normalised patch tokens, of two transformers with equal grids and widths."""
    weight: float = 0.5
    """Share of the distillation loss in the sum."""
    temperature: float = 1.0
    """logit: temperature of both softmaxes."""


@dataclass(frozen=True)
class LoopConfig:
    """How long, how often, and in which precision."""

    epochs: float = 10.0
    """Passes over the training data."""
    batch_size: int = 128
    """Global batch over all devices and hosts."""
    accumulate: int = 1
    """Parts into which each device's share of the batch is cut; their gradients are summed before the update."""
    eval_batch_size: int = 256
    """Global batch of evaluation."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations; parameters and statistics stay float32."""
    log_every: int = 20
    """Steps between rows of metrics.csv; a NaN loss stops the run within as many."""
    eval_every: int | None = None
    """Steps between evaluations; None evaluates after each epoch."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved, and what is kept."""

    every: int | None = None
    """Steps between checkpoints; None saves after each evaluation."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    keep_best: int = 1
    """Best checkpoints by `metric` that are kept."""
    keep_every: int | None = None
    """Checkpoints at multiples of this step are kept for good."""
    metric: str = ""
    """Metric of the best, such as test/loss; empty takes the task's own."""
    on_full: Literal["stop", "continue"] = "stop"
    """Where the disk has no room: stop the run, or go on and try again at the next checkpoint."""


@dataclass(frozen=True)
class MeshConfig:
    """How devices share the work. But for rounding, results do not depend on the layout of the same number of devices;
    what is drawn on a device (dropout, mixup) depends on its place."""

    fsdp: int = 1
    """Devices over which parameters, optimizer state and average are split; the batch is split over them too."""
    model: int = 1
    """Devices over which single layers are split (tensor parallelism, transformers)."""
    coordinator: str = ""
    """HOST:PORT of the first process; empty finds SLURM, Kubernetes or Open MPI, or runs alone. `auto` lets JAX ask all
    that it knows, `none` runs alone."""
    num_processes: int = 0
    """Number of processes, with `coordinator`."""
    process_id: int = -1
    """Number of this process, with `coordinator`."""


@dataclass(frozen=True)
class EvalConfig:
    """What is measured on frozen features beside the test split, each at the end and every so often."""

    evaluators: tuple[Literal["linear_probe", "few_shot", "knn"], ...] = ()
    """Any of linear_probe, few_shot, knn."""
    every: int | None = None
    """Steps between them, a multiple of loop.eval_every; None runs them at the end only."""


@dataclass(frozen=True)
class LogConfig:
    """Where the run is seen beside metrics.csv. None of it needs an account or a network."""

    tensorboard: bool = True
    """Write TensorBoard events where tensorboardX is installed (extra [logging])."""
    wandb: str = ""
    """Weights & Biases project; empty is off. Without a network the run is kept offline."""
    profile: str = ""
    """Steps to trace with the JAX profiler, FIRST:LAST, such as 10:15."""


@dataclass(frozen=True)
class TrainConfig:
    """A run: a pure function of this configuration (with its seed) and the step."""

    out: str = ""
    """Run folder; empty means runs/RECIPE."""
    seed: int = 0
    """Seed of initialisation, sample order, augmentation and dropout."""
    init: str = ""
    """What the run starts from: a run folder, or published weights as MODEL or MODEL:SOURCE (file, hf:organisation/
    repository, URL or tag); a head of another width starts fresh."""
    allow_config_change: bool = False
    """Resume although options differ that change the numbers of the run."""
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
