"""What a masked autoencoder's encoder is worth: the evaluators on frozen features, of a run or of its beginning."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from eqvision.evaluators import check_evaluators, run_evaluators
from eqvision.mesh import make_mesh
from eqvision.predict import loop_here, newest_state
from eqvision.pretraining import MAE
from eqvision.problems.masked_image import as_classification, build_masked, encoder_of
from eqvision.recipes import MaskedConfig
from eqvision.run_folder import RunFolder


class MaskedRun(NamedTuple):
    """A masked autoencoder with all that is needed to use it."""

    config: MaskedConfig
    model: MAE
    stats: eqx.nn.State
    step: int


def load_masked_run(path: str | Path, *, untrained: bool = False) -> MaskedRun:
    """The newest good checkpoint of a run, or with ``untrained`` the random model that it began with; the average of
    the parameters, where the run keeps one.

    Raises RunFolderError where the folder is none, is of another kind or holds no checkpoint yet, and CheckpointError.
    """
    folder = RunFolder(path)
    config = folder.masked()
    if untrained:
        return MaskedRun(config, *build_masked(config), 0)
    restored = newest_state(folder, config, lambda: build_masked(config))
    return MaskedRun(config, restored.state.evaluated, restored.state.stats, restored.record.step)


def evaluate_encoder(
    path: str | Path,
    evaluators: Sequence[str],
    *,
    data_path: str | None = None,
    split: str | None = None,
    untrained: bool = False,
) -> dict[str, float]:
    """Metrics such as ``test/linear_probe/accuracy`` of the frozen encoder, which sees whole images.

    The evaluators are fitted to the training split of the run's data, or of ``data_path``, whose classes may be others.
    ``untrained`` takes the random encoder, to compare with. Raises as ``load_masked_run`` and ``run_evaluators`` do.
    """
    run = load_masked_run(path, untrained=untrained)
    data = dataclasses.replace(run.config.data, test_split=split or run.config.data.test_split)
    if data_path is not None:
        data = dataclasses.replace(data, path=data_path, mixture={}, exclude="")
    config = dataclasses.replace(run.config, data=data, loop=loop_here(run.config.loop))
    given = as_classification(config)
    check_evaluators(evaluators, given)
    mesh = make_mesh()
    encoder = encoder_of(run.model, config.eval.pool)
    encoder, stats = jax.device_put((encoder, run.stats), NamedSharding(mesh, P()))
    return run_evaluators(evaluators, encoder, stats, given, RunFolder(path), run.step, mesh)
