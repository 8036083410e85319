"""Beginning with another run's parameters: as the start of training, or as a teacher that does not change."""

import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from eqvision.checkpoint import CheckpointError, named_leaves
from eqvision.checkpoint.record import named, unnamed
from eqvision.classifiers import Classifier
from eqvision.layers import resample_grid
from eqvision.predict import load_run
from eqvision.recipes import TrainConfig
from eqvision.state import Teacher


def start_from(run: str | Path, model: Classifier, stats: eqx.nn.State) -> tuple[Classifier, eqx.nn.State]:
    """``model`` with the parameters and statistics of the run's newest checkpoint (its average, where it keeps one).

    A head of another shape stays fresh and learned positions are resampled to the new grid; each is said on stderr.
    Raises CheckpointError with the first names where anything else differs, and what ``load_run`` raises.
    """
    source = load_run(run)
    notes: list[str] = []
    new = _copied(named_leaves(source.model), model, notes, f"{run} ({source.config.model.name})")
    new_stats = _copied(named_leaves(source.stats), stats, notes, f"{run} ({source.config.model.name}, statistics)")
    print("\n".join([f"begins with {run}, step {source.step}", *notes]), file=sys.stderr)
    return new, new_stats


def _copied(old: dict[str, Array], tree, notes: list[str], what: str):
    names = named_leaves(tree)
    wrong = sorted(name for name in {*old, *names} if not _fits(name, old, names))
    if wrong:
        lines = [f"{name}: {_shape(old, name)} there, {_shape(names, name)} here" for name in wrong[:5]]
        raise CheckpointError(
            f"--init {what} does not fit this model; {len(wrong)} parameters differ:\n  " + "\n  ".join(lines)
        )
    leaves = [_brought(name, old.get(name), leaf, notes) for name, leaf in names.items()]
    # In the order of the names: a state's own order is another, as "10" comes before "2".
    return unnamed(tree, jax.tree.unflatten(jax.tree.structure(named(tree)), leaves))


def _fits(name: str, old: dict[str, Array], new: dict[str, Array]) -> bool:
    if name.startswith("head."):
        return True
    if name not in old or name not in new:
        return False
    return old[name].shape == new[name].shape or _is_grid(name, old[name], new[name])


def _is_grid(name: str, old: Array, new: Array) -> bool:
    return name.endswith("position.weight") and old.ndim == new.ndim == 3 and old.shape[2] == new.shape[2]


def _brought(name: str, old: Array | None, new: Array, notes: list[str]) -> Array:
    if old is not None and old.shape == new.shape:
        return jnp.asarray(np.asarray(old), new.dtype)  # not bound to the one device that it was read to
    if old is not None and _is_grid(name, old, new):
        notes.append(f"  {name}: resampled from {old.shape[:2]} to {new.shape[:2]} positions")
        return resample_grid(jnp.asarray(np.asarray(old)), (new.shape[0], new.shape[1]))
    notes.append(f"  {name}: fresh, {tuple(new.shape)}" + ("" if old is None else f" instead of {tuple(old.shape)}"))
    return new


def _shape(leaves: dict[str, Array], name: str) -> str:
    return str(tuple(leaves[name].shape)) if name in leaves else "absent"


def load_teacher(config: TrainConfig, mesh: Mesh) -> Teacher | None:
    """The model of ``config.distill.teacher``, on every device; None where there is none.

    Raises ValueError for settings out of range or a teacher for other images, and what ``load_run`` raises.
    """
    distill = config.distill
    if not distill.teacher:
        return None
    if not 0 < distill.weight <= 1 or distill.temperature <= 0:
        raise ValueError(
            f"--distill.weight {distill.weight}, --distill.temperature {distill.temperature}; "
            "expected 0 < weight <= 1 and a positive temperature"
        )
    run = load_run(distill.teacher)
    sees, gets = (run.config.data.mean, run.config.data.std), (config.data.mean, config.data.std)
    if sees != gets or run.config.model.in_channels != config.model.in_channels:
        raise ValueError(
            f"the teacher {distill.teacher} was trained with (mean, std) {sees} and {run.config.model.in_channels} "
            f"channels, this run has {gets} and {config.model.in_channels}; give both the same --data.mean, --data.std"
        )
    return jax.device_put(Teacher(run.model, run.stats), NamedSharding(mesh, P()))
