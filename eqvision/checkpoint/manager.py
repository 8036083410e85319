"""Checkpoints by orbax: written in the background, verified when read, pruned by age and by score."""

import os
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

import jax
from jaxtyping import Array, PyTree

from eqvision.checkpoint.digest import digests
from eqvision.checkpoint.reading import reads_finish
from eqvision.checkpoint.record import CheckpointError, DamagedError, Record, named, named_leaves, pack, unnamed, unpack
from eqvision.checkpoint.retention import steps_to_keep
from eqvision.recipes.config import CheckpointConfig

T = TypeVar("T")
TEMPORARY = ".orbax-checkpoint-tmp"  # orbax renames a folder of this suffix when all of it is written
MARGIN = 64 * 2**20  # bytes beyond the arrays: indices, records, what others write meanwhile


@dataclass(frozen=True)
class Restored(Generic[T]):
    """A verified state and what is recorded beside it."""

    state: T
    record: Record


class Checkpoints:
    """The checkpoints of a run folder. Use as a context manager: leaving it waits for what is being written."""

    def __init__(self, folder: Path, config: CheckpointConfig | None = None, *, lower_is_better: bool = False):
        self.folder = folder.absolute()
        self._config = CheckpointConfig() if config is None else config
        self._lower_is_better = lower_is_better
        self._writer: Any = None
        self._writing: Record | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        finally:
            if self._writer is not None:
                self._writer.close()

    def steps(self) -> list[int]:
        """Steps that have a whole folder, in order."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())

    def latest_step(self) -> int | None:
        return self.steps()[-1] if self.steps() else None

    # Writing

    def clean(self) -> None:
        """Remove what a killed run was writing or deleting; for the process that trains in this folder alone."""
        if jax.process_index() or not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            if TEMPORARY in path.name or path.name.endswith(".deleting"):
                print(f"removed an unfinished checkpoint: {path}", file=sys.stderr)
                shutil.rmtree(path)

    def save(self, step: int, state: PyTree[Array], record: Record | None = None) -> None:
        """Copy the state and write it in the background, with a digest of each leaf.

        Raises CheckpointError where the disk has no room and the configuration says ``stop``; what was saved before
        is intact. An error of the background writer is raised by the next call.
        """
        import orbax.checkpoint as ocp

        self.wait()
        if step in self.steps() or not self._has_room(step, state):
            return
        record = replace(record or Record(step), digests=digests(state))
        if self._writer is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._writer = ocp.AsyncCheckpointer(_handler())
        arguments = ocp.args.Composite(state=ocp.args.PyTreeSave(named(state)), record=ocp.args.JsonSave(pack(record)))
        self._writer.save(self.folder / str(step), args=arguments)
        self._writing = record

    def wait(self) -> None:
        """Until the last checkpoint is on disk; only then are older ones removed."""
        if self._writer is None or self._writing is None:
            return
        record, self._writing = self._writing, None
        try:
            self._writer.wait_until_finished()
        except Exception as error:
            self._failed(record.step, error)
            return
        self._prune(record)

    def _has_room(self, step: int, state: PyTree[Array]) -> bool:
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + MARGIN
        existing = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if free >= needed:
            return True
        self._full(step, f"it needs {needed / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are free")
        return False

    def _failed(self, step: int, error: Exception) -> None:
        """The writer's error, as ours; its half-written folder is removed."""
        for path in self.folder.glob(f"{step}{TEMPORARY}*"):
            shutil.rmtree(path, ignore_errors=True)
        if "No space left" not in str(error) and "RESOURCE_EXHAUSTED" not in str(error):
            raise CheckpointError(
                f"checkpoint of step {step} could not be written to {self.folder}: {error}"
            ) from error
        free = shutil.disk_usage(self.folder).free
        self._full(step, f"the disk became full while it was written; {free / 2**30:.2f} GiB are free now")

    def _full(self, step: int, why: str) -> None:
        message = (
            f"no room for the checkpoint of step {step} in {self.folder}: {why}. Checkpoints on disk: "
            f"{', '.join(map(str, self.steps())) or 'none'}; they are intact"
        )
        if self._config.on_full == "stop":
            raise CheckpointError(
                f"{message}. Free some space and start the run again, or --checkpoint.on-full continue"
            )
        print(f"{message}. The run goes on and tries again at the next checkpoint", file=sys.stderr)

    def _prune(self, newest: Record) -> None:
        """After ``newest`` is whole: remove what the configuration does not keep."""
        if jax.process_index():
            return
        history = {int(step): score for step, score in newest.history.items()}
        kept = steps_to_keep(
            self.steps(),
            history,
            keep_last=self._config.keep_last,
            keep_best=self._config.keep_best,
            keep_every=self._config.keep_every,
            lower_is_better=self._lower_is_better,
        )
        for step in set(self.steps()) - kept:
            # Renamed first: a deletion that is cut short must not look like a damaged checkpoint.
            doomed = self.folder / f"{step}.deleting"
            os.replace(self.folder / str(step), doomed)
            shutil.rmtree(doomed)

    # Reading

    def record(self, step: int) -> Record:
        """What is recorded beside the arrays of ``step``. Raises DamagedError, and CheckpointError as ``unpack``."""
        import orbax.checkpoint as ocp

        try:
            with reads_finish(), ocp.Checkpointer(_handler()) as reader:
                stored = reader.restore(self.folder / str(step), args=ocp.args.Composite(record=ocp.args.JsonRestore()))
        except Exception as error:
            raise DamagedError(f"record/metadata cannot be read: {_first_line(error)}") from error
        return unpack(stored["record"])

    def restore(self, step: int, like: T) -> T:
        """The verified state of ``step``, shaped, typed and placed as ``like``.

        Raises DamagedError, naming leaves, where the arrays are not what was written, and CheckpointError with the
        first names that differ where the checkpoint is of another model.
        """
        return self._restore(step, like).state

    def restore_newest(self, like: T, *, set_aside: bool = False) -> Restored[T] | None:
        """The newest state that is undamaged; None where there is no checkpoint at all.

        Each damaged one is named on stderr and, with ``set_aside``, moved to ``damaged/`` beside the folder, so that
        the run can write that step again. Raises CheckpointError where none of them is good.
        """
        reasons = []
        for step in reversed(self.steps()):
            try:
                return self._restore(step, like)
            except DamagedError as error:
                reasons.append(f"step {step} is damaged: {error}")
                print(f"checkpoint {self.folder}/{reasons[-1]}; trying the one before it", file=sys.stderr)
            if set_aside:
                self._set_aside(step)
        if reasons:
            raise CheckpointError(
                f"no checkpoint in {self.folder} is undamaged:\n  " + "\n  ".join(reasons) + "\nNothing was deleted. "
                "Copy one back from elsewhere, or start again in another --out"
            )
        return None

    def _set_aside(self, step: int) -> None:
        if jax.process_index():
            return
        place = self.folder.parent / "damaged"
        place.mkdir(exist_ok=True)
        names = (place / (str(step) + "_" * count) for count in range(1000))
        os.replace(self.folder / str(step), next(name for name in names if not name.exists()))

    def _restore(self, step: int, like: T) -> Restored[T]:
        import orbax.checkpoint as ocp

        record = self.record(step)
        self._check_names(step, record, like)
        abstract = jax.tree.map(_abstract, named(like))
        restore = ocp.checkpoint_utils.construct_restore_args(abstract)
        arguments = ocp.args.Composite(state=ocp.args.PyTreeRestore(item=abstract, restore_args=restore))
        try:
            with reads_finish(), ocp.Checkpointer(_handler()) as reader:
                tree = reader.restore(self.folder / str(step), args=arguments)["state"]
        except Exception as error:
            raise DamagedError(f"its arrays cannot be read: {_first_line(error)}") from error
        found = digests(tree)
        wrong = [name for name, digest in record.digests.items() if found[name] != digest]
        if wrong:
            raise DamagedError(f"{len(wrong)} leaves are not what was written: {', '.join(wrong[:5])}")
        return Restored(unnamed(like, tree), record)

    def _check_names(self, step: int, record: Record, like: PyTree) -> None:
        """Compare names, types and shapes before orbax does: its own message lists none, and it casts in silence."""
        stored = {name: digest.partition(":")[0] for name, digest in record.digests.items()}
        wanted = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in named_leaves(like).items()}
        differ = [
            f"{name}: checkpoint {stored.get(name, 'has none')}, model {wanted.get(name, 'has none')}"
            for name in sorted({*stored, *wanted})
            if stored.get(name) != wanted.get(name)
        ]
        if differ:
            first = "\n  ".join(differ[:5])
            raise CheckpointError(
                f"checkpoint {self.folder}/{step} is of another model; {len(differ)} leaves differ:\n  {first}"
            )


def _handler() -> Any:
    import orbax.checkpoint as ocp

    # Trained weights hardly compress, and trying takes most of the time of a save.
    arrays = ocp.PyTreeCheckpointHandler(use_compression=False)
    return ocp.CompositeCheckpointHandler(state=arrays, record=ocp.JsonCheckpointHandler())


def _abstract(leaf: Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
