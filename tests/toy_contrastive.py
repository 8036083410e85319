"""Models of images and text of seconds, captioned digits, a few of them, and the run that trains them."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import numpy as np

import eqvision.problems.contrastive as problem_module
import eqvision.train as train_module
from eqvision.backbones import TextSize, ViTSize
from eqvision.data.pairs import CaptionedDigits
from eqvision.mesh import make_mesh
from eqvision.multimodal import ClipViTSize, SiglipSize, clip_vit, siglip
from eqvision.problems import Contrastive, contrastive_problem
from eqvision.recipes import (
    CheckpointConfig,
    ClipModelConfig,
    ContrastiveConfig,
    ContrastiveLossConfig,
    LoopConfig,
    OptimizerConfig,
    PairsDataConfig,
    ScheduleConfig,
    TokenizerConfig,
)
from eqvision.zoo_language import LANGUAGE

VISION, TEXT = ViTSize(16, 1, 2, 32), TextSize(16, 1, 2, 32)
TOYS = {
    "toy_clip": partial(clip_vit, ClipViTSize(VISION, 4, 8, TEXT, 8)),
    "toy_siglip": partial(siglip, SiglipSize(VISION, 4, 8, TEXT)),
}
LOSSES = {"toy_siglip": "sigmoid"}


class FewDigits(CaptionedDigits):
    """Some captioned digits; those in ``corrupt`` weigh nothing."""

    def __init__(self, split, length=None, corrupt=()):
        super().__init__(split, length=length or {"train": 24, "test": 7}[split])
        self.corrupt = corrupt

    def __getitem__(self, index):
        return super().__getitem__(index)._replace(weight=float(index not in self.corrupt))


def install(monkeypatch, *, devices=1, sources=FewDigits):
    """The toys in the zoo, so many devices for ``train``, and ``sources(split)`` in place of the recipe's data, which
    None leaves as they are."""
    for name, row in TOYS.items():
        monkeypatch.setitem(LANGUAGE, name, row)
    monkeypatch.setattr(train_module, "make_mesh", lambda config=None: make_mesh(num_devices=devices))
    if sources:
        monkeypatch.setattr(problem_module, "load_pairs", lambda data, channels, split: sources(split))


def toy_config(out: Path | str, *, model="toy_clip", **optimizer) -> ContrastiveConfig:
    """Six steps of 8 digits with SGD, evaluated and saved every third."""
    return ContrastiveConfig(
        out=str(out),
        model=ClipModelConfig(name=model, image_size=8, in_channels=1, length=12),
        task=ContrastiveLossConfig(loss=LOSSES.get(model, "softmax"), chunk=3),
        data=PairsDataConfig(
            kind="digits", test_split="test", transform="digits", mean=(0.3,), std=(0.35,), num_threads=0
        ),
        tokenizer=TokenizerConfig(kind="wordpiece", size=200),
        # SGD does not make full steps of the rounding of gradients that are zero, as AdamW does
        optimizer=OptimizerConfig(**{"name": "sgd", "learning_rate": 1e-2, "weight_decay": 0.0, **optimizer}),
        schedule=ScheduleConfig(kind="constant"),
        loop=LoopConfig(epochs=2.0, batch_size=8, eval_batch_size=8, log_every=2, eval_every=3),
        checkpoint=CheckpointConfig(keep_last=5),
    )


def toy_problem(config: ContrastiveConfig, test=None) -> Contrastive:
    """The problem of ``toy_config``, evaluated on given images; the toys must be installed."""
    problem = contrastive_problem(config)
    return problem if test is None else dataclasses.replace(problem, test_source=test)


def vectors_of(model, stats, batch):
    """Of a batch's images and texts, on the host."""
    prepared = (batch.images.astype(np.float32) / 255 - np.float32(0.3)) / np.float32(0.35)

    def both(model, stats, images, text):
        return model.encode_images(images, stats)[0], model.encode_text(text)

    return tuple(map(np.asarray, jax.jit(both)(model, stats, prepared, batch.text)))


def weightless(batch, rows, junk):
    """Rows of weight 0 with another image in them."""
    weights, images = batch.weights.copy(), batch.images.copy()
    weights[rows], images[rows] = 0.0, junk
    return batch._replace(weights=weights, images=images)
