"""One step of a run, again: the same data, the same keys, the same numbers, and what in them is not finite."""

import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import PyTree

from eqvision.checkpoint import CheckpointError, Checkpoints, named_leaves
from eqvision.data import device_feed
from eqvision.mesh import BATCH
from eqvision.run_folder import RunFolder
from eqvision.state import TrainState, abstract_state
from eqvision.step import make_step
from eqvision.train import Setup, first_of_run, set_up


class Replayed(NamedTuple):
    """What happened in a step."""

    step: int
    loss: float
    grad_norm: float
    indices: list[int]
    examples: list[str]
    not_finite: list[str]
    """Names of the parameters, statistics and moments that the step left with a value that is not finite."""

    def text(self) -> str:
        bad = f"{len(self.not_finite)} leaves not finite after it: {', '.join(self.not_finite[:8])}"
        lines = [
            f"step {self.step}: loss {self.loss!r}, norm of the gradient {self.grad_norm!r}",
            bad if self.not_finite else "all parameters are finite after it",
            f"examples {self.indices}",
            *self.examples[:8],
        ]
        return "\n".join(lines)


def replay(run: str | Path, step: int) -> Replayed:
    """Begin at the newest good checkpoint before ``step`` and repeat what the run did, up to and with that step.

    The run folder is only read. Raises CheckpointError where no checkpoint, nor the beginning of the run, is left to
    begin from, and ValueError for a step outside the run.
    """
    folder = RunFolder(run)
    setup = set_up(folder.config())
    if not 1 <= step <= setup.total:
        raise ValueError(f"--step {step} is not in the run, which has the steps 1 to {setup.total}")
    state, first = _state_before(setup, Checkpoints(folder.checkpoints), step)
    teacher = setup.problem.teacher(setup.mesh)
    update = make_step(setup.problem, setup.optimizer, setup.mesh, setup.config, teacher)
    with device_feed(setup.problem.stream(first), NamedSharding(setup.mesh, BATCH)) as feed:
        for _ in range(first + 1, step):
            state, _ = update(next(feed), state)
        batch = next(feed)
        indices = np.asarray(batch.indices).tolist()
        state, log = update(batch, state)
    examples = [setup.problem.source.describe(index) for index in indices]
    return Replayed(step, float(log.loss), float(log.grad_norm), indices, examples, _not_finite(state))


def _state_before(setup: Setup, checkpoints: Checkpoints, step: int) -> tuple[TrainState, int]:
    earlier = [each for each in checkpoints.steps() if each < step]
    if earlier:
        like = abstract_state(setup.problem.build, setup.config, setup.optimizer, setup.mesh)
        return checkpoints.restore(earlier[-1], like), earlier[-1]
    if checkpoints.steps() and setup.config.init and not Path(setup.config.init).exists():
        raise CheckpointError(f"no checkpoint before step {step} is left, and --init {setup.config.init} is gone")
    return first_of_run(setup), 0


def _not_finite(tree: PyTree) -> list[str]:
    finite = jax.device_get({name: jnp.all(jnp.isfinite(leaf)) for name, leaf in named_leaves(tree).items()})
    return [name for name, value in finite.items() if not value]


def reported_step(run: str | Path) -> int | None:
    """The step that the run says it diverged at; None where it did not."""
    reports = sorted(Path(run).glob("diverged-*.json"))
    return json.loads(reports[0].read_text())["step"] if reports else None
