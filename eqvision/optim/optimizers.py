"""The optimizer of a run: clipping, the update rule, weight decay, learning rate and groups, from the configuration.

``make_optimizer`` looks at the parameters only when optax hands them over, in ``init`` and ``update``, and works on
names and shapes alone: abstract, replicated and sharded arrays give the same program. Nothing here is inside a
``shard_map``; norms are those of the whole (global) arrays. An option that is off adds no pass over the parameters.
"""

import math
from collections.abc import Callable, Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from eqvision.optim.adafactor import scale_by_adafactor
from eqvision.optim.by_name import optax_optimizer
from eqvision.optim.clipping import clipping
from eqvision.optim.groups import (
    ParameterSettings,
    add_weight_decays,
    block_name,
    is_matrix,
    is_stacked,
    layer_axes,
    leaf_name,
    parameter_settings,
    scale_by_factors,
)
from eqvision.recipes.config import OptimizerConfig

Settings = dict[str, ParameterSettings]
Rates = dict[str, float]  # momentum, beta2, eps


class Rule(NamedTuple):
    """An update rule before the learning rate, and its own values of the options that it takes."""

    transform: Callable[[OptimizerConfig, Rates, Settings], list[optax.GradientTransformation]]
    rates: Rates


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Clipping, ``config.name`` with its weight decay, ``schedule``, learning-rate factors; frozen parameters apart.

    Weight decay is multiplied by the learning rate (as in PyTorch): big_vision's ``wd`` is ours times the peak rate.
    A learning-rate factor therefore scales the decay of its parameters too. Frozen parameters get zero updates, have
    no state, and do not enter the norm that is clipped.

    Raises ValueError here for options out of range or that the optimizer does not take, UnknownNameError for an
    unknown optimizer; and, when it first sees the parameters, what ``parameter_settings`` raises.
    """
    check_options(config)
    core = _core(config, schedule)

    def build(tree: optax.Params) -> optax.GradientTransformation:
        settings = parameter_settings(config, tree)
        parts = [*clipping(config), *core(settings)]
        if config.learning_rate_multipliers or config.layer_decay is not None:
            parts.append(scale_by_factors(settings))
        return _without_frozen(optax.chain(*parts), config, settings)

    def init(params: optax.Params) -> optax.OptState:
        return build(params).init(params)

    def update(updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None):
        return build(updates).update(updates, state, params)

    return optax.GradientTransformation(init, update)


def _core(
    config: OptimizerConfig, schedule: optax.Schedule
) -> Callable[[Settings], list[optax.GradientTransformation]]:
    """The update rule with weight decay and learning rate, to be built for the settings of a model."""
    if config.name not in RULES:
        optax_optimizer(config, schedule, {})  # for its errors, which need no model
        return lambda settings: [optax_optimizer(config, schedule, settings)]
    transform, own = RULES[config.name]
    rates = own | _given_rates(config, own)
    return lambda settings: [*transform(config, rates, settings), optax.scale_by_learning_rate(schedule)]


def _without_frozen(
    optimizer: optax.GradientTransformation, config: OptimizerConfig, settings: Settings
) -> optax.GradientTransformation:
    # The form of the state must not depend on the leaves where patterns freeze: optax.tree.map_params gives it others.
    if not config.freeze and not any(each.frozen for each in settings.values()):
        return optimizer

    def labels(tree: optax.Params) -> optax.Params:
        return jax.tree.map_with_path(lambda path, _: "frozen" if settings[leaf_name(path)].frozen else "trained", tree)

    return optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)


def _adamw(config: OptimizerConfig, rates: Rates, settings: Settings) -> list[optax.GradientTransformation]:
    """Loshchilov & Hutter 2019."""
    return [_adam(rates["momentum"], rates), *_decay(config, settings)]


def _sgd(config: OptimizerConfig, rates: Rates, settings: Settings) -> list[optax.GradientTransformation]:
    """L2 decay in the gradient, then Nesterov momentum (Sutskever et al. 2013)."""
    momentum = [optax.trace(rates["momentum"], nesterov=True)] if rates["momentum"] else []
    return [*_decay(config, settings), *momentum]


def _lamb(config: OptimizerConfig, rates: Rates, settings: Settings) -> list[optax.GradientTransformation]:
    """You et al. 2020; the trust ratio is that of each layer of a stack."""
    return [_adam(rates["momentum"], rates), *_decay(config, settings), scale_by_layer_trust_ratio()]


def _lion(config: OptimizerConfig, rates: Rates, settings: Settings) -> list[optax.GradientTransformation]:
    """Chen et al. 2023."""
    return [optax.scale_by_lion(b1=rates["momentum"], b2=rates["beta2"]), *_decay(config, settings)]


def _adafactor(config: OptimizerConfig, rates: Rates, settings: Settings) -> list[optax.GradientTransformation]:
    """big_vision's; ``beta2`` is the cap of the second moment's decay, a ``momentum`` of 0 saves its memory."""
    factored = scale_by_adafactor(beta2_cap=rates["beta2"], momentum=rates["momentum"], eps=rates["eps"])
    return [factored, *_decay(config, settings)]


def _muon(config: OptimizerConfig, rates: Rates, settings: Settings) -> list[optax.GradientTransformation]:
    """Matrices and convolutions of blocks by Muon (Jordan et al. 2024), all else by AdamW.

    Updates are scaled to a root mean square of 0.2 (Liu et al. 2025, section 2.2), Adam's, so that both share one
    learning rate and weight decay. Each layer of a stack is orthogonalised by itself; a convolution as the matrix
    (h * w * in, out).
    """
    muon = optax.contrib.scale_by_muon(
        beta=rates["momentum"], eps=rates["eps"], weight_dimension_numbers=_dimension_numbers
    )
    groups: dict[Hashable, optax.GradientTransformation] = {
        "muon": optax.chain(muon, _scale_to_rms(0.2)),
        "adam": _adam(0.9, rates),
    }
    return [optax.partition(groups, _muon_labels), *_decay(config, settings)]


RULES = {
    "adamw": Rule(_adamw, {"momentum": 0.9, "beta2": 0.999, "eps": 1e-8}),
    "sgd": Rule(_sgd, {"momentum": 0.9}),
    "lamb": Rule(_lamb, {"momentum": 0.9, "beta2": 0.999, "eps": 1e-6}),
    "lion": Rule(_lion, {"momentum": 0.9, "beta2": 0.99}),
    "muon": Rule(_muon, {"momentum": 0.95, "beta2": 0.999, "eps": 1e-8}),
    "adafactor": Rule(_adafactor, {"momentum": 0.9, "beta2": 0.999, "eps": 1e-30}),
}


def _adam(b1: float, rates: Rates) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=b1, b2=rates["beta2"], eps=rates["eps"])


def _decay(config: OptimizerConfig, settings: Settings) -> list[optax.GradientTransformation]:
    return [add_weight_decays(settings)] if config.weight_decay or config.weight_decays else []


def _muon_labels(tree: optax.Params) -> optax.Params:
    def label(path: tuple, leaf: Array) -> str:
        name = leaf_name(path)
        return "muon" if block_name(name) and is_matrix(name, leaf.ndim) else "adam"

    return jax.tree.map_with_path(label, tree)


def _dimension_numbers(tree: optax.Params) -> optax.Params:
    """Rows are all axes of a layer but the last; optax takes the axes that are named nowhere (the stack) one by one."""

    def leaf(path: tuple, matrix: Array) -> optax.contrib.MuonDimensionNumbers:
        *rows, column = layer_axes(leaf_name(path), matrix.ndim)
        return optax.contrib.MuonDimensionNumbers(tuple(rows), (column,))

    return jax.tree.map_with_path(leaf, tree)


def _scale_to_rms(rms: float) -> optax.GradientTransformation:
    """An orthogonal (m, n) matrix has the root mean square 1 / sqrt(max(m, n))."""

    def leaf(path: tuple, update: Array) -> Array:
        shape = update.shape[int(is_stacked(leaf_name(path))) :]
        return update * (rms * math.sqrt(max(math.prod(shape[:-1]), shape[-1])))

    return optax.stateless(lambda updates, params: jax.tree.map_with_path(leaf, updates))


def scale_by_layer_trust_ratio() -> optax.GradientTransformation:
    """Multiply each layer's update by its parameters' norm over its own; by 1 where either is zero."""

    def leaf(path: tuple, update: Array, param: Array) -> Array:
        axes = layer_axes(leaf_name(path), update.ndim)
        wanted, given = (jnp.sqrt(jnp.sum(jnp.square(x), axis=axes, keepdims=True)) for x in (param, update))
        usable = (wanted > 0) & (given > 0)
        return update * jnp.where(usable, wanted / jnp.where(usable, given, 1.0), 1.0)

    return optax.stateless(lambda updates, params: jax.tree.map_with_path(leaf, updates, params))


def _given_rates(config: OptimizerConfig, own: Rates) -> Rates:
    """The options that are set. Raises ValueError for one that the rule does not have."""
    options = {"momentum": config.momentum, "beta2": config.beta2, "eps": config.eps}
    given = {name: value for name, value in options.items() if value is not None}
    lacking = [name for name in given if name not in own]
    if lacking:
        raise ValueError(f"optimizer {config.name!r} takes no {' and no '.join(lacking)}; it takes {', '.join(own)}")
    return given


def check_options(config: OptimizerConfig) -> None:
    """Raise ValueError, naming the option, for a value out of its range."""
    for name in ("momentum", "beta2", "ema"):
        _check(_option(name), getattr(config, name), "a decay in [0, 1)", lambda value: 0 <= value < 1)
    for name in ("eps", "clip_norm", "clip_value", "clip_adaptive"):
        _check(_option(name), getattr(config, name), "a positive number", lambda value: 0 < value < math.inf)
    _check("--optimizer.layer-decay", config.layer_decay, "a factor in (0, 1]", lambda value: 0 < value <= 1)
    for pattern, decay in {"": config.weight_decay, **config.weight_decays}.items():
        name = _option("weight_decays", pattern) if pattern else _option("weight_decay")
        _check(name, decay, "a decay of at least 0", lambda value: 0 <= value < math.inf)
    for pattern, factor in config.learning_rate_multipliers.items():
        wanted = "a positive factor (freeze what must not train)"
        _check(_option("learning_rate_multipliers", pattern), factor, wanted, lambda value: 0 < value < math.inf)


def _option(name: str, pattern: str = "") -> str:
    return f"--optimizer.{name.replace('_', '-')}" + (f" {pattern!r}" if pattern else "")


def _check(option: str, value: float | None, wanted: str, holds: Callable[[float], bool]) -> None:
    if value is not None and not holds(value):
        raise ValueError(f"{option} is {value}; expected {wanted}")
