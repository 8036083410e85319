"""From a configuration to its source of data and its model; what training, evaluation and prediction share."""

from pathlib import Path

import equinox as eqx
import jax

from eqvision.classifiers import Classifier
from eqvision.data import Mixture, Source, check_labels, digits, exclude, load_arrays, open_source, read_bad_files
from eqvision.recipes import TrainConfig
from eqvision.zoo import create, require_classifier


def load_source(
    config: TrainConfig, split: str, class_names: tuple[str, ...] | None = None, *, train: bool = False
) -> Source:
    """The images of a split; with ``train`` those to train on: the mixture, less the excluded ones.

    Raises ValueError where the configuration names no path, and what sources raise.
    """
    data = config.data
    if train and data.mixture:
        if data.kind == "digits":
            raise ValueError("data.mixture needs paths, and data.kind 'digits' has none; use another kind")
        listed = _listed_path(data.exclude, list(data.mixture)) if data.exclude else None
        parts = [_load_path(config, path, split, class_names, use_list=path == listed) for path in data.mixture]
        return Mixture(parts, list(data.mixture.values()))
    return _load_path(config, data.path, split, class_names, use_list=train and bool(data.exclude))


def _listed_path(file: str, paths: list[str]) -> str:
    """The path of a mixture whose bad images are listed in a file."""
    root = read_bad_files(file).root
    for path in paths:
        if Path(path).expanduser().resolve() == Path(root).resolve():
            return path
    raise ValueError(f"data.exclude {file} is the list of {root}, which is no path of data.mixture: {', '.join(paths)}")


def _load_path(
    config: TrainConfig, path: str, split: str, class_names: tuple[str, ...] | None, *, use_list: bool
) -> Source:
    data = config.data
    if data.kind == "digits":
        return digits(split)
    if not path:
        raise ValueError(
            f"data.kind {data.kind!r} needs a path for the split {split!r}: --data.path PATH (for 'folder' with the "
            f"layout PATH/{split}/CLASS/*.jpg; data.mixture serves training only)"
        )
    if data.kind == "arrays":
        return load_arrays(path, split)
    source = open_source(
        data.kind,
        path,
        split,
        in_channels=config.model.in_channels,
        on_corrupt=data.on_corrupt,
        class_names=class_names,
    )
    return exclude(source, data.exclude, path, split) if use_list else source


def num_outputs(config: TrainConfig, source: Source) -> int:
    """The width of the head: as configured, else from the data."""
    if config.model.num_classes is not None:
        return config.model.num_classes
    if source.labels.ndim == 2:
        return source.labels.shape[1]
    return 1 if config.task.kind == "regression" else len(source.class_names)


def check_targets(config: TrainConfig, source: Source, num_classes: int) -> None:
    """Raise ValueError unless the labels fit the task and the head: on the host, before the first step."""
    kind, labels = config.task.kind, source.labels
    if kind == "multi_label" and labels.ndim == 1:
        raise ValueError(
            f"task.kind 'multi_label' needs a row of 0/1 for each image, but {source.describe(0)} has the class index "
            f"{labels[0]}; use --task.kind single_label, or give labels of shape [n k]"
        )
    if kind != "regression":
        check_labels(source, num_classes)
        return
    width = labels.shape[1] if labels.ndim == 2 else 1
    if width != num_classes:
        raise ValueError(
            f"{source.describe(0)} has {width} values to predict but model.num_classes is {num_classes}; "
            "leave --model.num-classes out to take it from the data"
        )


def build_model(config: TrainConfig, num_classes: int) -> tuple[Classifier, eqx.nn.State]:
    """The model of a run as it is before step 0."""
    model = config.model
    require_classifier(model.name)
    return create(
        model.name,
        num_classes=num_classes,
        image_size=model.image_size,
        in_channels=model.in_channels,
        dropout=model.dropout,
        drop_path=model.drop_path,
        remat=model.remat,
        unroll=model.unroll,
        attention=model.attention,
        key=jax.random.fold_in(jax.random.key(config.seed), 0),
    )
