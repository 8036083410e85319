"""A file's tensors and a layout -> a model with these numbers, strictly both ways, or an error naming what differs."""

import fnmatch
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from eqvision.pretrained.adapt import adapt_channels, check_types
from eqvision.pretrained.errors import WeightsError, listed
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.leaf_names import named_arrays, with_leaves
from eqvision.pretrained.rules import Rule, Tensors, load_rule

log = logging.getLogger("eqvision.pretrained")

# What ``zoo.builder`` gives: keyword arguments num_classes, image_size, in_channels (each with a default; the model
# may refuse those that it has not) and key.
Build = Callable[..., Any]


class Sizes(NamedTuple):
    """What of a model may differ between the file and the wish; None: as in the file."""

    num_classes: int | None = None
    image_size: tuple[int, int] | None = None
    in_channels: int | None = None


def assemble(
    build: Build, tensors: Tensors, layout: Layout, wanted: Sizes, *, where: str, key: PRNGKeyArray
) -> tuple[Any, eqx.nn.State]:
    """The model that ``build`` gives, with the file's numbers in the sizes that are wanted.

    ``where`` is the file, for messages. Raises WeightsError with the first names where a leaf has no tensor, a
    tensor no leaf, or shapes differ. A head for another number of classes is fresh (from ``key``), positions are
    resampled as the original does, and a first convolution for other channels is adapted; each is logged.
    """
    model, state = _abstract(build, Sizes())
    tensors = tensors if layout.prepare is None else layout.prepare(model, tensors, where)
    rules = layout.rules(model)
    absent = _absent_head(rules, tensors, layout, wanted, where)
    rules = tuple(rule for rule in rules if not absent.intersection(rule.their_names))
    _check_names(rules, tensors, layout, where)
    leaves = _read(rules, tensors, layout, where)
    check_types(leaves, where)
    sizes = _sizes(model, leaves, layout, wanted, bool(absent))
    model, state = _abstract(build, sizes)
    expected = named_arrays(model, state)
    leaves = _adapted(leaves, expected, layout, model, sizes, where)
    leaves |= _fresh(build, sizes, model, state, leaves, layout, where, key)
    _check_shapes(leaves, expected, layout, where)
    return with_leaves(model, state, {name: jnp.asarray(leaf, expected[name].dtype) for name, leaf in leaves.items()})


def _abstract(build: Build, sizes: Sizes) -> tuple[Any, eqx.nn.State]:
    """Shapes of the model and its state; nothing is allocated."""
    return eqx.filter_eval_shape(lambda: eqx.nn.make_with_state(build)(**_given(sizes), key=jax.random.key(0)))


def _given(sizes: Sizes) -> dict[str, Any]:
    return {name: value for name, value in sizes._asdict().items() if value is not None}


def _absent_head(rules: tuple[Rule, ...], tensors: Tensors, layout: Layout, wanted: Sizes, where: str) -> set[str]:
    """Tensors of the last layer, where the file has none of them: weights of a backbone alone.

    DeiT's second linear layer is ``linear_distilled`` and goes with the first: all that begins as the layer's name.
    """
    last = [rule for rule in rules if any(name.startswith(layout.last_layer) for name in rule.our_names[:1])]
    names = {name for rule in last for name in rule.their_names}
    if not names or any(name in tensors for name in names):
        return set()
    if wanted.num_classes is None:
        raise WeightsError(
            f"{where} has no classification layer (it would be {', '.join(sorted(names))}); "
            "give num_classes=... to begin with a fresh one"
        )
    return names


def _check_names(rules: tuple[Rule, ...], tensors: Tensors, layout: Layout, where: str) -> None:
    read = {name for rule in rules for name in rule.their_names}
    missing = [name for rule in rules for name in rule.their_names if name not in tensors]
    unused = [name for name in tensors if name not in read and not layout.ignores(name)]
    if missing or unused:
        parts = [
            f"{len(names)} tensors {what}:{listed(names)}"
            for names, what in ((missing, "are missing"), (unused, "belong to no part of this model"))
            if names
        ]
        raise WeightsError(
            f"{where} does not hold this model (read as layout {layout.name}, {layout.source}).\n" + "\n".join(parts)
        )


def _read(rules: tuple[Rule, ...], tensors: Tensors, layout: Layout, where: str) -> dict[str, np.ndarray]:
    leaves, wrong = {}, []
    for rule in rules:
        try:
            leaves |= load_rule(rule, tensors)
        except ValueError as error:  # ShapeError, and what numpy says of a split or stack that does not come out even
            shapes = ", ".join(f"{name} {tensors[name].shape}" for name in rule.their_names[:2])
            wrong.append(f"{', '.join(rule.our_names)} from {shapes}: {error}")
    if wrong:
        raise WeightsError(f"{where}: {len(wrong)} tensors of layout {layout.name} have no legal shape:{listed(wrong)}")
    return leaves


def _sizes(model: Any, leaves: Mapping[str, np.ndarray], layout: Layout, wanted: Sizes, headless: bool) -> Sizes:
    """The wish, and where nothing is wished, the file."""
    known = not headless and layout.classes != ""
    classes = wanted.num_classes or (layout.class_count(leaves) if known else None)
    image_size = wanted.image_size
    if image_size is None and layout.positions in leaves:
        rows, columns = leaves[layout.positions].shape[:2]
        patch = _patch_size(model, layout)
        image_size = (rows * patch, columns * patch)
    if image_size is None and layout.image_size is not None:
        image_size = layout.image_size(leaves, _patch_size(model, layout))
    kernel = leaves.get(layout.first_conv)
    channels = wanted.in_channels or (None if kernel is None else kernel.shape[2])
    return Sizes(classes, image_size, channels)


def _patch_size(model: Any, layout: Layout) -> int:
    return getattr(model, layout.image_tower).strides[-1]


def _adapted(
    leaves: dict[str, np.ndarray],
    expected: Mapping[str, Any],
    layout: Layout,
    model: Any,
    sizes: Sizes,
    where: str,
) -> dict[str, np.ndarray]:
    """Another number of channels, another grid, and no head where the number of classes is another."""
    leaves = dict(leaves)
    if layout.classes in leaves and layout.class_count(leaves) != sizes.num_classes:
        log.info("%s: the layer for %d classes is dropped", where, layout.class_count(leaves))
        leaves = {name: leaf for name, leaf in leaves.items() if not _is_dropped(name, leaf, expected, layout)}
    kernel = leaves.get(layout.first_conv)  # None: a model that has none
    if kernel is not None and sizes.in_channels is not None and kernel.shape[2] != sizes.in_channels:
        leaves[layout.first_conv] = adapt_channels(kernel, sizes.in_channels, where)
        log.info("%s: %s adapted from %d to %d channels", where, layout.first_conv, kernel.shape[2], sizes.in_channels)
    if layout.resample is not None and layout.positions in leaves and layout.positions in expected:
        old, grid = leaves[layout.positions], expected[layout.positions].shape[:2]
        if old.shape[:2] != grid:
            leaves[layout.positions] = layout.resample(np.asarray(old, np.float32), grid)
            log.info("%s: position embedding resampled from %s to %s", where, old.shape[:2], grid)
    return leaves | _other_windows(leaves, expected, layout, where)


def _is_dropped(name: str, leaf: np.ndarray, expected: Mapping[str, Any], layout: Layout) -> bool:
    """Whether a leaf is of a layer for classes, of which the model has another number."""
    if name.startswith(layout.last_layer):
        return True
    depends = any(fnmatch.fnmatchcase(name, pattern) for pattern in layout.class_layers)
    return depends and name in expected and leaf.shape != expected[name].shape


def _other_windows(
    leaves: Mapping[str, np.ndarray], expected: Mapping[str, Any], layout: Layout, where: str
) -> dict[str, np.ndarray]:
    """Tables of relative positions for the model's windows, where the file's are others."""
    names = [name for name in fnmatch.filter(leaves, layout.tables) if name in expected]
    other = [name for name in names if leaves[name].shape[1:3] != expected[name].shape[1:3]]
    if layout.resample_tables is None or not other:
        return {}
    resample, grids = layout.resample_tables, {name: expected[name].shape[1:3] for name in other}
    changes = [f"{name}: {leaves[name].shape[1:3]} to {grids[name]}" for name in other]
    log.info("%s: %d tables of relative positions resampled:%s", where, len(other), listed(changes))
    tables = {name: np.asarray(leaves[name], np.float32) for name in other}
    return {name: np.stack([resample(table, grids[name]) for table in stack]) for name, stack in tables.items()}


def _fresh(
    build: Build,
    sizes: Sizes,
    model: Any,  # it has a head unless the layout has class_layers
    state: eqx.nn.State,
    leaves: Mapping[str, np.ndarray],
    layout: Layout,
    where: str,
    key: PRNGKeyArray,
) -> dict[str, Any]:
    """Initial values of the last layer where the file's does not fit, and of what the layout does not have at all."""
    expected = named_arrays(model, state)
    starts = (*layout.last_layer, *layout.fresh)
    names = [n for n in expected if n not in leaves and _may_be_fresh(n, starts, layout.class_layers)]
    if not names:
        return {}
    log.info("%s: fresh values for %s", where, ", ".join(names))
    if layout.class_layers:
        values = named_arrays(*eqx.nn.make_with_state(build)(**_given(sizes), key=key))
    else:
        head = model.head.reset(layout.class_count(expected), key=key)
        values = named_arrays(eqx.tree_at(lambda m: m.head, model, head), state)
    return {name: values[name] for name in names}


def _may_be_fresh(name: str, starts: tuple[str, ...], patterns: tuple[str, ...]) -> bool:
    return name.startswith(starts) or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _check_shapes(leaves: Mapping[str, Any], expected: Mapping[str, Any], layout: Layout, where: str) -> None:
    wrong = [
        f"{name}: {_shape(leaves, name)} in the file, {_shape(expected, name)} in the model"
        for name in {**expected, **leaves}
        if _shape(leaves, name) != _shape(expected, name)
    ]
    if wrong:
        raise WeightsError(
            f"{where} does not hold this model (layout {layout.name}): {len(wrong)} leaves differ:{listed(wrong)}"
        )


def _shape(leaves: Mapping[str, Any], name: str) -> str:
    return str(tuple(leaves[name].shape)) if name in leaves else "none"
