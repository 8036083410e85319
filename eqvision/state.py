"""All that changes in a run, and how it begins."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from eqvision.recipes import RunConfig
from eqvision.sharding import state_shardings


class TrainState(eqx.Module):
    """Parameters, statistics, the optimizer's state, the average of the parameters if there is one, the step."""

    model: Any
    stats: eqx.nn.State
    opt_state: optax.OptState
    ema: Any | None
    step: Int[Array, ""]

    @property
    def evaluated(self) -> Any:
        """The parameters that are evaluated: the average, where the run keeps one."""
        return self.model if self.ema is None else self.ema


class Teacher(NamedTuple):
    """A trained model to learn from; it does not change."""

    model: Any
    stats: eqx.nn.State


def first_state(
    model: Any,
    stats: eqx.nn.State,
    config: RunConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> TrainState:
    """The state of step 0 of a run that begins with ``model``; no leaf shares its memory with another."""

    def build(model: Any, stats: eqx.nn.State) -> TrainState:
        return _state(model, stats, config, optimizer)

    layout = state_shardings(eqx.filter_eval_shape(build, model, stats), model, mesh)
    return jax.jit(build, out_shardings=layout)(model, stats)


def abstract_state(
    build: Callable[[], tuple[Any, eqx.nn.State]],
    config: RunConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> TrainState:
    """Shapes, types and layout of the state of what ``build`` gives: all that is needed to restore one.

    Nothing is allocated.
    """
    shapes = eqx.filter_eval_shape(lambda: _state(*build(), config, optimizer))
    layout = state_shardings(shapes, shapes.model, mesh)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, layout
    )


def _state(model: Any, stats: eqx.nn.State, config: RunConfig, optimizer: optax.GradientTransformation) -> TrainState:
    average = None if config.optimizer.ema is None else jax.tree.map(jnp.copy, model)
    return TrainState(model, stats, optimizer.init(cast(optax.Params, model)), average, jnp.zeros((), jnp.int32))
