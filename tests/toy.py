"""Runs of seconds: tiny generated data, and the configuration that trains a small network on it."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from eqvision.checkpoint import Checkpoints
from eqvision.data import Arrays
from eqvision.mesh import make_mesh
from eqvision.optim import make_optimizer, make_schedule
from eqvision.problems import Classification
from eqvision.recipes import (
    CheckpointConfig,
    DataConfig,
    LoopConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TaskConfig,
    TrainConfig,
)
from eqvision.setup import build_model
from eqvision.state import TrainState, first_state
from eqvision.tasks import make_task

NAMES = ("ant", "bee", "cat")


def toy_images(labels, size: int = 8, channels: int = 1, seed: int = 0):
    """Noise with a bright band whose place tells the class."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 90, (len(labels), size, size, channels), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[2 * label + 1 : 2 * label + 3] += 150
    return images


def toy_labels(count: int, classes: int = 3):
    return np.arange(count) % classes


def write_npz(file: Path, *, train: int = 48, test: int = 20, kind: str = "single_label") -> Path:
    """An archive for the recipe ``arrays``; labels are classes, three 0/1 columns, or two real values."""
    arrays = {}
    for split, count in (("train", train), ("test", test)):
        labels = toy_labels(count)
        arrays[f"images_{split}"] = toy_images(labels, seed=count)
        arrays[f"labels_{split}"] = {
            "single_label": labels,
            "multi_label": np.stack([labels == 0, labels != 1, labels == 2], axis=1).astype(np.float32),
            "regression": np.stack([labels - 1.0, labels * 0.5], axis=1).astype(np.float32),
        }[kind]
    np.savez(file, **arrays)
    return file


def write_folder(root: Path, *, train: int = 6, test: int = 3, size: int = 12) -> Path:
    """ROOT/{train,test}/{ant,bee,cat}/*.png and .jpg, so many images in each class."""
    for split, count in (("train", train), ("test", test)):
        for label, name in enumerate(NAMES):
            (root / split / name).mkdir(parents=True)
            for number, pixels in enumerate(toy_images([label] * count, size, channels=3, seed=label)):
                Image.fromarray(pixels).save(root / split / name / f"{number}{'.jpg' if number % 2 else '.png'}")
    return root


def toy_config(out: Path, data: Path, *, model: str = "small_cnn", kind: str = "single_label") -> TrainConfig:
    """Twelve steps of 16 examples with augmentation, evaluated and saved every fourth."""
    return TrainConfig(
        out=str(out),
        model=ModelConfig(name=model, image_size=8, in_channels=1),
        task=TaskConfig(kind=kind, loss="squared_error" if kind == "regression" else "cross_entropy"),
        data=DataConfig(kind="arrays", path=str(data), transform="digits"),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        schedule=ScheduleConfig(warmup_steps=2),
        loop=LoopConfig(epochs=4.0, batch_size=16, eval_batch_size=16, log_every=3, eval_every=4),
        checkpoint=CheckpointConfig(keep_last=5),
    )


def with_loop(config: TrainConfig, **changes) -> TrainConfig:
    return dataclasses.replace(config, loop=dataclasses.replace(config.loop, **changes))


def with_checkpoint(config: TrainConfig, **changes) -> TrainConfig:
    return dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, **changes))


def with_optimizer(config: TrainConfig, **changes) -> TrainConfig:
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **changes))


def toy_problem(config: TrainConfig) -> Classification:
    """The problem of ``toy_config`` without reading its files."""
    task = make_task(config.task.kind, config.task.loss, config.task.label_smoothing)
    source = Arrays(toy_images(toy_labels(6)), toy_labels(6), NAMES)
    return Classification(config, task, source, source, 3)


def fresh_state(config: TrainConfig, num_classes: int = 3, mesh: jax.sharding.Mesh | None = None) -> TrainState:
    """The state of step 0."""
    schedule = make_schedule(config.schedule, config.optimizer.learning_rate, 1000)
    optimizer = make_optimizer(config.optimizer, schedule)
    return first_state(*build_model(config, num_classes), config, optimizer, mesh or make_mesh(num_devices=1))


def saved_state(config: TrainConfig, step: int | None = None, num_classes: int = 3) -> TrainState:
    """What the run's checkpoint of ``step`` holds, or its newest."""
    checkpoints = Checkpoints(Path(config.out) / "checkpoints")
    step = checkpoints.latest_step() if step is None else step
    return checkpoints.restore(step, fresh_state(config, num_classes))


def saved_steps(config: TrainConfig) -> list[int]:
    folder = Path(config.out) / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir()) if folder.exists() else []


def bytes_of(tree) -> list[tuple[str, bytes]]:
    """Every leaf by name, bit for bit."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path), np.asarray(leaf).tobytes()) for path, leaf in leaves]
