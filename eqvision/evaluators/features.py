"""Features of a frozen model for every example of a split, computed once and kept in the run folder."""

import functools
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from eqvision.classifiers import Classifier
from eqvision.data import Arrays, Mixture, Source, device_feed, eval_stream, eval_transform, normalize
from eqvision.evaluators.console import note, progress_bar
from eqvision.ops.collectives import DATA_AXES
from eqvision.recipes import TrainConfig, to_dict
from eqvision.types import ClassificationBatch

NUM_PROBED = 32  # images whose pixels enter a fingerprint, where the source does not hold its pixels in memory


class FrozenFeatures(NamedTuple):
    """One row per example, in the order of the source. Images that could not be decoded are left out."""

    values: Float[np.ndarray, "n d"]
    labels: Int[np.ndarray, " n"]


def extract_features(
    model: Classifier, stats: eqx.nn.State, source: Source, config: TrainConfig, mesh: Mesh
) -> FrozenFeatures:
    """What the last linear layer of ``model`` reads (``Classifier.pooled``), for each example once, in float32.

    Images are prepared as in evaluation, and activations have the type that the run computes in. Every host gets all
    rows. Raises ValueError for a head without pooling, and what sources raise.
    """
    step, rows = _feature_step(mesh, config.data.mean, config.data.std, config.loop.compute_dtype), []
    sharding = NamedSharding(mesh, _data_spec(mesh))
    with (
        device_feed(_stream(source, config), sharding) as feed,
        progress_bar(len(source), "features", "image") as bar,
    ):
        for batch in feed:
            values = step(batch, model, stats)
            if values.ndim != 2:
                raise ValueError(
                    f"model {config.model.name!r} gives features of shape {values.shape}; evaluators need one row "
                    "per image: use a head that pools"
                )
            rows.append(_gathered(values, batch.labels, batch.weights))
            bar.update(len(batch.weights))
    values, labels, weights = (np.concatenate(column) for column in zip(*rows, strict=True))
    return FrozenFeatures(values[weights > 0], labels[weights > 0])


def _stream(source: Source, config: TrainConfig) -> Any:
    data = config.data
    return eval_stream(
        source,
        batch_size=config.loop.eval_batch_size,
        transform=eval_transform(data.transform, config.model.image_size, data.interpolation, data.crop_fraction),
        num_threads=data.num_threads,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


@functools.lru_cache(maxsize=8)  # compiled once in a run, however often it is evaluated
def _feature_step(
    mesh: Mesh, mean: tuple[float, ...], std: tuple[float, ...], dtype: str
) -> Callable[[ClassificationBatch, Classifier, eqx.nn.State], Array]:
    def step(batch: ClassificationBatch, model: Classifier, stats: eqx.nn.State) -> Array:
        images = jnp.asarray(normalize(batch.images, mean, std), jnp.dtype(dtype))
        return model.pooled(images, stats)

    rows = _data_spec(mesh)
    return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(rows, P(), P()), out_specs=rows))


def _data_spec(mesh: Mesh) -> P:
    return P(tuple(axis for axis in DATA_AXES if axis in mesh.axis_names))


def _gathered(*arrays: Array) -> list[np.ndarray]:
    """The rows of all hosts, in numpy."""
    if all(array.is_fully_addressable for array in arrays):
        return [np.asarray(array) for array in arrays]
    from jax.experimental.multihost_utils import process_allgather

    return [np.asarray(process_allgather(array, tiled=True)) for array in arrays]


# The cache


def cached_features(
    model: Classifier,
    stats: eqx.nn.State,
    source: Source,
    config: TrainConfig,
    mesh: Mesh,
    *,
    folder: Path,
    split: str,
    step: int,
) -> FrozenFeatures:
    """``extract_features``, or what it gave before for the same parameters, preprocessing and data.

    They are kept as ``folder``/SPLIT-STEP-DIGEST.npz. The digest is of everything that the features depend on:
    each parameter and statistic, the options of the model, the preprocessing, and ``source_fingerprint``; a file
    whose stored key differs is not used. Writing features of a split removes those of the split's other steps. Says
    on standard error when features are reused. Several hosts share ``folder``, and reuse a file only if all see it.
    """
    key = json.dumps(_key(model, stats, source, config, split, step), sort_keys=True)
    stem = re.sub(r"[^\w.-]", "_", split)  # a slice such as train[:80%] is no name of a file
    file = folder / f"{stem}-{step}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    found = _read(file, key)
    if _everywhere(found is not None) and found is not None:
        note(f"features of {split!r} at step {step}: reused {file}")
        return found
    features = extract_features(model, stats, source, config, mesh)
    if jax.process_index() == 0:
        _write(file, features, key)
        _remove_other_steps(folder, stem, step)
    return features


def _key(
    model: Classifier, stats: eqx.nn.State, source: Source, config: TrainConfig, split: str, step: int
) -> dict[str, Any]:
    data = config.data
    names = ("transform", "interpolation", "crop_fraction", "mean", "std", "on_corrupt")
    return {
        "format": 1,
        "split": split,
        "step": step,
        "parameters": _digest_arrays((model, stats)),
        "model": to_dict(config.model),
        "compute_dtype": config.loop.compute_dtype,
        "preprocessing": {name: getattr(data, name) for name in names},
        "source": source_fingerprint(source),
        "archives": _archives(config),
    }


def _digest_arrays(tree: Any) -> str:
    """SHA-256 over the bytes of all arrays: a step number alone would not tell two runs of one folder apart."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        value = _gathered(leaf)[0]
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def _archives(config: TrainConfig) -> str:
    """Digest of name, size and time of change of the files that hold many examples each."""
    data = config.data
    if data.kind in ("digits", "folder", "arrays"):  # source_fingerprint sees all of these
        return ""
    roots = [Path(path).expanduser() for path in (data.path, *data.mixture) if path]
    files = [file for root in roots for file in ([root] if root.is_file() else sorted(root.rglob("*")))]
    return hashlib.sha256("".join(_file_state(str(file)) for file in files).encode()).hexdigest()


def source_fingerprint(source: Source) -> str:
    """A digest that another data set, or a changed one, does not have.

    Of the classes, the labels and the examples' names; of the pixels of arrays; elsewhere of size and time of change
    of every file that an example is named after, and of the pixels of a few examples.
    """
    if isinstance(source, Mixture):
        parts = "".join(source_fingerprint(part) for part in source.sources)
        return hashlib.sha256(parts.encode()).hexdigest()
    digest = hashlib.sha256(json.dumps(source.class_names).encode())
    digest.update(_bytes(source.labels))
    if isinstance(source, Arrays):
        digest.update(str(source.images.shape).encode())
        digest.update(_bytes(source.images))
        return digest.hexdigest()
    for index in range(len(source)):
        digest.update(_file_state(source.describe(index)).encode())
    for index in np.unique(np.linspace(0, len(source) - 1, NUM_PROBED).astype(int)):
        example = source[int(index)]
        digest.update(f"{index}{example.image.shape}{example.weight}".encode())
        digest.update(_bytes(example.image))
    return digest.hexdigest()


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _file_state(name: str) -> str:
    try:
        found = os.stat(name)
    except OSError:  # no file of its own, such as a row of a table or a member of an archive
        return f"{name}\n"
    return f"{name} {found.st_size} {found.st_mtime_ns}\n"


def _read(file: Path, key: str) -> FrozenFeatures | None:
    if not file.exists():
        return None
    try:
        with np.load(file, allow_pickle=False) as stored:
            if str(stored["key"]) == key:
                return FrozenFeatures(stored["values"], stored["labels"])
            note(f"{file} is of other features; computing them again")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        note(f"{file} cannot be read ({error}); computing the features again")
    return None


def _write(file: Path, features: FrozenFeatures, key: str) -> None:
    """Under another name first: a reader sees a whole file or none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as target:
            np.savez(target, values=features.values, labels=features.labels, key=np.array(key))
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _remove_other_steps(folder: Path, stem: str, step: int) -> None:
    """A long run that is evaluated often would fill the disk."""
    for file in folder.glob("*.npz"):
        name, other, _ = file.name.rsplit("-", 2)
        if name == stem and other != str(step):
            file.unlink(missing_ok=True)


def _everywhere(flag: bool) -> bool:
    if jax.process_count() == 1:
        return flag
    from jax.experimental.multihost_utils import process_allgather

    return bool(np.all(process_allgather(np.array(flag))))
