"""A model as named arrays, and back: the names are those of the checkpoint files."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eqvision.checkpoint import named_leaves
from eqvision.classifiers import Classifier
from eqvision.zoo import builder


def named_tensors(model: Classifier, state: eqx.nn.State) -> dict[str, np.ndarray]:
    """Parameters by dotted path, running statistics as ``stats.LAYER.mean`` and ``stats.LAYER.variance``."""
    leaves = {**named_leaves(model), **dict(zip(_statistics(model, state), jax.tree.leaves(state), strict=True))}
    return {name: np.ascontiguousarray(leaf) for name, leaf in leaves.items()}


def _statistics(model: Classifier, state: eqx.nn.State) -> list[str]:
    """Names of the leaves of ``state``, in its order; a layer other than batch norm has numbers for names."""
    found = jax.tree_util.tree_leaves_with_path(model, is_leaf=lambda x: isinstance(x, eqx.nn.StateIndex))
    layers = {
        leaf.marker: jax.tree_util.keystr(path[:-1], simple=True, separator=".")
        for path, leaf in found
        if isinstance(leaf, eqx.nn.StateIndex)
    }
    names = []
    for values, marker in zip(*state.tree_flatten(), strict=True):
        count = len(jax.tree.leaves(values))
        labels = ("mean", "variance") if count == 2 else tuple(map(str, range(count)))
        names += [f"stats.{layers[marker]}.{label}" for label in labels]
    return names


def rebuild(
    name: str,
    tensors: dict[str, np.ndarray],
    where: str,
    *,
    num_classes: int,
    image_size: tuple[int, int],
    in_channels: int,
    options: Mapping[str, Any],
) -> tuple[Classifier, eqx.nn.State]:
    """The zoo's model ``name`` with these tensors; ValueError with the first differences unless they are its."""
    try:
        build = eqx.nn.make_with_state(builder(name, options))
        model, state = eqx.filter_eval_shape(
            lambda: build(
                num_classes=num_classes, image_size=image_size, in_channels=in_channels, key=jax.random.key(0)
            )
        )
    except ValueError as error:
        raise ValueError(f"{where} names a model that cannot be built: {error}") from error
    wanted = {**named_leaves(model), **dict(zip(_statistics(model, state), jax.tree.leaves(state), strict=True))}
    _check_tensors(name, tensors, wanted, where)
    leaves = [jnp.asarray(tensors[leaf]) for leaf in wanted]
    return jax.tree.unflatten(jax.tree.structure((model, state)), leaves)


def _check_tensors(name: str, tensors: dict[str, Any], wanted: dict[str, Any], where: str) -> None:
    have, want = ({n: f"{x.dtype}{list(x.shape)}" for n, x in tree.items()} for tree in (tensors, wanted))
    differ = [
        f"{n}: {where} {have.get(n, 'has none')}, {name} {want.get(n, 'has none')}"
        for n in sorted({*have, *want})
        if have.get(n) != want.get(n)
    ]
    if differ:
        more = f"\n  and {len(differ) - 8} more" if len(differ) > 8 else ""
        first = "\n  ".join(differ[:8])
        raise ValueError(f"{where} does not hold the model {name}; {len(differ)} tensors differ:\n  {first}{more}")
