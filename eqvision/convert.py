"""Weights from one library's names to another's: ``eqvision convert``."""

from pathlib import Path
from typing import Any, NamedTuple

from eqvision.export import Card, ModelFile, export_safetensors, has_card, model_of_run, read_card
from eqvision.export.files import refuse_existing, write_whole
from eqvision.pretrained.cards import Preprocessing
from eqvision.pretrained.convert import builder_options, computed_otherwise, target_layout, write_json, write_tensors
from eqvision.pretrained.errors import WeightsError
from eqvision.pretrained.hf_config import CONFIGS, hf_config, preprocessor_config
from eqvision.pretrained.hf_detector_config import (
    DETECTOR_CONFIGS,
    detector_config,
    detector_preprocessor_config,
)
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts import own
from eqvision.pretrained.save import to_layout
from eqvision.published import read_published
from eqvision.run_folder import versions
from eqvision.zoo import DETECTORS

HF_FILE = "model.safetensors"


class Converted(NamedTuple):
    """What was written."""

    files: tuple[Path, ...]
    layout: Layout
    num_tensors: int
    differences: tuple[str, ...]
    """What models of the layout compute otherwise than these weights were trained with; empty: the same numbers."""


def convert(
    source: str | Path,
    out: str | Path,
    *,
    to: str,
    name: str | None = None,
    layout: str | None = None,
    force: bool = False,
) -> Converted:
    """Write the weights of ``source`` in the names of ``to``: eqvision, an origin such as timm or hf, or a layout.

    ``source`` is what ``eqvision.load`` takes, with the model's ``name``, or a run folder or a file of eqvision,
    which know theirs. ``out`` is a file, ``.npz`` by that suffix and else safetensors. For Hugging Face it may be a
    folder, and gets ``config.json`` and ``preprocessor_config.json`` beside the weights. Each file is written whole.

    Raises FileExistsError unless ``force``, WeightsError where the model cannot be written so, and what
    ``eqvision.load`` and ``load_run`` raise.
    """
    read = _read(source, name, layout)
    if to == own.LAYOUT.name:
        export_safetensors(read.file, _plain(Path(out)), force=force)
        return Converted((Path(out),), own.LAYOUT, len(own.rules(read.file.model)), ())
    model, state, card = read.file
    target = target_layout(model, state, to, read.layout)
    config = _hf_config(read, target)
    file = _target(Path(out), config is not None)
    besides = _besides(read, config, file.parent)
    refuse_existing(file, *besides, force=force)
    tensors = to_layout(model, state, target)
    write_whole(file, lambda path: write_tensors(tensors, path, npz=file.suffix == ".npz"))
    for path, content in besides.items():
        write_whole(path, lambda temporary, content=content: write_json(content, temporary))
    differences = computed_otherwise(card.model, card.options, target, config)
    return Converted((file, *besides), target, len(tensors), tuple(differences))


class _Read(NamedTuple):
    """A model with its card, the layout that it is from, and how images are prepared."""

    file: ModelFile
    layout: str | None
    prepared: Preprocessing


def _read(source: str | Path, name: str | None, layout: str | None) -> _Read:
    path = Path(source)
    if (path / "config.yaml").is_file():
        return _own(model_of_run(path), name, source)
    if name is None:
        name = _own_name(path)
    if name in DETECTORS:
        return _read_detector(name, source, layout)
    published = read_published(name, source, layout=layout, own_size=True)
    run, prepared = published.run, published.prepared
    card = Card(
        model=name,
        num_classes=len(run.class_names),
        image_size=(prepared.size, prepared.size),
        in_channels=run.config.model.in_channels,
        class_names=run.class_names if published.named else (),
        task=run.config.task.kind,
        mean=prepared.mean,
        std=prepared.std,
        interpolation=prepared.interpolation,
        crop_fraction=prepared.crop_fraction,
        origin=f"{Path(source).name}, layout {published.loaded.layout.name}",
        versions=versions(),
        options=dict(published.loaded.options),
    )
    return _Read(ModelFile(run.model, run.stats, card), published.loaded.layout.name, prepared)


def _read_detector(name: str, source: str | Path, layout: str | None) -> _Read:
    from eqvision.export.detector_card import detector_card
    from eqvision.published_detector import read_published_detector

    published = read_published_detector(name, source, layout=layout)
    run, loaded = published.run, published.loaded
    origin = f"{Path(source).name}, layout {loaded.layout.name}"
    card = detector_card(run, origin, dict(loaded.options), num_classes=len(run.class_names), named=published.named)
    return _Read(ModelFile(run.model, run.stats, card), loaded.layout.name, _prepared(card))


def _prepared(card: Card) -> Preprocessing:
    return Preprocessing(card.image_size[0], card.mean, card.std, card.interpolation, card.crop_fraction)


def _own(file: ModelFile, name: str | None, source: str | Path) -> _Read:
    card = file.card
    if name not in (None, card.model):
        raise WeightsError(f"{source} is a run of {card.model}, and {name} is asked for; leave the name out")
    return _Read(file, None, _prepared(card))


def _own_name(path: Path) -> str:
    """The model that a file of eqvision names. Raises WeightsError for other files."""
    if path.suffix == ".safetensors" and path.is_file() and has_card(path):
        return read_card(path).model
    raise WeightsError(f"{path} does not say which model it is of; name it: --model NAME (eqvision list)")


def _hf_config(read: _Read, target: Layout) -> dict[str, Any] | None:
    model, _, card = read.file
    if target.name not in (*CONFIGS, *DETECTOR_CONFIGS):
        return None
    names = card.class_names or tuple(f"LABEL_{number}" for number in range(card.num_classes))
    if target.name in DETECTOR_CONFIGS:
        return detector_config(target.name, model, names)
    options = builder_options(card.model, card.options)
    return hf_config(target.name, model, options, card.image_size[0], names)


def _plain(out: Path) -> Path:
    if out.suffix != ".safetensors":
        raise WeightsError(f"{out}: eqvision's own files are safetensors; name one that ends in .safetensors")
    return out


def _target(out: Path, with_config: bool) -> Path:
    """The file of tensors: for Hugging Face in a folder, unless a file is named."""
    if out.suffix in (".safetensors", ".npz"):
        return out
    if with_config:
        return out / HF_FILE
    raise WeightsError(f"{out}: name a file that ends in .safetensors or .npz")


def _besides(read: _Read, config: dict[str, Any] | None, folder: Path) -> dict[Path, dict[str, Any]]:
    if config is None:
        return {}
    return {folder / "config.json": config, folder / "preprocessor_config.json": _preprocessor(read, config)}


def _preprocessor(read: _Read, config: dict[str, Any]) -> dict[str, Any]:
    card = read.file.card
    if card.task != "detection":
        return preprocessor_config(read.prepared)
    (height, width), (shorter, longer) = card.image_size, card.sides
    sizes = {
        "detr": {"shortest_edge": shorter, "longest_edge": longer},
        "lsj": {"max_height": height, "max_width": width},
    }.get(card.transform, {"height": height, "width": width})
    return detector_preprocessor_config(config["model_type"], sizes, card.mean, card.std)
