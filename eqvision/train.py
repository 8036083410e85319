"""The training loop, top to bottom: data, model, compiled step, resume, loop.

A run is a pure function of (configuration, seed, step). Random keys are folded from the seed and the step,
the data position is the step, schedules read the step: a run that is stopped and started again goes on as if
it had not been stopped.
"""

import itertools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import optax
from jax.sharding import Mesh, NamedSharding

from eqvision.checkpoint import CheckpointError, Checkpoints, Record, Restored
from eqvision.data import DeviceFeed, device_feed
from eqvision.data.stream import steps_per_epoch
from eqvision.distributed import check_same, initialise, is_main_process, on_main
from eqvision.evaluate import StoppedEvaluation
from eqvision.finetune import start_from
from eqvision.loggers import Loggers, open_loggers
from eqvision.mesh import BATCH, check_batch_size, make_mesh
from eqvision.names import nearest
from eqvision.optim import make_optimizer, make_schedule, parameter_table
from eqvision.problems import Problem, make_problem
from eqvision.profiling import Cost, StepTrace, describe_program, memory_errors, step_cost
from eqvision.progress import Progress
from eqvision.recipes import RunConfig, to_dict
from eqvision.run_folder import MetricLog, RunFolder, versions
from eqvision.sharding import sharding_table
from eqvision.signals import StoppedError, StopSignals
from eqvision.state import TrainState, abstract_state, first_state
from eqvision.step import Batch, CompiledStep, check_accumulation, make_step
from eqvision.window import RunFacts, Window


@dataclass(frozen=True)
class Result:
    """Where a run ended and what its last evaluation said."""

    folder: Path
    step: int
    metrics: dict[str, float]
    num_skipped: int


class Setup(NamedTuple):
    """What a configuration stands for; all of it is the same whenever the run is started."""

    config: RunConfig
    mesh: Mesh
    problem: Problem
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    per_epoch: int
    total: int

    @property
    def metric(self) -> str:
        """The metric by which checkpoints are best."""
        return self.config.checkpoint.metric or f"test/{self.problem.headline}"


def set_up(config: RunConfig) -> Setup:
    """Read the data and check that everything fits together, before anything is computed or written."""
    mesh = make_mesh(config.mesh)
    check_batch_size("loop.batch_size", config.loop.batch_size, mesh)
    check_batch_size("loop.eval_batch_size", config.loop.eval_batch_size, mesh)
    problem = make_problem(config)
    check_accumulation(config, mesh)
    per_epoch = steps_per_epoch(problem.source, config.loop.batch_size)
    total = max(1, round(config.loop.epochs * per_epoch))
    schedule = make_schedule(config.schedule, config.optimizer.learning_rate, total)
    optimizer = make_optimizer(config.optimizer, schedule)
    return Setup(config, mesh, problem, schedule, optimizer, per_epoch, total)


def train(config: RunConfig) -> Result:
    """Run a recipe to its end, from its last good checkpoint where the run folder has one.

    Raises RunFolderError, CheckpointError, DivergedError, StoppedError (after SIGTERM or Ctrl-C, with the state saved),
    and what sources and models raise for input that does not fit.
    """
    if not config.out:
        raise ValueError("config.out is empty; name the run folder, for instance runs/my_run")
    initialise(config.mesh)
    setup = set_up(config)
    problem = setup.problem
    like = abstract_state(problem.build, config, setup.optimizer, setup.mesh)
    folder = RunFolder(config.out)
    check_same("the configuration", json.dumps({**to_dict(config), "mesh": None, "out": ""}))
    on_main(lambda: folder.open_for_training(config, problem.source.class_names, problem.num_classes))
    lower = any(word in setup.metric for word in ("loss", "error"))
    with (
        StopSignals() as stop,
        Checkpoints(folder.checkpoints, config.checkpoint, lower_is_better=lower) as checkpoints,
    ):
        checkpoints.clean()
        begun = begin(setup, checkpoints, like)
        log = MetricLog(folder, resume_step=begun.record.step)
        with open_loggers(config, folder, begun.record.step) as loggers:
            evaluation = _Loop(setup, begun, checkpoints, log, loggers, stop, folder).run()
    on_main(lambda: problem.report(folder, log.rows, evaluation))
    return Result(
        folder.path, setup.total, evaluation.metrics, problem.source.num_skipped + problem.test_source.num_skipped
    )


def begin(setup: Setup, checkpoints: Checkpoints, like: TrainState) -> Restored[TrainState]:
    """The newest good checkpoint, in the layout of ``like``; else the state of step 0."""
    restored = checkpoints.restore_newest(like, set_aside=True)
    if restored is not None:
        return restored
    return Restored(first_of_run(setup), Record(0))


def first_of_run(setup: Setup) -> TrainState:
    """The state of step 0: fresh parameters, or those of ``config.init``."""
    model, stats = setup.problem.build()
    if setup.config.init:
        model, stats = start_from(setup.config.init, model, stats)
    return first_state(model, stats, setup.config, setup.optimizer, setup.mesh)


class _Loop:
    """The steps from where the run begins to its end, with what is written on the way."""

    def __init__(
        self,
        setup: Setup,
        begun: Restored[TrainState],
        checkpoints: Checkpoints,
        log: MetricLog,
        loggers: Loggers,
        stop: StopSignals,
        folder: RunFolder,
    ):
        self.setup, self.config, self.stop = setup, setup.config, stop
        self.state, self.first = begun.state, begun.record.step
        self.history, self.unevaluated = dict(begun.record.history), begun.record.unevaluated
        self.checkpoints, self.log, self.loggers, self.folder = checkpoints, log, loggers, folder
        self.facts = RunFacts(setup.problem.source, setup.schedule, setup.per_epoch, folder.path)
        self.window = Window(self.facts, begun.record.window)
        self.evaluator = setup.problem.evaluator(setup.mesh)
        self.evaluation: Any = None
        self.waited = 0.0

    def run(self) -> Any:
        """Gives the last evaluation, as the problem's evaluator does."""
        setup, config = self.setup, self.config
        teacher = setup.problem.teacher(setup.mesh)
        step = make_step(setup.problem, setup.optimizer, setup.mesh, config, teacher)
        trace = StepTrace(config.log.profile, self.folder.path / "profile", first=self.first, total=setup.total)
        layout = NamedSharding(setup.mesh, BATCH)
        with (
            memory_errors(lambda: step.compiled),
            trace,
            device_feed(setup.problem.stream(self.first), layout) as feed,
        ):
            cost = step_cost(setup.problem.forward_macs(), config.loop.batch_size)
            batches = self._compiled(step, feed, cost) if self.first < setup.total else iter(())
            with Progress(self.first, setup.total, config.loop.batch_size, cost) as progress:
                if self.unevaluated:  # the run was stopped between this step and its evaluation
                    self._evaluate(self.first, progress)
                for number, batch in enumerate(self._timed(batches), self.first + 1):
                    trace.before(number, self.state)
                    self._step(number, step, batch)
                    trace.after(number, self.state)
                    self._follow_up(number, progress)
        return self.evaluation or self.evaluator(self.state.evaluated, self.state.stats)

    def _compiled(self, step: CompiledStep, feed: DeviceFeed, cost: Cost) -> Iterator[Batch]:
        """Compile for the first batch, say what the step needs, and give all batches of the run."""
        batch = next(feed)
        step.compile(batch, self.state)
        if is_main_process():
            print(*describe_program(step.compiled, cost.flops, jax.local_devices()[0]), sep="\n", file=sys.stderr)
            self._describe_parameters()
        return itertools.islice(itertools.chain([batch], feed), self.setup.total - self.first)

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Add up the seconds in which a device had nothing to do for want of data.

        The host runs ahead: while it waits, the devices may still be busy with the step before.
        """
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            if jax.tree.leaves(self.state.step)[0].is_ready():
                self.waited += time.perf_counter() - start
            yield batch

    def _describe_parameters(self) -> None:
        """parameters.txt always; on the screen where groups or several devices make it worth reading."""
        optimizer, mesh = self.config.optimizer, self.setup.mesh
        table = parameter_table(optimizer, self.state.model)
        if mesh.size > 1:
            table += "\n\n" + sharding_table(self.state.model, mesh)
        (self.folder.path / "parameters.txt").write_text(table + "\n")
        grouped = optimizer.learning_rate_multipliers or optimizer.weight_decays or optimizer.freeze
        if grouped or optimizer.layer_decay is not None or mesh.shape["fsdp"] * mesh.shape["model"] > 1:
            print(table, file=sys.stderr)

    def _step(self, number: int, step: CompiledStep, batch: Batch) -> None:
        self.state, log = step(batch, self.state)
        self.window.add({"loss": log.loss, "grad_norm": log.grad_norm, **log.terms}, batch.indices)

    def _follow_up(self, number: int, progress: Progress) -> None:
        """What is due after a step: a row of the log, an evaluation, a checkpoint, the end on request."""
        evaluate_now, save_now = self._due(number)
        # The window ends wherever a resumed run may begin, so that both write the same rows.
        log_now = number % self.config.loop.log_every == 0 or evaluate_now or save_now
        if log_now:
            self._log(number, progress)
        if evaluate_now:
            self._evaluate(number, progress)
        if save_now:
            self.checkpoints.save(number, self.state, self._record(number))
        # Several processes must stop at the same step: they ask one another where they meet anyway.
        asked = self.stop.requested if jax.process_count() == 1 else log_now and self.stop.agreed()
        if asked and number < self.setup.total:
            self._stop(number)

    def _due(self, number: int) -> tuple[bool, bool]:
        """Whether this step is followed by an evaluation, and by a checkpoint."""
        last, eval_every = number == self.setup.total, self.config.loop.eval_every or self.setup.per_epoch
        save_every = self.config.checkpoint.every or eval_every
        return number % eval_every == 0 or last, number % save_every == 0 or last

    def _log(self, number: int, progress: Progress) -> None:
        row = progress.update(number, self.window.flush(number), self.waited)
        self.log.write(number, row)
        self.loggers.write(number, {**row, **progress.timing})

    def _evaluate(self, number: int, progress: Progress) -> None:
        alone = jax.process_count() == 1
        try:
            self.evaluation = self.evaluator(
                self.state.evaluated, self.state.stats, stop=lambda: alone and self.stop.requested
            )
        except StoppedEvaluation:
            self._stop(number, unevaluated=True)
        values = {f"test/{name}": value for name, value in self.evaluation.metrics.items()}
        state, last = self.state, number == self.setup.total
        problem, mesh = self.setup.problem, self.setup.mesh
        values |= problem.more_metrics(state.evaluated, state.stats, number, last, self.folder, mesh)
        if self.setup.metric in values:
            self.history[str(number)] = values[self.setup.metric]
        elif not problem.late_metrics:
            raise nearest(self.setup.metric, list(values), "checkpoint.metric")
        self.log.write(number, values)
        self.loggers.write(number, values)
        progress.note(number, self.evaluation.metrics, self.setup.problem.headline)

    def _record(self, number: int, *, unevaluated: bool = False) -> Record:
        return Record(
            number,
            score=self.history.get(str(number)),
            history=self.history,
            window=self.window.fetch(number),
            unevaluated=unevaluated,
            config=to_dict(self.config),
            versions=versions(),
        )

    def _stop(self, number: int, *, unevaluated: bool = False) -> NoReturn:
        self.checkpoints.save(number, self.state, self._record(number, unevaluated=unevaluated))
        self.checkpoints.wait()
        if number not in self.checkpoints.steps():
            raise CheckpointError(
                f"stopped by {self.stop.name} after step {number}, whose state could not be saved (see above); "
                f"the run goes on from step {self.checkpoints.latest_step() or 0}"
            )
        raise StoppedError(
            f"stopped by {self.stop.name} after step {number} of {self.setup.total}; its state is saved in "
            f"{self.folder.checkpoints}. The same command goes on from there"
        )


def main() -> None:
    """``python -m eqvision.train RECIPE ...``"""
    from eqvision.cli import main as cli

    sys.argv.insert(1, "train")
    cli()


if __name__ == "__main__":
    main()
