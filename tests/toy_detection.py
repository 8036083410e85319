"""A detector of seconds: tiny Deformable DETR and DETR on small scenes of digits, and the run that trains them."""

import dataclasses
import functools
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

import eqvision.problems.detection as problem_module
import eqvision.train as train_module
from eqvision.backbones.resnet import ConvNorm, ResidualBlock, ResNet
from eqvision.data.detection import DigitScenes
from eqvision.detectors import DETR, DeformableDETR
from eqvision.layers import Conv
from eqvision.losses import DEFORMABLE_DETR_LOSS, DETR_LOSS
from eqvision.mesh import BATCH, make_mesh
from eqvision.problems import Detection
from eqvision.recipes import (
    CheckpointConfig,
    DetectionConfig,
    DetectionDataConfig,
    DetectorConfig,
    LoopConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from eqvision.zoo import DETECTORS

SIZE, OBJECTS = (48, 48), 4
SIZES = {"num_queries": 6, "width": 32, "num_heads": 2, "mlp_dim": 32, "encoder_depth": 1, "decoder_depth": 2}


class PatchBackbone(eqx.Module):
    """One convolution to a map of 6x6 places: little to compile."""

    conv: Conv
    channels: tuple[int, ...] = eqx.field(static=True, default=(16,))
    strides: tuple[int, ...] = eqx.field(static=True, default=(8,))
    in_channels: int = eqx.field(static=True, default=1)

    def __call__(self, images, state, *, train=False, key=None):
        return (jax.nn.relu(self.conv(images)),), state

    def intermediates(self, images, state, layers):
        return self(images, state)[0]


def toy_backbone(*, in_channels, norm, key):
    """Batch norm in one residual block, or none at all, so that no image of a batch is seen by another."""
    keys = jax.random.split(key)
    if norm == "frozen":
        return PatchBackbone(Conv(in_channels, 16, 8, stride=8, padding=0, use_bias=True, key=key))
    stem = ConvNorm(in_channels, 16, 7, stride=4, norm=norm, key=keys[0])
    block = ResidualBlock(16, (16,), (3,), (1,), shortcut="projection", zero_scale=False, norm=norm, key=keys[1])
    return ResNet(stem, ((block,),), pool_stem=True, in_channels=in_channels)


def toy_deformable(*, num_classes=10, in_channels=1, norm="frozen", dropout=0.0, key):
    """A row for ``zoo.DETECTORS``."""
    keys = jax.random.split(key)
    backbone = toy_backbone(in_channels=in_channels, norm=norm, key=keys[0])
    options = {"num_classes": num_classes, "num_levels": 2, "num_points": 2, "dropout": dropout}
    return DeformableDETR(backbone, **SIZES, **options, key=keys[1])


def toy_detr(*, num_classes=10, in_channels=1, norm="frozen", dropout=0.0, key):
    """A row for ``zoo.DETECTORS``."""
    keys = jax.random.split(key)
    backbone = toy_backbone(in_channels=in_channels, norm=norm, key=keys[0])
    return DETR(backbone, num_classes=num_classes, dropout=dropout, **SIZES, key=keys[1])


TOYS = {
    "toy_deformable": toy_deformable,
    "toy_deformable_batch_norm": functools.partial(toy_deformable, norm="batch"),
    "toy_detr": toy_detr,
}


class Scenes(DigitScenes):
    """Few small scenes; those in ``empty`` hold nothing, and those in ``corrupt`` are black and weigh nothing."""

    def __init__(self, split, length=None, empty=(), corrupt=()):
        length = length or {"train": 24, "test": 7}[split]
        super().__init__(split, size=SIZE, channels=1, max_digits=OBJECTS, digit_size=(12, 24), length=length)
        self.empty, self.corrupt = empty, corrupt

    def _composed(self, index):
        example = super()._composed(index)
        if index in self.corrupt:
            example = example._replace(image=np.zeros_like(example.image), weight=0.0)
        if index not in {*self.empty, *self.corrupt}:
            return example
        return example._replace(boxes=example.boxes[:0], labels=example.labels[:0], masks=example.masks[:0])


def install(monkeypatch, *, devices=1, sources=Scenes):
    """The toys in the zoo, so many devices for ``train``, and ``sources(split)`` in place of the recipe's data."""
    for name, row in TOYS.items():
        monkeypatch.setitem(DETECTORS, name, row)
    monkeypatch.setattr(train_module, "make_mesh", lambda config=None: make_mesh(num_devices=devices))
    monkeypatch.setattr(problem_module, "load_detection", lambda data, in_channels, split: sources(split))


def toy_config(out: Path, *, model="toy_deformable", **optimizer) -> DetectionConfig:
    """Six steps of 8 scenes, evaluated and saved every third."""
    loss = DETR_LOSS if model == "toy_detr" else DEFORMABLE_DETR_LOSS
    data = DetectionDataConfig(kind="digits", size=SIZE, test_split="test", max_objects=OBJECTS, flip=0.5)
    return DetectionConfig(
        out=str(out),
        model=DetectorConfig(name=model, in_channels=1, dropout=0.0),
        task=loss,
        data=dataclasses.replace(data, mean=(0.3,), std=(0.2,), num_threads=0),
        optimizer=OptimizerConfig(**{"learning_rate": 1e-3, **optimizer}),
        schedule=ScheduleConfig(kind="constant"),
        loop=LoopConfig(epochs=2.0, batch_size=8, eval_batch_size=8, log_every=2, eval_every=3),
        checkpoint=CheckpointConfig(keep_last=5),
    )


def toy_problem(config: DetectionConfig, train=None, test=None) -> Detection:
    """The problem of ``toy_config`` on given scenes."""
    return Detection(config, train or Scenes("train"), test or Scenes("test"), 10)


def first_batches(problem: Detection, count: int) -> list:
    """On the host."""
    stream = problem.stream(0)
    batches = [next(stream) for _ in range(count)]
    stream.close()
    return batches


def on_devices(batch, mesh: Mesh):
    return jax.device_put(batch, NamedSharding(mesh, BATCH))
