"""Leaves of a model and of its state by dotted name, and a model's shapes without its numbers."""

from collections.abc import Mapping
from typing import Any, TypeVar

import equinox as eqx
import jax
import numpy as np

M = TypeVar("M", bound=eqx.Module)


def leaf_names(model: eqx.Module, state: eqx.nn.State) -> list[str]:
    """Dotted names of all leaves of ``(model, state)``, in the order of ``jax.tree.leaves``.

    Parameters by their path, running statistics as ``stats.LAYER.mean`` and ``stats.LAYER.variance``.
    """
    paths = jax.tree_util.tree_leaves_with_path(model)
    return [_dotted(path) for path, _ in paths] + statistics_names(model, state)


def statistics_names(model: eqx.Module, state: eqx.nn.State) -> list[str]:
    """Names of the leaves of ``state``, in its order; a layer other than batch norm has numbers for names."""
    found = jax.tree_util.tree_leaves_with_path(model, is_leaf=lambda x: isinstance(x, eqx.nn.StateIndex))
    layers = {leaf.marker: _dotted(path[:-1]) for path, leaf in found if isinstance(leaf, eqx.nn.StateIndex)}
    names = []
    for values, marker in zip(*state.tree_flatten(), strict=True):
        count = len(jax.tree.leaves(values))
        labels = ("mean", "variance") if count == 2 else tuple(map(str, range(count)))
        names += [f"stats.{layers[marker]}.{label}" for label in labels]
    return names


def named_arrays(model: eqx.Module, state: eqx.nn.State) -> dict[str, Any]:
    """Leaves by name."""
    return dict(zip(leaf_names(model, state), jax.tree.leaves((model, state)), strict=True))


def named_tensors(model: eqx.Module, state: eqx.nn.State) -> dict[str, np.ndarray]:
    """Leaves by name, as numpy arrays."""
    return {name: np.asarray(leaf, order="C") for name, leaf in named_arrays(model, state).items()}


def with_leaves(model: M, state: eqx.nn.State, leaves: Mapping[str, Any]) -> tuple[M, eqx.nn.State]:
    """The same structure with other leaves; KeyError where a name is missing."""
    structure = jax.tree.structure((model, state))
    return jax.tree.unflatten(structure, [leaves[name] for name in leaf_names(model, state)])


def _dotted(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
