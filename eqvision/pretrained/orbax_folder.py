"""Checkpoints that Flax programs write by orbax: a folder of many small files."""

from pathlib import Path

import numpy as np

from eqvision.pretrained.errors import WeightsError
from eqvision.pretrained.tree import flatten, flax_tensors

DESCRIPTION = "_METADATA"  # the file that lists a checkpoint's arrays


def orbax_folder(folder: Path) -> Path | None:
    """Where the arrays are: the folder itself or, in one step of a CheckpointManager, its ``default``."""
    return next((each for each in (folder, folder / "default") if (each / DESCRIPTION).is_file()), None)


def read_orbax(folder: Path) -> dict[str, np.ndarray]:
    """The parameters by names joined with ``/``; of a training state, without the optimizer (``flax_tensors``).

    Raises WeightsError where the description is broken, and whatever orbax raises for broken arrays.
    """
    import jax
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as reader:
        described = reader.metadata(folder.absolute()).item_metadata
        if described is None:  # orbax has logged why
            raise WeightsError(f"its {DESCRIPTION} cannot be read; the checkpoint is damaged")
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), described.tree)
        return flax_tensors(flatten(reader.restore(folder.absolute(), restore_args=as_numpy), "/"))
