"""Checkpoints by orbax: one folder per step, written whole or not at all, in the background."""

from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import equinox as eqx
import jax
from jaxtyping import Array, PyTree

T = TypeVar("T")


class Checkpoints:
    """The checkpoints of a run folder. Use as a context manager: leaving it waits for what is being written."""

    def __init__(self, folder: Path, *, keep: int | None = None):
        import orbax.checkpoint as ocp

        self.folder = folder
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        # The handler is named, since a manager that has not saved yet could not describe what it finds.
        handler = ocp.StandardCheckpointHandler()
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handler)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._manager.close()

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: PyTree[Array]) -> None:
        """Copy the state and write it in the background. Statistics are stored by the name of their layer."""
        import orbax.checkpoint as ocp

        if step not in self._manager.all_steps():
            self._manager.save(step, args=ocp.args.StandardSave(_named(state)))

    def restore(self, step: int, like: T) -> T:
        """The state of ``step``, shaped, typed and placed as ``like``.

        Raises ValueError with the first names that differ where the checkpoint is of another model.
        """
        import orbax.checkpoint as ocp

        self._check_names(step, like)
        abstract = jax.tree.map(_abstract, _named(like))
        return _unnamed(like, self._manager.restore(step, args=ocp.args.StandardRestore(abstract)))

    def _check_names(self, step: int, like: PyTree[Array]) -> None:
        """Compare names and shapes before orbax does: its own message lists neither."""
        stored = _leaf_shapes(self._manager.item_metadata(step).tree)
        wanted = _leaf_shapes(_named(like))
        differ = [
            f"{name}: checkpoint {stored.get(name, 'has none')}, model {wanted.get(name, 'has none')}"
            for name in sorted({*stored, *wanted})
            if stored.get(name) != wanted.get(name)
        ]
        if differ:
            first = "\n  ".join(differ[:5])
            raise ValueError(
                f"checkpoint {self.folder}/{step} is of another model; {len(differ)} leaves differ:\n  {first}"
            )


def _leaf_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape) for path, leaf in leaves}


def _is_state(x: Any) -> bool:
    return isinstance(x, eqx.nn.State)


def _named(tree: PyTree) -> PyTree:
    """``eqx.nn.State`` flattens to a list without names; on disk it is a dictionary by layer."""

    def name(leaf: Any) -> Any:
        if not _is_state(leaf):
            return leaf
        values, keys = leaf.tree_flatten()
        return {str(key): value for key, value in zip(keys, values, strict=True)}

    return jax.tree.map(name, tree, is_leaf=_is_state)


def _unnamed(like: T, tree: PyTree) -> T:
    states, structure = jax.tree.flatten(like, is_leaf=_is_state)
    restored = structure.flatten_up_to(tree)

    def back(old: Any, new: Any) -> Any:
        if not _is_state(old):
            return new
        _, keys = old.tree_flatten()
        return eqx.nn.State.tree_unflatten(keys, [new[str(key)] for key in keys])

    return jax.tree.unflatten(structure, [back(old, new) for old, new in zip(states, restored, strict=True)])


def _abstract(leaf: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
