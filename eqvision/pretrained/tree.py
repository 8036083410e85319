"""Nested dictionaries of tensors, as programs save them -> tensors by flat names."""

import fnmatch
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from eqvision.pretrained.errors import WeightsError, listed

log = logging.getLogger("eqvision.pretrained")

# Under which names programs save the model in a dictionary with other things. Where a file has several, the first of
# this order is read, and the log says so.
WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "model_ema",
    "state_dict_ema",
    "ema_state_dict",
    "ema",
    "params",
    "teacher",
    "student",
    "module",
    "net",
    "network",
    "weights",
)
# What else lies there and may hold tensors, but never the model.
COMPANIONS = ("*optim*", "opt_state", "*sched*", "*scaler*", "*criterion*", "*loss*", "amp", "args", "*config*",
              "*rng*", "hyper*", "callbacks", "loops")  # fmt: skip
# What data parallel training and torch.compile put before every name.
PREFIXES = ("module.", "_orig_mod.")
# Where Flax programs keep parameters: linen and Scenic; Scenic before optax; big_vision before optax.
FLAX_PARAMETERS = ("params/", "optimizer/target/", "opt/target/")
# Running statistics: Scenic, linen, Scenic before linen.
FLAX_STATISTICS = ("model_state/batch_stats/", "batch_stats/", "model_state/")
DEEPEST = 64  # levels of dictionaries; more are a circle


class Leaf(NamedTuple):
    """A tensor that is still in the file; ``scalar`` if it has no axes."""

    read: Callable[[], np.ndarray]
    scalar: bool = False


class Pending:
    """An array of a pickle, which makes an empty one first and fills it later. None: nothing that is a tensor."""

    __slots__ = ("array",)

    def __init__(self) -> None:
        self.array: np.ndarray | None = None


def flatten(tree: Any, separator: str) -> dict[str, Leaf | np.ndarray]:
    """All tensors of nested dictionaries, lists and tuples by their path. Anything else in them is left out.

    Raises WeightsError where the dictionaries hold one another in a circle.
    """
    found: dict[str, Leaf | np.ndarray] = {}
    _collect(tree, "", separator, found, 0)
    return found


def _collect(tree: Any, prefix: str, separator: str, found: dict[str, Leaf | np.ndarray], depth: int) -> None:
    if depth > DEEPEST:
        raise WeightsError(f"dictionaries nested more than {DEEPEST} deep, at {prefix[:80]}...")
    for name, value in _children(tree):
        if isinstance(value, Leaf | np.ndarray):
            found[f"{prefix}{name}"] = value
        else:
            _collect(value, f"{prefix}{name}{separator}", separator, found, depth + 1)


def _children(tree: Any) -> list[tuple[Any, Any]]:
    if isinstance(tree, dict):
        pairs = list(dict.items(tree))  # not tree.items(): a pickle may give an OrderedDict an attribute of that name
    else:
        pairs = list(enumerate(tree)) if isinstance(tree, list | tuple) else []
    return [(name, value.array if isinstance(value, Pending) else value) for name, value in pairs]


def torch_tensors(tree: Any) -> dict[str, Leaf | np.ndarray]:
    """The model in what a PyTorch program saved, by its dotted names, without ``module.`` before all of them.

    A model in a dictionary with other things is found under one of WRAPPERS, or as the only entry that is a
    dictionary of tensors. Where anything else there holds tensors (except COMPANIONS), nothing is taken out: the
    names then say it all. Raises WeightsError where there is no tensor.
    """
    found = flatten(_unwrapped(tree), ".")
    if not found:
        raise WeightsError(f"holds no tensors, but {_summary(tree)}")
    return without_prefix(found)


def _unwrapped(tree: Any) -> Any:
    for _ in range(DEEPEST):
        entry = _wrapper(tree)
        if entry is None:
            return tree
        tree = tree[entry]
    return tree


def _wrapper(tree: Any) -> str | None:
    """The entry of ``tree`` that is the model, or None if ``tree`` is the model itself."""
    entries = {name: value for name, value in _children(tree) if isinstance(name, str) and not _is_companion(name)}
    if any(_is_parameter(value) for value in entries.values()):
        return None
    inner = {name: value for name, value in entries.items() if isinstance(value, dict) and flatten(value, ".")}
    named = [name for name in WRAPPERS if name in inner]
    if len(named) == len(inner) > 0:
        if len(named) > 1:
            log.warning("the file holds %s; %s is read", ", ".join(named), named[0])
        return named[0]
    if len(inner) != 1:
        return None
    ((sole, value),) = inner.items()
    return sole if any(_is_parameter(each) for _, each in _children(value)) else None


def _is_companion(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in COMPANIONS)


def _is_parameter(value: Any) -> bool:
    """A tensor with axes: one without is also how programs save their best accuracy beside the model."""
    return not value.scalar if isinstance(value, Leaf) else isinstance(value, np.ndarray) and value.ndim > 0


def without_prefix(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The same tensors without what PREFIXES put before every single name."""
    for prefix in PREFIXES * 2:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return dict(tensors)


def flax_tensors(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters in what a Flax program saved, by names joined with ``/`` and without ``params/`` before them.

    ``flat`` has the whole file's names joined with ``/``. Running statistics go by ``batch_stats/...``; the
    optimizer's state and the step are left out. Raises WeightsError where there is no tensor.
    """
    found = next((inside for prefix in FLAX_PARAMETERS if (inside := _inside(flat, prefix))), None)
    if found is None:
        return _some(flat)
    while all(name.startswith("params/") for name in found):
        found = _inside(found, "params/")
    statistics = next((inside for prefix in FLAX_STATISTICS if (inside := _inside(flat, prefix))), {})
    return found | {f"batch_stats/{name}": value for name, value in statistics.items()}


def _inside(flat: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in flat.items() if name.startswith(prefix)}


def _some(flat: Mapping[str, Any]) -> dict[str, Any]:
    if not flat:
        raise WeightsError("holds no tensors")
    return dict(flat)


def _summary(tree: Any) -> str:
    if isinstance(tree, dict):
        return "a dictionary with the entries:" + listed(str(name)[:80] for name in dict.keys(tree))
    return f"an object of type {type(tree).__name__}"
