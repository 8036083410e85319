"""The training loop, top to bottom: data, model, compiled step, resume, loop.

A run is a pure function of (configuration, seed, step). Random keys are folded from the seed and the step,
the data position is the step, schedules read the step: a run that is stopped and started again goes on as if
it had not been stopped.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from eqvision.checkpoint import Checkpoints
from eqvision.classifiers import Classifier
from eqvision.data import DeviceFeed, Source, device_feed, normalize, train_stream, train_transform
from eqvision.data.stream import steps_per_epoch
from eqvision.evaluate import Evaluation, Evaluator
from eqvision.losses import weighted_mean
from eqvision.mesh import check_batch_size, make_mesh
from eqvision.optim import make_optimizer, make_schedule
from eqvision.progress import Progress
from eqvision.recipes import TrainConfig
from eqvision.report import write_report
from eqvision.run_folder import MetricLog, RunFolder
from eqvision.setup import build_model, check_targets, load_source, num_outputs
from eqvision.tasks import Task, make_task
from eqvision.types import ClassificationBatch


class TrainState(eqx.Module):
    """All that changes in a run."""

    model: Classifier
    stats: eqx.nn.State
    opt_state: optax.OptState
    step: Int[Array, ""]


class StepLog(NamedTuple):
    """What a step reports; it stays on the device until the log step."""

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]


Step = Callable[[ClassificationBatch, TrainState], tuple[TrainState, StepLog]]


class DivergedError(RuntimeError):
    """The loss or its gradient is not finite."""


@dataclass(frozen=True)
class Result:
    """Where a run ended and what its last evaluation said."""

    folder: Path
    step: int
    metrics: dict[str, float]
    num_skipped: int


def train(config: TrainConfig) -> Result:
    """Run a recipe to its end, from its last checkpoint where the run folder has one.

    Raises RunFolderError, DivergedError, and what sources and models raise for input that does not fit.
    """
    if not config.out:
        raise ValueError("config.out is empty; name the run folder, for instance runs/my_run")
    mesh = make_mesh()
    check_batch_size("loop.batch_size", config.loop.batch_size, mesh)
    check_batch_size("loop.eval_batch_size", config.loop.eval_batch_size, mesh)

    task = make_task(config.task.kind, config.task.loss, config.task.label_smoothing)
    source = load_source(config, config.data.train_split)
    test_source = load_source(config, config.data.test_split)
    num_classes = num_outputs(config, source)
    for each in (source, test_source):
        check_targets(config, each, num_classes)

    per_epoch = steps_per_epoch(source, config.loop.batch_size)
    total = max(1, round(config.loop.epochs * per_epoch))
    schedule = make_schedule(config.schedule, config.optimizer.learning_rate, total)
    optimizer = make_optimizer(config.optimizer, schedule)
    state = initial_state(config, num_classes, optimizer, mesh)

    folder = RunFolder(config.out)
    folder.open_for_training(config, source.class_names, num_classes)
    with Checkpoints(folder.checkpoints, keep=config.checkpoint.keep_last) as checkpoints:
        first = checkpoints.latest_step() or 0
        state = checkpoints.restore(first, state) if first else state
        run = _Run(config, task, source, schedule, mesh, first, total, per_epoch)
        log = MetricLog(folder, resume_step=first)
        evaluator = Evaluator(config, task, test_source, mesh)
        step = make_step(task, optimizer, mesh, config)
        evaluation = _loop(run, step, state, evaluator, log, checkpoints)
    write_report(folder, log.rows, evaluation, source.class_names, task)
    return Result(folder.path, total, evaluation.metrics, source.num_skipped + test_source.num_skipped)


def initial_state(
    config: TrainConfig, num_classes: int, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """The state of step 0, replicated over the mesh."""
    model, stats = build_model(config, num_classes)
    state = TrainState(model, stats, optimizer.init(cast(optax.Params, model)), jnp.zeros((), jnp.int32))
    return jax.device_put(state, NamedSharding(mesh, P()))


def make_step(task: Task, optimizer: optax.GradientTransformation, mesh: Mesh, config: TrainConfig) -> Step:
    """One update on a global batch, compiled at the first call; the state's memory is reused.

    Inside ``shard_map`` each device sees its rows. The loss divides sums that are taken over all devices, and the
    gradient of replicated parameters is summed over them by ``shard_map`` itself: one device and eight agree.
    """
    dtype = jnp.dtype(config.loop.compute_dtype)

    def step(batch: ClassificationBatch, state: TrainState) -> tuple[TrainState, StepLog]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), 1), state.step)
        key = jax.random.fold_in(key, jax.lax.axis_index("data"))
        images = jnp.asarray(normalize(batch.images, config.data.mean, config.data.std), dtype)

        def loss_of(model: Classifier) -> tuple[Float[Array, ""], eqx.nn.State]:
            outputs, stats = model(images, state.stats, train=True, key=key)
            return weighted_mean(*task.loss(outputs, batch)), stats

        (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(state.model)
        updates, opt_state = optimizer.update(grads, state.opt_state, cast(optax.Params, state.model))
        model = eqx.apply_updates(state.model, updates)
        return TrainState(model, stats, opt_state, state.step + 1), StepLog(loss, optax.tree.norm(grads))

    sharded = jax.shard_map(step, mesh=mesh, in_specs=(P("data"), P()), out_specs=P())
    return _compiled_on_first_call(eqx.filter_jit(sharded, donate="all-except-first"))


def _compiled_on_first_call(function: Callable) -> Step:
    """Ahead-of-time compiled: the compiled object does not wait for its result, as calling ``filter_jit`` does."""
    compiled = None

    def call(batch: ClassificationBatch, state: TrainState) -> tuple[TrainState, StepLog]:
        nonlocal compiled
        if compiled is None:
            compiled = function.lower(batch, state).compile()
        return compiled(batch, state)

    return call


class _Run(NamedTuple):
    """What stays the same during the loop."""

    config: TrainConfig
    task: Task
    source: Source
    schedule: optax.Schedule
    mesh: Mesh
    first: int
    total: int
    per_epoch: int


def _loop(
    run: _Run, step: Step, state: TrainState, evaluator: Evaluator, log: MetricLog, checkpoints: Checkpoints
) -> Evaluation:
    loop = run.config.loop
    eval_every = loop.eval_every or run.per_epoch
    save_every = run.config.checkpoint.every or eval_every
    evaluation = None
    with _feed(run) as feed, Progress(run.first, run.total, loop.batch_size) as progress:
        window = _Window(run, feed)
        for number in range(run.first + 1, run.total + 1):
            batch = next(feed)
            state, step_log = step(batch, state)
            window.add(step_log, batch.indices)
            last = number == run.total
            evaluate_now, save_now = number % eval_every == 0 or last, number % save_every == 0 or last
            # The window ends wherever a resumed run may begin, so that both write the same rows.
            if number % loop.log_every == 0 or evaluate_now or save_now:
                log.write(number, progress.update(number, window.flush(number), feed.wait_seconds))
            if evaluate_now:
                evaluation = evaluator(state.model, state.stats)
                log.write(number, {f"test/{name}": value for name, value in evaluation.metrics.items()})
                progress.note(number, evaluation.metrics, run.task.headline)
            if save_now:
                checkpoints.save(number, state)
    return evaluation if evaluation is not None else evaluator(state.model, state.stats)


def _feed(run: _Run) -> DeviceFeed:
    config = run.config
    stream = train_stream(
        run.source,
        batch_size=config.loop.batch_size,
        seed=config.seed,
        transform=train_transform(config.data.transform, config.model.image_size, config.data.interpolation),
        num_threads=config.data.num_threads,
        start_step=run.first,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return device_feed(stream, NamedSharding(run.mesh, P("data")))


class _Window:
    """The steps since the last row of the log; fetched from the device together, so that steps do not wait."""

    def __init__(self, run: _Run, feed: DeviceFeed):
        self._run, self._feed = run, feed
        self._logs: list[StepLog] = []
        self._indices: list[Int[Array, " b"]] = []

    def add(self, log: StepLog, indices: Int[Array, " b"]) -> None:
        self._logs.append(log)
        self._indices.append(indices)

    def flush(self, last: int) -> dict[str, float]:
        """Means over the window. Raises DivergedError, naming the first step whose loss or gradient is not finite."""
        logs = jax.device_get(self._logs)
        first = last - len(logs) + 1
        for offset, log in enumerate(logs):
            # Of the gradient too: a finite loss may leave NaN parameters, which must not become a checkpoint.
            for what, value in (("loss", log.loss), ("norm of the gradient", log.grad_norm)):
                if not np.isfinite(value):
                    what = f"the {what} is {value}"
                    raise DivergedError(self._diverged(first + offset, what, self._indices[offset]))
        self._logs, self._indices = [], []
        return {
            "train/loss": float(np.mean([log.loss for log in logs])),
            "train/grad_norm": float(np.mean([log.grad_norm for log in logs])),
            "train/learning_rate": self._learning_rate(last),
            "train/epoch": last / self._run.per_epoch,
        }

    def _learning_rate(self, step: int) -> float:
        """The rate that step used: optax counts updates from 0, and the log counts them from 1."""
        return np.asarray(self._run.schedule(step - 1)).item()

    def _diverged(self, step: int, what: str, indices: Int[Array, " b"]) -> str:
        rate = self._learning_rate(step)
        rows = np.concatenate([np.asarray(shard.data) for shard in indices.addressable_shards])
        names = [self._run.source.describe(int(index)) for index in rows[:3]]
        return (
            f"{what} at step {step} (learning rate {rate:.3g}); nothing after it was saved.\n"
            f"Examples of the batch, by index in the training data: {rows.tolist()}\n"
            f"The first are: {'; '.join(names)}\n"
            "Lower --optimizer.learning-rate, lengthen --schedule.warmup-steps, or set --optimizer.clip-norm 1; "
            "start again in another --out, or from the last checkpoint with the same options."
        )


def main() -> None:
    """``python -m eqvision.train RECIPE ...``"""
    import sys

    from eqvision.cli import main as cli

    sys.argv.insert(1, "train")
    cli()


if __name__ == "__main__":
    main()
