"""How each parameter is trained, as a table to print before the run."""

import re
from typing import NamedTuple

import jax
from jaxtyping import PyTree

from eqvision.optim.groups import Leaf, ParameterSettings, leaf_name, parameter_settings
from eqvision.recipes.config import OptimizerConfig

_HEADER = ("parameter", "shape", "count", "lr factor", "decay", "trains")


class _Group(NamedTuple):
    """Leaves whose names differ in numbers alone and whose settings differ in layer factors alone."""

    pattern: str
    settings: ParameterSettings


def parameter_table(config: OptimizerConfig, params: PyTree) -> str:
    """Names, shapes, counts, learning-rate factors, weight decays and what is frozen, with the totals.

    One row stands for all leaves whose names differ in the numbers of stages and blocks (``*``) and that are trained
    alike; a stack is one leaf. A range of factors is that of its layers. ``params`` may be abstract
    (``jax.eval_shape``). Raises what ``parameter_settings`` raises.
    """
    settings = parameter_settings(config, params)
    groups: dict[_Group, list[tuple[str, Leaf]]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = leaf_name(path)
        groups.setdefault(_group(name, settings[name]), []).append((name, leaf))
    rows = [_HEADER, *(_row(group, members, settings) for group, members in groups.items())]
    return "\n".join([*_aligned(rows), _totals(params, settings)])


def _group(name: str, settings: ParameterSettings) -> _Group:
    return _Group(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name), settings._replace(layer_factors=()))


def _row(group: _Group, members: list[tuple[str, Leaf]], settings: dict[str, ParameterSettings]) -> tuple[str, ...]:
    name = group.pattern if len(members) > 1 else members[0][0]
    shapes = {"x".join(map(str, leaf.shape)) or "scalar" for _, leaf in members}
    shape = next(iter(shapes)) if len(shapes) == 1 else f"{len(shapes)} shapes"
    if len(members) > 1:
        shape = f"{len(members)} x {shape}" if len(shapes) == 1 else f"{len(members)} leaves of {shape}"
    count = sum(leaf.size for _, leaf in members)
    frozen = group.settings.frozen
    factor = "-" if frozen else _range([f for name, _ in members for f in settings[name].learning_rate_factor])
    return name, shape, f"{count:,}", factor, "-" if frozen else f"{group.settings.weight_decay:g}", _yes(not frozen)


def _yes(value: bool) -> str:
    return "yes" if value else "frozen"


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low}..{high}"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Names and shapes to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligns = "<<>>><"
    return [
        "  ".join(f"{cell:{align}{width}}" for cell, align, width in zip(row, aligns, widths, strict=True)).rstrip()
        for row in rows
    ]


def _totals(params: PyTree, settings: dict[str, ParameterSettings]) -> str:
    totals = {False: 0, True: 0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        totals[settings[leaf_name(path)].frozen] += leaf.size
    return f"{totals[False]:,} parameters train, {totals[True]:,} are frozen"
