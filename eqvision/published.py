"""Published weights, used as a run is: label images and evaluate, with the preprocessing that belongs to them."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from eqvision.data import cache_folder
from eqvision.export import Card, has_card, read_card
from eqvision.export.card import num_outputs
from eqvision.predict import CLASSIFICATION, Run, evaluate
from eqvision.pretrained.assemble import Sizes
from eqvision.pretrained.cards import Preprocessing
from eqvision.pretrained.leaf_names import named_arrays
from eqvision.pretrained.load import Loaded, read_model
from eqvision.pretrained.locate import locate
from eqvision.pretrained.preprocess import Found, known_class_names, known_preprocessing, usual_preprocessing
from eqvision.recipes import DataConfig, ModelConfig, TaskConfig, TrainConfig
from eqvision.run_folder import RunFolder
from eqvision.setup import load_source
from eqvision.zoo import require_classifier

TaskKind = Literal["single_label", "multi_label", "regression"]


class _Known(NamedTuple):
    """What is known before the weights are read."""

    card: Card | None  # the header of a file of ours
    found: Found | None


class Published(NamedTuple):
    """Published weights with all that is known of them."""

    run: Run
    loaded: Loaded
    prepared: Preprocessing
    """For the size of images that the run has."""
    named: bool
    """Whether the names of the classes are known, and not numbers."""


def load_published(
    name: str,
    source: str | Path | None = None,
    *,
    layout: str | None = None,
    image_size: int | None = None,
    num_classes: int | None = None,
) -> Run:
    """The zoo's model ``name`` with published weights, ready for ``predict``, as ``load_run`` gives a run.

    Images are prepared by the card of the weights, else by ``preprocessor_config.json`` or timm's ``config.json``
    beside the file, else as is usual for the layout; standard error says which. A file of ``eqvision export`` has all
    of it in its header. ``image_size`` and ``num_classes`` are those of the weights where they are None; another
    number of classes gives a fresh last layer. Raises what ``eqvision.load`` raises.
    """
    return read_published(name, source, layout=layout, image_size=image_size, num_classes=num_classes).run


def read_published(
    name: str,
    source: str | Path | None = None,
    *,
    layout: str | None = None,
    image_size: int | None = None,
    num_classes: int | None = None,
    own_size: bool = False,
) -> Published:
    """``load_published``, with what was found out. ``own_size`` leaves positions as they are in the file."""
    require_classifier(name)
    location = locate(name, source)
    known = _known(name, source, location.path)
    size = image_size or (known.found.preprocessing.size if known.found and not own_size else None)
    sizes = Sizes(num_classes, None if size is None else (size, size))
    loaded = read_model(name, location.path, sizes, layout=layout or location.layout)
    found = known.found or usual_preprocessing(name, loaded.layout.name)
    prepared = dataclasses.replace(found.preprocessing, size=size or _own_size(loaded) or found.preprocessing.size)
    print(f"images are prepared by {found.origin}", file=sys.stderr)
    count = num_outputs(loaded.model, loaded.state, prepared.size)
    names = known.card.class_names if known.card else known_class_names(loaded.config, count)
    task = _task(known.card)
    classes = names or tuple(f"class {number}" for number in range(count))
    run = Run(_config(name, loaded, prepared, task), classes, loaded.model, loaded.state, 0)
    return Published(run, loaded, prepared, bool(names))


def _known(name: str, source: str | Path | None, path: Path) -> _Known:
    file = path / "model.safetensors" if path.is_dir() else path
    if file.suffix == ".safetensors" and file.is_file() and has_card(file):
        card = read_card(file)
        size = card.image_size[0]
        prepared = Preprocessing(size, card.mean, card.std, card.interpolation, card.crop_fraction)
        return _Known(card, Found(prepared, f"the header of {file}"))
    return _Known(None, known_preprocessing(name, source, path))


def _task(card: Card | None) -> TaskKind:
    if card is None:
        return "single_label"
    if card.task == "detection":
        raise ValueError(f"the file's header says that it holds the detector {card.model}; give that name")
    return card.task


def _own_size(loaded: Loaded) -> int | None:
    """The size of the images that the model's positions are for."""
    positions = named_arrays(loaded.model, loaded.state).get(loaded.layout.positions)
    return None if positions is None else positions.shape[0] * loaded.model.backbone.strides[-1]


def _config(name: str, loaded: Loaded, prepared: Preprocessing, task: TaskKind) -> TrainConfig:
    """The configuration of a run that would evaluate so."""
    channels = loaded.model.backbone.in_channels
    return TrainConfig(
        model=ModelConfig(name=name, image_size=prepared.size, in_channels=channels),
        task=TaskConfig(kind=task),
        data=DataConfig(
            kind="folder",
            transform="imagenet",
            interpolation=prepared.interpolation,
            mean=prepared.mean,
            std=prepared.std,
            crop_fraction=prepared.crop_fraction,
        ),
    )


def evaluate_published(
    name: str,
    source: str | Path | None = None,
    *,
    data_path: str,
    data_kind: str = "folder",
    split: str | None = None,
    evaluators: Sequence[str] = (CLASSIFICATION,),
    layout: str | None = None,
    image_size: int | None = None,
) -> dict[str, float]:
    """Metrics of published weights on the images of ``data_path``, as ``evaluate_run`` gives those of a run.

    The classes of ``data_path`` are in the order of the model's outputs; sorted folder names are for ImageNet. With
    evaluators on frozen features alone the weights need no last layer, and features are kept in the cache.
    Raises ValueError where the number of classes is another than the model's.
    """
    headless = CLASSIFICATION not in evaluators
    run = load_published(name, source, layout=layout, image_size=image_size, num_classes=1 if headless else None)
    run = _with_data(run, data_kind, data_path, split)
    width = len(run.class_names)
    if not headless:
        run = run._replace(class_names=_classes_of_data(run, width))
    folder = RunFolder(cache_folder() / "published" / name)
    return evaluate(run, folder, num_classes=width, data_path=None, split=None, evaluators=evaluators)


def _with_data(run: Run, kind: str, path: str, split: str | None) -> Run:
    data = dataclasses.replace(run.config.data, kind=kind, path=path)
    data = dataclasses.replace(data, test_split=split or data.test_split)
    return run._replace(config=dataclasses.replace(run.config, data=data))


def _classes_of_data(run: Run, width: int) -> tuple[str, ...]:
    """Names by which the data's labels are numbered as the model's outputs are."""
    source = load_source(run.config, run.config.data.test_split)
    found = source.class_names
    if len(found) == width or run.config.data.kind in ("arrays", "digits"):
        return found
    if set(found) <= set(run.class_names):
        return run.class_names
    raise ValueError(
        f"{run.config.data.path} has {len(found)} classes ({', '.join(found[:3])} ...) and {run.config.model.name} "
        f"with these weights {width} outputs ({', '.join(run.class_names[:3])} ...), so its labels cannot be numbered; "
        "give all classes, or name their folders as the model's classes"
    )
