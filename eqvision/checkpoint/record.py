"""What a checkpoint says beside its arrays: digests, history, configuration, versions; with a digest of itself."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, TypeVar

import equinox as eqx
import jax
from jaxtyping import PyTree

T = TypeVar("T")

DIGEST_VERSION = 1  # of the function in digest.py: other digests of an intact leaf would look like damage


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, found or used; what exists was left as it is."""


class DamagedError(CheckpointError):
    """The files of a checkpoint are not what was written; names the leaf or the file."""


@dataclass(frozen=True)
class Record:
    """Everything of a run at one step that is not an array."""

    step: int
    digests: dict[str, str] = field(default_factory=dict)
    """Digest of each leaf by name; filled in when the checkpoint is written."""
    digest_version: int = DIGEST_VERSION
    score: float | None = None
    """The metric that decides which checkpoints are best, where this step was evaluated."""
    history: dict[str, float] = field(default_factory=dict)
    """That metric at all steps evaluated so far (JSON has no integer keys)."""
    window: list[list[float]] = field(default_factory=list)
    """Loss and gradient norm of the steps since the last row of metrics.csv: a resumed run finishes that row."""
    unevaluated: bool = False
    """The run was stopped before the evaluation that follows this step was done."""
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def pack(record: Record) -> dict[str, str]:
    """As it is stored: the text and its SHA-256."""
    text = json.dumps(dataclasses.asdict(record))
    return {"record": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def unpack(stored: Any) -> Record:
    """Raises DamagedError where the text does not have its digest, CheckpointError where another eqvision wrote it."""
    text = stored.get("record") if isinstance(stored, dict) else None
    if not isinstance(text, str) or hashlib.sha256(text.encode()).hexdigest() != stored.get("sha256"):
        raise DamagedError("record/metadata does not have the digest that was written with it")
    values = json.loads(text)
    unknown = sorted(set(values) - {f.name for f in dataclasses.fields(Record)})
    version = values.get("digest_version", 0)
    if unknown or version != DIGEST_VERSION:
        writer = values.get("versions", {}).get("eqvision", "of another version")
        raise CheckpointError(
            f"this checkpoint was written by eqvision {writer}, with digests of version {version} (here: "
            f"{DIGEST_VERSION}) and further fields: {', '.join(unknown) or 'none'}; "
            "read it with the eqvision that wrote it"
        )
    return Record(**values)


def named(tree: PyTree) -> PyTree:
    """``eqx.nn.State`` flattens to a list without names; on disk it is a dictionary by layer."""

    def name(leaf: Any) -> Any:
        if not _is_state(leaf):
            return leaf
        values, keys = leaf.tree_flatten()
        return {str(key): value for key, value in zip(keys, values, strict=True)}

    return jax.tree.map(name, tree, is_leaf=_is_state)


def unnamed(like: T, tree: PyTree) -> T:
    """The inverse of ``named``, in the structure of ``like``."""
    old, structure = jax.tree.flatten(like, is_leaf=_is_state)
    new = structure.flatten_up_to(tree)
    return jax.tree.unflatten(structure, [_state_like(*pair) for pair in zip(old, new, strict=True)])


def _state_like(old: Any, new: Any) -> Any:
    if not _is_state(old):
        return new
    _, keys = old.tree_flatten()
    return eqx.nn.State.tree_unflatten(keys, [new[str(key)] for key in keys])


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Leaves by dotted name."""
    leaves = jax.tree_util.tree_leaves_with_path(named(tree))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _is_state(x: Any) -> bool:
    return isinstance(x, eqx.nn.State)
