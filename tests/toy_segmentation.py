"""A segmenter of seconds on small scenes of digits, some pixels of them void, and the run that trains it."""

from functools import partial
from pathlib import Path

import jax
import numpy as np

import eqvision.predict_pixels as predict_module
import eqvision.problems.segmentation as problem_module
import eqvision.train as train_module
from eqvision.data.segmentation import DigitSegmentation
from eqvision.mesh import make_mesh
from eqvision.problems import Segmentation
from eqvision.recipes import (
    CheckpointConfig,
    LoopConfig,
    OptimizerConfig,
    ScheduleConfig,
    SegmentationConfig,
    SegmentationDataConfig,
    SegmenterConfig,
)
from eqvision.segmenters import unet
from eqvision.types import IGNORE_LABEL
from eqvision.zoo import SEGMENTERS

SIZE, CLASSES = (32, 48), 11
# Without a norm, so that no image of a batch is seen by another.
TOYS = {
    "toy_unet": partial(unet, width=4, depth=1, norm="none"),
    "toy_unet_batch_norm": partial(unet, width=4, depth=1, norm="batch", up="bilinear", dropout=0.2),
}


class VoidScenes(DigitSegmentation):
    """Few small scenes with a void stripe, wider from scene to scene; those in ``void`` have nothing else, and those in
    ``corrupt`` weigh nothing."""

    def __init__(self, split, length=None, void=(), corrupt=()):
        length = length or {"train": 24, "test": 7}[split]
        super().__init__(split, size=SIZE, channels=1, max_digits=3, digit_size=(12, 24), length=length)
        self.void, self.corrupt = void, corrupt

    def __getitem__(self, index):
        example = super().__getitem__(index)
        labels = example.labels.copy()
        labels[:, : SIZE[1] if index in self.void else index % 5] = IGNORE_LABEL
        return example._replace(labels=labels, weight=float(index not in self.corrupt))


def install(monkeypatch, *, devices=1, sources=VoidScenes):
    """The toys in the zoo, so many devices for ``train``, and ``sources(split)`` in place of the recipe's data, which
    None leaves as they are."""
    for name, row in TOYS.items():
        monkeypatch.setitem(SEGMENTERS, name, row)
    monkeypatch.setattr(train_module, "make_mesh", lambda config=None: make_mesh(num_devices=devices))
    for module in (problem_module, predict_module) if sources else ():
        monkeypatch.setattr(module, "load_segmentation", lambda data, channels, split, names=None: sources(split))


def toy_config(out: Path | str, *, model="toy_unet", **optimizer) -> SegmentationConfig:
    """Six steps of 8 scenes with SGD, evaluated and saved every third."""
    return SegmentationConfig(
        out=str(out),
        model=SegmenterConfig(name=model, in_channels=1),
        data=SegmentationDataConfig(
            kind="digits", test_split="test", transform="fixed", size=SIZE, mean=(0.3,), std=(0.2,), num_threads=0
        ),
        # SGD does not make full steps of the rounding of gradients that are zero, as AdamW does
        optimizer=OptimizerConfig(**{"name": "sgd", "learning_rate": 1e-2, "weight_decay": 0.0, **optimizer}),
        schedule=ScheduleConfig(kind="constant"),
        loop=LoopConfig(epochs=2.0, batch_size=8, eval_batch_size=8, log_every=2, eval_every=3),
        checkpoint=CheckpointConfig(keep_last=5),
    )


def toy_problem(config: SegmentationConfig, test=None) -> Segmentation:
    """The problem of ``toy_config``, evaluated on given scenes."""
    return Segmentation(config, VoidScenes("train"), test or VoidScenes("test"), CLASSES)


def logits_of(model, stats, images):
    """Of pixels 0..255, on the host."""
    prepared = (images.astype(np.float32) / 255 - np.float32(0.3)) / np.float32(0.2)
    return np.asarray(jax.jit(lambda m, s, x: m(x, s)[0])(model, stats, prepared))


def weightless(batch, rows, junk):
    """Rows of weight 0 with something else in them."""
    weights, images, labels = batch.weights.copy(), batch.images.copy(), batch.labels.copy()
    weights[rows], images[rows], labels[rows] = 0.0, junk, junk
    return batch._replace(weights=weights, images=images, labels=labels)


def emptied(batch, rows):
    """Rows of void pixels alone."""
    labels = batch.labels.copy()
    labels[rows] = IGNORE_LABEL
    return batch._replace(labels=labels)
