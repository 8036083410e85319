"""Pictures of what a classifier is trained on and of where it looks, as PNG. Detectors: ``viz_detection.py``."""

import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Num, UInt8

from eqvision.attention_maps import AttentionMaps, attention_maps
from eqvision.data import augment_batch, normalize
from eqvision.keys import augment_key, step_key
from eqvision.mesh import batch_shards
from eqvision.predict import Run, prepare
from eqvision.recipes import TrainConfig
from eqvision.report import new_figure
from eqvision.train import Setup, set_up
from eqvision.types import ClassificationBatch

MOST_LAYERS, MOST_HEADS = 12, 16  # a picture of more would be too small to read


class TrainingBatch(NamedTuple):
    """The first rows of a batch as the model sees them, and the names of its classes."""

    images: UInt8[np.ndarray, "b h w c"]
    labels: Num[np.ndarray, "b ..."]
    weights: Float[np.ndarray, " b"]
    indices: Int[np.ndarray, " b"]
    class_names: tuple[str, ...]
    size: int  # of the whole batch


# The augmented batch


def training_batch(config: TrainConfig, step: int, count: int) -> TrainingBatch:
    """The first ``count`` rows of the batch of ``step`` (from 1, as in metrics.csv), augmented as in training.

    Raises ValueError for a step or count below 1, and what training raises for a configuration that does not fit.
    """
    if step < 1 or count < 1:
        raise ValueError(f"step={step}, count={count}; steps are counted from 1, and at least one image is drawn")
    setup = set_up(config)
    batch = host_batch(setup, step)
    images, labels = augment_rows(config, setup, batch, step, count)
    weights, indices = (np.asarray(column)[: len(images)] for column in (batch.weights, batch.indices))
    return TrainingBatch(images, labels, weights, indices, setup.problem.source.class_names, len(batch.images))


def host_batch(setup: Setup, step: int) -> Any:
    """What the stream of a run, of any kind, gives for a step (from 1)."""
    stream: Any = setup.problem.stream(step - 1)
    try:
        return next(stream)
    finally:
        stream.close()


def augment_rows(
    config: TrainConfig, setup: Setup, batch: ClassificationBatch, step: int, count: int
) -> tuple[UInt8[np.ndarray, "n h w c"], Num[np.ndarray, "n ..."]]:
    """What the devices make of the first rows, as pixels again: mixup, CutMix, random erasing.

    Images are mixed within the rows that one device works on at a time, so the result depends on the number of
    devices, as it does in training.
    """
    parts = config.loop.accumulate
    rows = len(batch.images) // (batch_shards(setup.mesh) * parts)
    images, labels = [], []
    for number in range(-(-min(count, len(batch.images)) // rows)):
        part = jax.tree.map(lambda x, start=number * rows: jnp.asarray(x[start : start + rows]), batch)
        key = _key(config.seed, step, number // parts, None if parts == 1 else number % parts)
        mixed, targets = _mixed(config, part, key, setup.problem.num_classes)
        images.append(_pixels(mixed, config))
        labels.append(np.asarray(targets))
    return np.concatenate(images)[:count], np.concatenate(labels)[:count]


def _key(seed: int, step: int, device: int, part: int | None) -> Any:
    """The key that the training step (eqvision/step.py) gives to ``augment_batch``; a test holds the two together."""
    key = jax.random.fold_in(step_key(seed, step - 1), device)
    return augment_key(key if part is None else jax.random.fold_in(key, part))


def _mixed(config: TrainConfig, part: ClassificationBatch, key: Any, num_classes: int) -> tuple[Any, Any]:
    images, mixing = normalize(part.images, config.data.mean, config.data.std), config.augment
    if not (mixing.mixup or mixing.cutmix or mixing.random_erasing):
        return images, part.labels
    augment = jax.jit(augment_batch, static_argnames=("config", "num_classes"))
    return augment(images, part.labels, part.weights, key, config=mixing, num_classes=num_classes)


def _pixels(images: Any, config: TrainConfig) -> UInt8[np.ndarray, "b h w c"]:
    unit = np.asarray(images) * np.asarray(config.data.std, np.float32) + np.asarray(config.data.mean, np.float32)
    return np.clip(np.rint(unit * 255), 0, 255).astype(np.uint8)


def draw_batch(batch: TrainingBatch, path: Path, title: str) -> Path:
    """A grid of the images; titles give labels, the shares of mixed ones, and weights that are not 1."""
    columns = min(len(batch.images), 8)
    lines = -(-len(batch.images) // columns)
    titles = [
        label_text(np.asarray(label), batch.class_names) + weight_text(float(weight))
        for label, weight in zip(batch.labels, batch.weights, strict=True)
    ]
    rows = max(text.count("\n") + 1 for text in titles)
    figure = new_figure(1.6 * columns, (1.5 + 0.17 * rows) * lines + 0.5)
    figure.suptitle(title, fontsize=11)
    grid = np.atleast_1d(figure.subplots(lines, columns)).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, image, text in zip(grid, batch.images, titles, strict=False):
        _show(axes, image)
        axes.set_title(text, fontsize=8)
    return _save(figure, path)


def label_text(label: Num[np.ndarray, "..."], names: tuple[str, ...]) -> str:
    """A class, the classes of a soft label with their shares (three at most), all classes of a 0/1 row, or values."""
    if label.ndim == 0 and np.issubdtype(label.dtype, np.integer):
        return _short(names[int(label)])
    values = np.atleast_1d(label)
    if len(names) != len(values):
        return "\n".join(f"{value:.3g}" for value in values[:3])
    order = [i for i in np.argsort(-values, kind="stable") if values[i] > 0.005]
    lines = [_short(names[i]) + ("" if values[i] == 1 else f" {values[i]:.2f}") for i in order[:3]]
    return "\n".join([*lines, *([f"+ {len(order) - 3} more"] if len(order) > 3 else [])]) or "no class"


def weight_text(weight: float) -> str:
    return "" if weight == 1 else f"\nweight {weight:.2g}"


def _short(name: str, length: int = 18) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


# Attention


def draw_attention(run: Run, image: Path, out: Path) -> tuple[Path, Path]:
    """Two pictures in the folder ``out``: NAME_layers.png (rollout, and each layer's mean over heads) and
    NAME_heads.png (each head of each layer). Raises ValueError for a model without attention over patches, and what
    ``predict.prepare`` raises.
    """
    pixels = prepare(run, image)
    data = run.config.data
    maps = attention_maps(run.model, jnp.asarray(normalize(pixels[None], data.mean, data.std)))
    out.mkdir(parents=True, exist_ok=True)
    layers, heads = free_names(out, image.stem)
    title = f"{image.name}: attention of the {maps.query}, step {run.step}"
    return draw_layers(pixels, maps, layers, title), draw_heads(pixels, maps, heads, title)


def free_names(out: Path, stem: str) -> tuple[Path, Path]:
    """Pictures of equal names from different folders do not overwrite each other."""
    for suffix in ("", *(f"_{number}" for number in range(2, 10_000))):
        names = (out / f"{stem}{suffix}_layers.png", out / f"{stem}{suffix}_heads.png")
        if not any(name.exists() for name in names):
            return names
    raise FileExistsError(f"{out} holds 9,999 pictures of {stem} already; empty it or choose another --out")


def draw_layers(image: UInt8[np.ndarray, "h w c"], maps: AttentionMaps, path: Path, title: str) -> Path:
    """The image, its rollout, and the mean over the heads of each layer, with the share of the brightest patch."""
    means = maps.heads.mean(axis=1)
    panels: list[tuple[str, Any]] = [("image", None), (f"rollout, max {maps.rollout.max():.1%}", maps.rollout)]
    panels += [(f"layer {layer + 1}, max {mean.max():.1%}", mean) for layer, mean in enumerate(means)]
    columns = min(len(panels), 7)
    lines = -(-len(panels) // columns)
    aspect = image.shape[0] / image.shape[1]
    figure = new_figure(1.9 * columns, (1.85 * aspect + 0.28) * lines + 0.6)
    figure.suptitle(title + "\neach map is scaled by its brightest patch, whose share is given", fontsize=11)
    grid = np.atleast_1d(figure.subplots(lines, columns)).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, (name, shares) in zip(grid, panels, strict=False):
        axes.set_title(name, fontsize=9)
        _show(axes, image) if shares is None else _overlay(axes, image, shares)
    return _save(figure, path)


def draw_heads(image: UInt8[np.ndarray, "h w c"], maps: AttentionMaps, path: Path, title: str) -> Path:
    """Each head of each layer, the longer of the two across; evenly chosen ones where there are too many to see."""
    layers, heads = (_chosen(n, most) for n, most in zip(maps.heads.shape, (MOST_LAYERS, MOST_HEADS), strict=False))
    across, down = [("layer", i) for i in layers], [("head", i) for i in heads]
    if len(heads) > len(layers):
        across, down = down, across
    aspect = image.shape[0] / image.shape[1]
    figure = new_figure(1.15 * len(across) + 0.5, 1.1 * aspect * len(down) + 0.8)
    figure.suptitle("\n".join(textwrap.wrap(title, max(20, 14 * len(across)))), fontsize=10)
    grid = figure.subplots(len(down), len(across), squeeze=False)
    for (line, column), axes in np.ndenumerate(grid):
        place = dict((down[line], across[column]))
        _overlay(axes, image, maps.heads[place["layer"], place["head"]])
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        if line == 0:
            axes.set_title(_named(across[column]), fontsize=8)
        if column == 0:
            axes.set_ylabel(_named(down[line]), fontsize=8)
    return _save(figure, path)


def _named(place: tuple[str, int]) -> str:
    return f"{place[0]} {place[1] + 1}"


def _chosen(count: int, most: int) -> list[int]:
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})


def _overlay(axes: Any, image: UInt8[np.ndarray, "h w c"], shares: Float[np.ndarray, "rows columns"]) -> None:
    """The image in grey and dim, the map above it in colour; the map is opaque where it is large."""
    grey = np.asarray(image, np.float32).mean(axis=-1) / 255
    axes.imshow(0.15 + 0.7 * grey, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    scaled = shares / max(float(shares.max()), 1e-12)
    extent = (-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5)
    axes.imshow(
        scaled, cmap="inferno", vmin=0, vmax=1, alpha=0.25 + 0.5 * scaled, interpolation="nearest", extent=extent
    )


def _show(axes: Any, image: UInt8[np.ndarray, "h w c"]) -> None:
    shown = image[..., 0] if image.shape[-1] in (1, 2) else image[..., :3]
    axes.imshow(shown, cmap="gray", vmin=0, vmax=255, interpolation="nearest" if max(image.shape) < 64 else "auto")


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
