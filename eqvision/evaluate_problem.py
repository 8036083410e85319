"""Evaluate a run again, whatever kind it is of: its own problem, on its test split or on another."""

import dataclasses
from pathlib import Path

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from eqvision.mesh import make_mesh
from eqvision.predict import loop_here, newest_state
from eqvision.problems import make_problem
from eqvision.recipes import RunConfig
from eqvision.run_folder import RunFolder


def evaluate_problem_run(
    path: str | Path, *, data_path: str | None = None, split: str | None = None
) -> dict[str, float]:
    """What the run itself reports, such as ``test/loss``, of its newest checkpoint (the average of the parameters,
    where it keeps one).

    ``data_path`` stands in for the run's ``--data.path``, where the training split is read too. Raises RunFolderError
    where there is no run or no checkpoint yet, ValueError for data of other classes, and what sources raise.
    """
    folder = RunFolder(path)
    config = dataclasses.replace(_here(folder.config(), data_path, split), out=str(path))  # it may have been moved
    problem = make_problem(config)
    names = folder.class_names()
    if tuple(problem.source.class_names) != names:
        raise ValueError(
            f"{data_path} has the classes {', '.join(problem.source.class_names[:5])}, and the run has "
            f"{', '.join(names[:5])}; expected the same"
        )
    restored = newest_state(folder, config, problem.build).state
    mesh = make_mesh()
    model, stats = jax.device_put((restored.evaluated, restored.stats), NamedSharding(mesh, P()))
    return {f"test/{name}": value for name, value in problem.evaluator(mesh)(model, stats).metrics.items()}


def _here(config: RunConfig, data_path: str | None, split: str | None) -> RunConfig:
    data = dataclasses.replace(config.data, test_split=split or config.data.test_split)
    if data_path is not None:
        data = dataclasses.replace(data, path=data_path)
    return dataclasses.replace(config, data=data, loop=loop_here(config.loop))
