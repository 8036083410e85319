"""eqvision's own files: every leaf under its own name, as ``eqvision export`` and ``eqvision convert`` write them.

The header of such a file names the model, its sizes and what it computes otherwise than the zoo's row; see
``eqvision.export``. ``load`` reads the header and checks it.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eqvision.layers import resample_grid
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.rules import Rule


def rules(model: eqx.Module) -> tuple[Rule, ...]:
    found = jax.tree_util.tree_leaves_with_path(model, is_leaf=lambda x: isinstance(x, eqx.nn.StateIndex))
    names = []
    for path, leaf in found:
        if isinstance(leaf, eqx.nn.StateIndex):
            layer = jax.tree_util.keystr(path[:-1], simple=True, separator=".")
            names += [f"stats.{layer}.mean", f"stats.{layer}.variance"]
        else:
            names.append(jax.tree_util.keystr(path, simple=True, separator="."))
    return tuple(Rule(name, name) for name in names)


def resample(positions: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """As a model here does it when it is called on another size, and ``--init`` when it begins a run."""
    return np.asarray(resample_grid(jnp.asarray(positions), grid))


def like(layout: Layout, family: Layout) -> Layout:
    """``layout`` for models of the family: which leaves hold positions, first convolution and classes."""
    return dataclasses.replace(
        layout,
        first_conv=family.first_conv,
        positions=family.positions,
        image_size=family.image_size,
        classes=family.classes,
        class_layers=family.class_layers,
        tables=family.tables,
        resample_tables=family.resample_tables,
        no_object=family.no_object,
    )


LAYOUT = Layout(
    name="eqvision",
    source="eqvision's own names",
    fits=lambda model: True,
    kind=object,
    rules=rules,
    marks=("backbone.*", "head.*|box_heads.*"),
    resample=resample,
)
