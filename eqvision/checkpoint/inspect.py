"""What a checkpoint holds, as text; the arrays are read and verified, no model is needed."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from eqvision.checkpoint.digest import digests
from eqvision.checkpoint.manager import Checkpoints
from eqvision.checkpoint.record import CheckpointError, DamagedError, Record


def describe_checkpoint(path: str | Path, *, leaves: int | None = 20) -> str:
    """Of one checkpoint, or each of a run folder: step, score, versions, the largest leaves, and whether it is whole.

    Raises CheckpointError where the path holds none.
    """
    folder, steps = _find(Path(path))
    checkpoints = Checkpoints(folder)
    return "\n\n".join(_describe(checkpoints, step, leaves if len(steps) == 1 else 0) for step in steps)


def _find(path: Path) -> tuple[Path, list[int]]:
    """RUN, RUN/checkpoints or RUN/checkpoints/STEP."""
    if path.name.isdigit() and path.is_dir():
        return path.parent, [int(path.name)]
    for folder in (path / "checkpoints", path):
        steps = Checkpoints(folder).steps()
        if steps:
            return folder, steps
    raise CheckpointError(f"{path} holds no checkpoint; give RUN_FOLDER, RUN_FOLDER/checkpoints or one step's folder")


def _describe(checkpoints: Checkpoints, step: int, leaves: int | None) -> str:
    place = f"{checkpoints.folder}/{step}"
    try:
        record = checkpoints.record(step)
        damaged = verify(checkpoints, step, record)
    except DamagedError as error:
        return f"{place}\n  DAMAGED: {error}"
    state = f"DAMAGED: {len(damaged)} leaves: {', '.join(damaged[:5])}" if damaged else "every leaf has its digest"
    score = "" if record.score is None else f"\n  score {record.score:g}"
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    size = sum(_bytes(digest) for digest in record.digests.values())
    lines = [f"{place}\n  step {record.step}{score}\n  {len(record.digests)} leaves, {size / 2**20:.1f} MiB; {state}"]
    lines += [f"  written by {versions}"] if versions else []
    return "\n".join(lines + _table(record, leaves))


def verify(checkpoints: Checkpoints, step: int, record: Record) -> list[str]:
    """Names of the leaves whose digest differs. Raises DamagedError where the arrays cannot be read at all."""
    found = digests(_arrays(checkpoints.folder / str(step)))
    return [name for name, digest in record.digests.items() if found.get(name) != digest]


def _arrays(folder: Path) -> Any:
    """The arrays on the first device, whatever devices they were saved from."""
    import orbax.checkpoint as ocp

    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    try:
        with ocp.PyTreeCheckpointer() as reader:
            metadata = reader.metadata(folder / "state").item_metadata.tree
            abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one), metadata)
            arguments = ocp.checkpoint_utils.construct_restore_args(abstract)
            return reader.restore(folder / "state", restore_args=arguments)
    except Exception as error:
        raise DamagedError(f"its arrays cannot be read: {type(error).__name__}: {str(error)[:300]}") from error


def _table(record: Record, leaves: int | None) -> list[str]:
    largest = sorted(record.digests.items(), key=lambda item: -_bytes(item[1]))[:leaves]
    width = max((len(name) for name, _ in largest), default=0)
    rows = [f"  {name:<{width}}  {digest.replace(':', '  ')}" for name, digest in largest]
    rest = len(record.digests) - len(largest)
    return rows + ([f"  ... and {rest} smaller ones"] if rest and rows else [])


def _bytes(digest: str) -> int:
    """Size of a leaf from ``dtype[shape]:...``."""
    dtype, _, shape = digest.partition(":")[0].rstrip("]").partition("[")
    lengths = [int(length) for length in shape.split(",") if length]
    return int(np.prod(lengths, dtype=np.int64)) * jax.numpy.dtype(dtype).itemsize
