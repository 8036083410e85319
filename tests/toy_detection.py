"""Detectors of seconds, one of each kind, on small scenes of digits, and the run that trains them."""

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
from eqvision.detectors import DETECTRON2, DETR, RCNN, CenterNet, DeformableDETR, ProposalRule
from eqvision.heads import CenterHead, RoIBoxHead, RoIMaskHead, RPNHead
from eqvision.layers import Conv
from eqvision.losses import DEFORMABLE_DETR_LOSS, DETECTRON2_LOSS, DETR_LOSS, CenterNetConfig
from eqvision.mesh import BATCH, make_mesh
from eqvision.necks import FPN
from eqvision.problems import Detection
from eqvision.problems.detection import choose_family
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


def toy_mask_rcnn(*, num_classes=10, in_channels=1, norm="frozen", key):
    """A row for ``zoo.DETECTORS``: two maps, and fewer boxes than there are objects and places to draw from."""
    keys = jax.random.split(key, 5)
    backbone = toy_backbone(in_channels=in_channels, norm=norm, key=keys[0])
    return RCNN(
        backbone,
        FPN(backbone.channels, backbone.strides, 16, dialect="torchvision", key=keys[1]),
        RPNHead(16, key=keys[2]),
        (RoIBoxHead(16, num_outputs=num_classes + 1, num_boxes=num_classes, width=32, key=keys[3]),),
        RoIMaskHead(16, num_outputs=num_classes, depth=1, width=16, key=keys[4]),
        dialect=TOY_DIALECT,
        num_classes=num_classes,
        anchor_sizes=((12.0,), (24.0,)),
        count=8,
    )


TOY_DIALECT = dataclasses.replace(
    DETECTRON2,
    train_proposals=ProposalRule(30, 20),
    test_proposals=ProposalRule(30, 20),
    anchor_sample=dataclasses.replace(DETECTRON2.anchor_sample, count=16),
    box_sample=dataclasses.replace(DETECTRON2.box_sample, count=8),
    sampling_ratio=1,
)


def toy_centernet(*, num_classes=10, in_channels=1, norm="frozen", key):
    """A row for ``zoo.DETECTORS``, without a neck."""
    keys = jax.random.split(key)
    backbone = toy_backbone(in_channels=in_channels, norm=norm, key=keys[0])
    return CenterNet(backbone, None, CenterHead(backbone.channels[-1], num_classes, width=16, key=keys[1]))


LOSSES = {
    "toy_detr": DETR_LOSS,
    "toy_mask_rcnn": DETECTRON2_LOSS,
    "toy_centernet": CenterNetConfig(stride=8),
}
WITHOUT_DROPOUT = ("toy_mask_rcnn", "toy_centernet")
TOYS = {
    "toy_mask_rcnn": toy_mask_rcnn,
    "toy_centernet": toy_centernet,
    "toy_deformable": toy_deformable,
    "toy_deformable_batch_norm": functools.partial(toy_deformable, norm="batch"),
    "toy_detr": toy_detr,
}


class Scenes(DigitScenes):
    """Few small scenes; those in ``empty`` hold nothing, and those in ``corrupt`` are black and weigh nothing."""

    def __init__(self, split, length=None, empty=(), corrupt=(), masks=False):
        length = length or {"train": 24, "test": 7}[split]
        super().__init__(
            split, size=SIZE, channels=1, max_digits=OBJECTS, digit_size=(12, 24), length=length, masks=masks
        )
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

    def load(data, in_channels, split, masks=False):
        return sources(split, masks=masks) if masks else sources(split)

    monkeypatch.setattr(problem_module, "load_detection", load)


def toy_config(out: Path, *, model="toy_deformable", **optimizer) -> DetectionConfig:
    """Six steps of 8 scenes, evaluated and saved every third."""
    data = DetectionDataConfig(kind="digits", size=SIZE, test_split="test", max_objects=OBJECTS, flip=0.5)
    return DetectionConfig(
        out=str(out),
        model=DetectorConfig(name=model, in_channels=1, dropout=None if model in WITHOUT_DROPOUT else 0.0),
        task=LOSSES.get(model, DEFORMABLE_DETR_LOSS),
        data=dataclasses.replace(data, mean=(0.3,), std=(0.2,), num_threads=0, mask_crop=16),
        optimizer=OptimizerConfig(**{"learning_rate": 1e-3, **optimizer}),
        schedule=ScheduleConfig(kind="constant"),
        loop=LoopConfig(epochs=2.0, batch_size=8, eval_batch_size=8, log_every=2, eval_every=3),
        checkpoint=CheckpointConfig(keep_last=5),
    )


def toy_problem(config: DetectionConfig, train=None, test=None) -> Detection:
    """The problem of ``toy_config`` on given scenes."""
    family = choose_family(config)
    sources = (given or Scenes(split, masks=family.masks) for given, split in ((train, "train"), (test, "test")))
    return Detection(config, *sources, 10, family)


def first_batches(problem: Detection, count: int) -> list:
    """On the host."""
    stream = problem.stream(0)
    batches = [next(stream) for _ in range(count)]
    stream.close()
    return batches


def on_devices(batch, mesh: Mesh):
    return jax.device_put(batch, NamedSharding(mesh, BATCH))
