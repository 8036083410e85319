"""A finished or running run, used: restore its model, label images, draw the labels on them, evaluate again.

What detectors' runs are used by is in ``predict_objects.py``.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Shaped, UInt8

from eqvision.checkpoint import Checkpoints, Restored
from eqvision.classifiers import Classifier
from eqvision.data import decode_image, eval_transform, normalize
from eqvision.evaluate import Evaluator
from eqvision.evaluators import check_evaluators, run_evaluators
from eqvision.mesh import make_mesh
from eqvision.optim import make_optimizer, make_schedule
from eqvision.recipes import LoopConfig, RunConfig, TrainConfig
from eqvision.run_folder import RunFolder, RunFolderError
from eqvision.setup import build_model, check_targets, load_source
from eqvision.state import TrainState, abstract_state
from eqvision.tasks import make_task

CLASSIFICATION = "classification"  # the evaluator that is no measure of frozen features


class Run(NamedTuple):
    """What a run folder holds, ready for use."""

    config: TrainConfig
    class_names: tuple[str, ...]
    model: Classifier
    stats: eqx.nn.State
    step: int


class Prediction(NamedTuple):
    """The best classes of one image, best first; a regression gives its outputs under ``output 0`` ..."""

    path: Path
    labels: tuple[str, ...]
    scores: tuple[float, ...]
    probabilities: bool = True


def load_run(path: str | Path) -> Run:
    """The newest good checkpoint of a run folder; the average of the parameters, where the run keeps one.

    Raises RunFolderError where the folder is none, is a detector's or holds no checkpoint yet, and CheckpointError.
    """
    folder = RunFolder(path)
    config, num_classes = folder.classification(), folder.read()["num_classes"]
    restored = newest_state(folder, config, lambda: build_model(config, num_classes))
    state = restored.state
    return Run(config, folder.class_names(), state.evaluated, state.stats, restored.record.step)


def newest_state(
    folder: RunFolder, config: RunConfig, build: Callable[[], tuple[Any, eqx.nn.State]]
) -> Restored[TrainState]:
    """The newest good checkpoint of a run of any kind, whose model ``build`` gives. Raises as ``load_run`` does."""
    optimizer = make_optimizer(
        config.optimizer, make_schedule(config.schedule, config.optimizer.learning_rate, 1_000_000)
    )
    # Whole on one device; where several processes read, on all, as each has devices of its own.
    mesh = make_mesh() if jax.process_count() > 1 else make_mesh(num_devices=1)
    restored = Checkpoints(folder.checkpoints).restore_newest(abstract_state(build, config, optimizer, mesh))
    if restored is None:
        raise RunFolderError(f"{folder.path} holds no checkpoint yet; let the run reach its first evaluation")
    return restored


def evaluate_run(
    path: str | Path,
    *,
    data_path: str | None = None,
    split: str | None = None,
    evaluators: Sequence[str] = (CLASSIFICATION,),
) -> dict[str, float]:
    """Metrics of the newest checkpoint, such as ``test/accuracy``, on the run's test split or on another split or path.

    ``classification`` gives what the run itself reports, on images of its classes. The others, linear_probe, few_shot
    and knn, are fitted to the features of the training split, where ``data_path`` is also looked for; its classes may
    be others. Raises UnknownNameError for other names, and what sources raise.
    """
    folder = RunFolder(path)
    return evaluate(
        load_run(path),
        folder,
        num_classes=folder.read()["num_classes"],
        data_path=data_path,
        split=split,
        evaluators=evaluators,
    )


def evaluate(
    run: Run,
    folder: RunFolder,
    *,
    num_classes: int,
    data_path: str | None,
    split: str | None,
    evaluators: Sequence[str],
) -> dict[str, float]:
    """``evaluate_run`` for a model from anywhere; ``folder`` is where features of a frozen model are kept."""
    data = run.config.data
    data = dataclasses.replace(data, test_split=split or data.test_split)
    if data_path is not None:
        data = dataclasses.replace(data, path=data_path, mixture={}, exclude="")
    run = run._replace(config=dataclasses.replace(run.config, data=data, loop=loop_here(run.config.loop)))
    frozen = [name for name in evaluators if name != CLASSIFICATION]
    check_evaluators(frozen, run.config)
    mesh = make_mesh()
    model, stats = jax.device_put((run.model, run.stats), NamedSharding(mesh, P()))
    run = run._replace(model=model, stats=stats)
    own = _classification(run, num_classes, mesh) if CLASSIFICATION in evaluators else {}
    return own | run_evaluators(frozen, model, stats, run.config, folder, run.step, mesh)


def loop_here(loop: LoopConfig) -> LoopConfig:
    """This machine may have other devices than the run had; metrics do not depend on the size of a batch."""
    size = -(-loop.eval_batch_size // jax.device_count()) * jax.device_count()
    return dataclasses.replace(loop, eval_batch_size=size)


def _classification(run: Run, num_classes: int, mesh: Mesh) -> dict[str, float]:
    config = run.config
    task = make_task(config.task.kind, config.task.loss, config.task.label_smoothing)
    source = load_source(config, config.data.test_split, run.class_names)
    check_targets(config, source, num_classes)
    metrics = Evaluator(config, task, source, mesh)(run.model, run.stats).metrics
    return {f"test/{name}": value for name, value in metrics.items()}


def predict(run: Run, paths: list[Path], *, top: int = 5, batch_size: int = 32) -> list[Prediction]:
    """The ``top`` classes of each image with their probabilities (of softmax or sigmoid, by the task).

    Raises FileNotFoundError and CorruptImageError with the path before anything is computed.
    """
    images = np.stack([prepare(run, path) for path in paths])
    predictions = []
    for start in range(0, len(paths), batch_size):
        batch = images[start : start + batch_size]
        padded = np.pad(batch, ((0, min(batch_size, len(paths)) - len(batch)), (0, 0), (0, 0), (0, 0)))
        scores = np.asarray(_scores(run, padded))[: len(batch)]
        predictions += [_named(run, path, row, top) for path, row in zip(paths[start:], scores, strict=False)]
    return predictions


def prepare(run: Run, path: Path) -> UInt8[np.ndarray, "h w c"]:
    """An image as the run's evaluation sees it."""
    config = run.config
    require_file(path)
    transform = eval_transform(
        config.data.transform, config.model.image_size, config.data.interpolation, config.data.crop_fraction
    )
    return transform(decode_image(path, config.model.in_channels))


def require_file(path: Path) -> None:
    """Raise FileNotFoundError where there is no file."""
    if not path.is_file():
        raise FileNotFoundError(f"no image file at {path.absolute()}" + ", which is a folder" * path.is_dir())


def _scores(run: Run, images: UInt8[np.ndarray, "b h w c"]) -> Float[Array, "b k"]:
    config = run.config
    outputs = _outputs(run.model, run.stats, normalize(jnp.asarray(images), config.data.mean, config.data.std))
    if config.task.kind == "single_label":
        return jax.nn.softmax(outputs)
    return jax.nn.sigmoid(outputs) if config.task.kind == "multi_label" else outputs


@jax.jit
def _outputs(model: Classifier, stats: eqx.nn.State, images: Float[Array, "b h w c"]) -> Float[Array, "b k"]:
    return model(images, stats)[0]


def _named(run: Run, path: Path, scores: Shaped[np.ndarray, " k"], top: int) -> Prediction:
    if run.config.task.kind == "regression":
        return Prediction(path, tuple(f"output {i}" for i in range(len(scores))), tuple(map(float, scores)), False)
    order = np.argsort(-scores)[:top]
    return Prediction(path, tuple(run.class_names[i] for i in order), tuple(float(scores[i]) for i in order))


def draw(prediction: Prediction, out: Path) -> Path:
    """The image with its labels on a strip below, as PNG in the folder ``out``; small images are enlarged."""
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    with Image.open(prediction.path) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB")
    factor = max(1, 256 // max(image.size))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    form = ".1%" if prediction.probabilities else ".4g"
    lines = [f"{label}  {score:{form}}" for label, score in zip(prediction.labels[:3], prediction.scores, strict=False)]
    font = ImageFont.load_default(16)
    width = max(image.width, 8 + max(int(font.getlength(line)) for line in lines) + 8)
    canvas = Image.new("RGB", (width, image.height + 20 * len(lines) + 8), "white")
    canvas.paste(image, ((width - image.width) // 2, 0))
    pen = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        pen.text((8, image.height + 4 + 20 * number), line, fill="black" if number == 0 else "gray", font=font)
    out.mkdir(parents=True, exist_ok=True)
    target = free_name(out, prediction.path.stem)
    canvas.save(target)
    return target


def free_name(folder: Path, stem: str) -> Path:
    """Pictures of equal names from different folders do not overwrite each other."""
    candidates = (folder / f"{stem}{suffix}.png" for suffix in ["", *(f"_{n}" for n in range(2, 10_000))])
    return next(path for path in candidates if not path.exists())
