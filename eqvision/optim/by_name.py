"""Any optimizer of optax, by its name there, with the options that it takes."""

import functools
import inspect
from collections.abc import Callable, Hashable
from types import FunctionType

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from eqvision.names import nearest
from eqvision.optim.groups import ParameterSettings, is_stacked, leaf_name
from eqvision.recipes.config import OptimizerConfig

# Our option -> the names that optax gives it; the first that an optimizer takes counts.
KEYWORDS = {
    "momentum": ("b1", "momentum", "beta"),
    "beta2": ("b2", "decay", "rho"),
    "eps": ("eps",),
    "weight_decay": ("weight_decay",),
}

# What optimizers.py writes out itself, for the error about unknown names.
OWN = ("adamw", "sgd", "lamb", "lion", "muon", "adafactor")

# Optimizers that need more than gradients and parameters.
UNSUPPORTED = {
    "lbfgs": "searches along a line with the loss function",
    "noisy_sgd": "needs a random key of its own",
    "optimistic_adam": "takes no schedule; use optimistic_adam_v2",
    "polyak_sgd": "needs the loss in each update",
    "rprop": "finds its own step sizes and takes no schedule",
    "sm3": "takes no schedule",
    "contrib.dpsgd": "needs the gradient of each example",
    "contrib.galore": "needs a rank for each matrix",
    "contrib.momo": "needs the loss in each update",
    "contrib.momo_adam": "needs the loss in each update",
    "contrib.muon": "is `muon` here, which knows the stacked blocks",
    "contrib.schedule_free": "evaluates other parameters than it trains",
    "contrib.schedule_free_adamw": "evaluates other parameters than it trains",
    "contrib.schedule_free_sgd": "evaluates other parameters than it trains",
    "contrib.sophia": "needs the diagonal of the Hessian",
}

# Optimizers whose step depends on norms of whole leaves: they must see each layer of a stack by itself.
BY_LEAF = ("fromage", "lars", "novograd")


def optimizer_names() -> list[str]:
    """The names in optax that work here; those of ``optax.contrib`` begin with ``contrib.``."""
    found = [name for name in dir(optax) if _makes_optimizer(getattr(optax, name), name)]
    contrib = [f"contrib.{name}" for name in dir(optax.contrib) if _makes_optimizer(getattr(optax.contrib, name), name)]
    return [name for name in found + contrib if name not in UNSUPPORTED]


def _makes_optimizer(thing: object, name: str) -> bool:
    if not isinstance(thing, FunctionType | functools.partial) or name.startswith(("_", "scale_by_")):
        return False
    parameters = list(inspect.signature(thing).parameters)
    return bool(parameters) and parameters[0] == "learning_rate"


def optax_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule, settings: dict[str, ParameterSettings]
) -> optax.GradientTransformation:
    """``optax.NAME`` with momentum, beta2, eps and weight decay where they are set; None keeps optax's defaults.

    Parameters of different weight decay get an optimizer each, so optimizers that estimate one step size for all
    (``contrib.prodigy``, ``contrib.dog`` and their kin) estimate one for each decay.

    Raises UnknownNameError for a name that optax does not have, ValueError for an option that the optimizer does not
    take and for one that needs more than gradients and parameters.
    """
    make = _find(config.name)
    arguments = _arguments(config, make)
    wrap = _by_layer if config.name in BY_LEAF else lambda optimizer: optimizer
    if "weight_decay" not in inspect.signature(make).parameters:
        return wrap(make(schedule, **arguments))
    decays = sorted({each.weight_decay for each in settings.values() if not each.frozen}) or [config.weight_decay]
    groups: dict[Hashable, optax.GradientTransformation] = {
        decay: wrap(make(schedule, **arguments, weight_decay=decay)) for decay in decays
    }
    if len(groups) == 1:
        return groups[decays[0]]

    def labels(tree: optax.Params) -> optax.Params:
        return jax.tree.map_with_path(lambda path, _: settings[leaf_name(path)].weight_decay, tree)

    return optax.partition(groups, labels)


def _find(name: str) -> Callable[..., optax.GradientTransformation]:
    if name in UNSUPPORTED:
        raise ValueError(f"optimizer {name!r} of optax does not work here: it {UNSUPPORTED[name]}")
    names = optimizer_names()
    if name not in names:
        raise nearest(name, [*OWN, *names], "--optimizer.name")
    return getattr(optax.contrib if name.startswith("contrib.") else optax, name.removeprefix("contrib."))


def _arguments(config: OptimizerConfig, make: Callable) -> dict[str, float]:
    """The keyword arguments of the options that are set, but for weight decay, which groups may set."""
    takes = inspect.signature(make).parameters
    options = {"momentum": config.momentum, "beta2": config.beta2, "eps": config.eps}
    decays = [config.weight_decay, *config.weight_decays.values()]
    options["weight_decay"] = next((value for value in decays if value), None)
    chosen, lacking = {}, []
    for option, value in options.items():
        keyword = next((keyword for keyword in KEYWORDS[option] if keyword in takes), None)
        if value is not None and keyword is None:
            lacking.append(f"{option} ({value} given)")
        elif value is not None and option != "weight_decay":
            chosen[keyword] = value
    if lacking:
        raise ValueError(
            f"optax.{config.name} takes no {' and no '.join(lacking)}; it takes {', '.join(list(takes)[1:])}. "
            "Leave these options out; the one for weight decay is --optimizer.weight-decay 0"
        )
    return chosen


def _by_layer(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """``inner`` on trees whose stacks are taken apart into layers."""

    def update(updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None):
        moved, state = inner.update(_unstack(updates), state, None if params is None else _unstack(params))
        return jax.tree.map(_restack, updates, moved), state

    return optax.GradientTransformation(lambda params: inner.init(_unstack(params)), update)


def _unstack(tree: optax.Params) -> optax.Params:
    """Stacked leaves become tuples of their layers."""
    return jax.tree.map_with_path(lambda path, leaf: tuple(leaf) if is_stacked(leaf_name(path)) else leaf, tree)


def _restack(_: Array, layers: Array | tuple[Array, ...]) -> Array:
    return jnp.stack(layers) if isinstance(layers, tuple) else layers
