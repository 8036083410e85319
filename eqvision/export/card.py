"""What a model file says about its model, and the models that files are made of: a run's, or the zoo's."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eqvision.data import EVAL_CROP_FRACTIONS
from eqvision.export.rebuild import rebuild
from eqvision.models import Model
from eqvision.pretrained.leaf_names import named_tensors
from eqvision.recipes import DataConfig, DetectionConfig, TrainConfig
from eqvision.run_folder import RunFolder, versions
from eqvision.zoo import DETECTORS, create, default_classes


@dataclass(frozen=True)
class Card:
    """What a model file says about its model."""

    model: str
    """Name in the zoo."""
    num_classes: int
    """Outputs."""
    image_size: tuple[int, int]
    """Height and width in pixels; for detectors those of the batch's images, which may hold padding."""
    in_channels: int
    """1 is grey, 3 is RGB."""
    class_names: tuple[str, ...]
    """In the order of the outputs; empty where they have no names."""
    task: Literal["single_label", "multi_label", "regression", "detection"]
    """Softmax of the outputs, sigmoid of the outputs, the outputs themselves, or boxes."""
    mean: tuple[float, ...]
    """Mean of the channels in [0, 1]; one value serves all channels."""
    std: tuple[float, ...]
    """Standard deviation of the channels in [0, 1]; one value serves all channels."""
    interpolation: str
    """Pillow's filter by which images are resized."""
    crop_fraction: float
    """The shorter side is resized to the size over this share, then the middle is cut out."""
    origin: str
    """The run and its step, or that the parameters are random."""
    versions: dict[str, str]
    """Versions of Python and the packages that wrote the file."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the zoo's builder that differ from the model's row: what published weights were trained with."""
    transform: Literal["", "fixed", "lsj", "shifted", "detr", "resize"] = ""
    """Detectors: both sides to the size; as large as fits into it; or ``sides``. The rest is padding."""
    sides: tuple[int, int] = (0, 0)
    """Detectors, transform detr: length of the shorter side, and the most that the longer one may have."""


class ModelFile(NamedTuple):
    """A model and what its file says about it."""

    model: Any  # a Model
    state: eqx.nn.State
    card: Card


def model_of_run(path: str | Path) -> ModelFile:
    """The newest checkpoint of a run folder. Raises what ``load_run`` raises, RunFolderError for a segmenter's run.

    Dropout, rematerialisation and the implementation of attention are the zoo's: a file holds numbers, not how they
    are computed, and a fused kernel of one device would tie the program to it.
    """
    from eqvision.export.detector_card import detector_of_run
    from eqvision.predict import load_run

    folder = RunFolder(path)
    config = folder.config()
    if not isinstance(config, (TrainConfig, DetectionConfig)):
        raise folder.refusal(
            config, "runs of classifiers and detectors; eqvision predict, eval and replay take every kind of run"
        )
    if isinstance(config, DetectionConfig):
        card, detector = detector_of_run(path)
        return with_tensors(card, named_tensors(detector.model, detector.stats), "the run")
    run = load_run(path)
    config, data = run.config, run.config.data
    card = Card(
        model=config.model.name,
        num_classes=num_outputs(run.model, run.stats, config.model.image_size),
        image_size=(config.model.image_size, config.model.image_size),
        in_channels=config.model.in_channels,
        class_names=run.class_names,
        task=config.task.kind,
        mean=data.mean,
        std=data.std,
        interpolation=data.interpolation,
        crop_fraction=EVAL_CROP_FRACTIONS[data.transform] if data.crop_fraction is None else data.crop_fraction,
        origin=f"run {Path(path).resolve().name}, step {run.step}",
        versions=versions(),
    )
    return with_tensors(card, named_tensors(run.model, run.stats), "the run")


def model_of_zoo(
    name: str, *, num_classes: int | None = None, image_size: int = 224, in_channels: int = 3, seed: int = 0
) -> ModelFile:
    """An untrained model of the zoo; ``num_classes`` None as for ``create``.

    Raises UnknownNameError, and ValueError for a size that the model cannot take.
    """
    model, state = create(
        name, num_classes=num_classes, image_size=image_size, in_channels=in_channels, key=jax.random.key(seed)
    )
    data = DataConfig()
    card = Card(
        model=name,
        num_classes=default_classes(name) if num_classes is None else num_classes,
        image_size=(image_size, image_size),
        in_channels=in_channels,
        class_names=(),
        task="detection" if name in DETECTORS else "single_label",
        mean=data.mean,
        std=data.std,
        interpolation="bilinear" if name in DETECTORS else data.interpolation,
        crop_fraction=0.0 if name in DETECTORS else EVAL_CROP_FRACTIONS["imagenet"],
        origin=f"random parameters of seed {seed}: untrained",
        versions=versions(),
        transform="fixed" if name in DETECTORS else "",
    )
    return ModelFile(model, state, card)


def with_tensors(card: Card, tensors: dict[str, np.ndarray], where: str) -> ModelFile:
    """The card's model with these tensors. Raises ValueError for an unknown model, and one that names differences."""
    model, state = rebuild(
        card.model,
        tensors,
        where,
        num_classes=card.num_classes,
        image_size=card.image_size,
        in_channels=card.in_channels,
        options=card.options,
    )
    return ModelFile(model, state, card)


def num_outputs(model: Model, state: eqx.nn.State, image_size: int) -> int:
    """How many numbers the model gives for an image; nothing is computed."""
    images = jax.ShapeDtypeStruct((1, image_size, image_size, model.backbone.in_channels), jnp.float32)
    return eqx.filter_eval_shape(lambda m, s, x: m(x, s)[0], model, state, images).shape[-1]
