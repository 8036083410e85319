"""A masked autoencoder of seconds on the images of ``toy.py``, and the run that trains it."""

import dataclasses
from functools import partial

import numpy as np
from toy import NAMES, toy_images, toy_labels

import eqvision.train as train_module
from eqvision.backbones import SIZES, ViTSize
from eqvision.classifiers import vit_classifier
from eqvision.data import Arrays
from eqvision.mesh import make_mesh
from eqvision.pretraining import MAES, masked_autoencoder
from eqvision.problems import MaskedImage
from eqvision.recipes import (
    CheckpointConfig,
    DataConfig,
    LoopConfig,
    MaskedConfig,
    MaskedEvalConfig,
    MaskedModelConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from eqvision.zoo import MODELS

WIDTH = 16


def install(monkeypatch, *, devices=1):
    """The toys by name, and so many devices for ``train``."""
    monkeypatch.setitem(SIZES, "toy_masked", ViTSize(WIDTH, 2, 2, 32))
    toy = partial(masked_autoencoder, "toy_masked", 2, decoder_width=8, decoder_depth=1, decoder_heads=2)
    monkeypatch.setitem(MAES, "toy_mae", toy)
    gap = partial(vit_classifier, "toy_masked", 2, pool="mean", norm_after_pool=True, class_token=True)
    monkeypatch.setitem(MODELS, "toy_vit_mae", gap)
    monkeypatch.setattr(train_module, "make_mesh", lambda config=None: make_mesh(num_devices=devices))


def toy_config(out, data="", **optimizer) -> MaskedConfig:
    """Six steps of 16 images with SGD, evaluated and saved every third; k nearest neighbours at the end."""
    return MaskedConfig(
        out=str(out),
        model=MaskedModelConfig(name="toy_mae", image_size=8, in_channels=1),
        data=DataConfig(kind="arrays", path=str(data), transform="digits", num_threads=0),
        # SGD does not make full steps of the rounding of gradients that are zero, as AdamW does
        optimizer=OptimizerConfig(**{"name": "sgd", "learning_rate": 1e-2, "weight_decay": 0.0, **optimizer}),
        schedule=ScheduleConfig(kind="constant"),
        loop=LoopConfig(epochs=2.0, batch_size=16, eval_batch_size=16, log_every=2, eval_every=3),
        checkpoint=CheckpointConfig(keep_last=5),
        eval=MaskedEvalConfig(evaluators=("knn",)),
    )


def toy_problem(config: MaskedConfig) -> MaskedImage:
    """The problem of ``toy_config`` without reading its files."""
    train, test = (Arrays(toy_images(toy_labels(n), seed=n), toy_labels(n), NAMES) for n in (48, 20))
    return MaskedImage(config, train, test, 3)


def with_evaluators(config: MaskedConfig, *names: str) -> MaskedConfig:
    return dataclasses.replace(config, eval=dataclasses.replace(config.eval, evaluators=names))


def weightless(batch, rows, junk):
    """Rows of weight 0 with something else in them."""
    weights, images = batch.weights.copy(), batch.images.copy()
    weights[rows], images[rows] = 0.0, np.uint8(junk)
    return batch._replace(weights=weights, images=images)
