"""All that changes in a run, and how it begins."""

from typing import cast

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from eqvision.classifiers import Classifier
from eqvision.recipes import TrainConfig
from eqvision.setup import build_model
from eqvision.sharding import state_shardings


class TrainState(eqx.Module):
    """Parameters, statistics, the optimizer's state, the average of the parameters if there is one, the step."""

    model: Classifier
    stats: eqx.nn.State
    opt_state: optax.OptState
    ema: Classifier | None
    step: Int[Array, ""]

    @property
    def evaluated(self) -> Classifier:
        """The parameters that are evaluated: the average, where the run keeps one."""
        return self.model if self.ema is None else self.ema


def initial_state(
    config: TrainConfig, num_classes: int, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """The state of step 0, laid out over the mesh by the rules of ``sharding.py``."""
    return first_state(*build_model(config, num_classes), config, optimizer, mesh)


def first_state(
    model: Classifier,
    stats: eqx.nn.State,
    config: TrainConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> TrainState:
    """The state of step 0 of a run that begins with ``model``; no leaf shares its memory with another."""

    def build(model: Classifier, stats: eqx.nn.State) -> TrainState:
        return _state(model, stats, config, optimizer)

    layout = state_shardings(eqx.filter_eval_shape(build, model, stats), model, mesh)
    return jax.jit(build, out_shardings=layout)(model, stats)


def abstract_state(
    config: TrainConfig, num_classes: int, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Shapes, types and layout of the state: all that is needed to restore one. Nothing is allocated."""
    shapes = eqx.filter_eval_shape(lambda: _state(*build_model(config, num_classes), config, optimizer))
    layout = state_shardings(shapes, shapes.model, mesh)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, layout
    )


def _state(
    model: Classifier, stats: eqx.nn.State, config: TrainConfig, optimizer: optax.GradientTransformation
) -> TrainState:
    average = None if config.optimizer.ema is None else jax.tree.map(jnp.copy, model)
    return TrainState(model, stats, optimizer.init(cast(optax.Params, model)), average, jnp.zeros((), jnp.int32))
