"""A model of the zoo from named arrays that must be exactly its own."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eqvision.pretrained.leaf_names import named_arrays, with_leaves
from eqvision.zoo import builder


def rebuild(
    name: str,
    tensors: dict[str, np.ndarray],
    where: str,
    *,
    num_classes: int,
    image_size: tuple[int, int],
    in_channels: int,
    options: Mapping[str, Any],
) -> tuple[Any, eqx.nn.State]:
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
    _check_tensors(name, tensors, named_arrays(model, state), where)
    return with_leaves(model, state, {leaf: jnp.asarray(tensor) for leaf, tensor in tensors.items()})


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
