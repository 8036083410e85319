"""One training step: augmentation on the device, gradient, update, average; compiled ahead of time.

The gradient is taken in ``jax.shard_map``: each device sees its rows, gathers the parameters that it holds parts of,
and sums its share of the loss, whose divisors are counted over the global batch first. The update then runs on whole
(global) arrays under the same ``jit``, so that every optimizer and every norm is right for any layout.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from eqvision.keys import StepKeys, step_key
from eqvision.ops.collectives import DATA_AXES, global_sum
from eqvision.optim import ema_decay, frozen_mask, update_ema
from eqvision.problems.problem import Problem
from eqvision.recipes import RunConfig
from eqvision.sharding import gather, parameter_specs, without_model
from eqvision.state import Teacher, TrainState


class StepLog(NamedTuple):
    """What a step reports; it stays on the device until the log step. ``terms`` are parts of the loss by name."""

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    terms: dict[str, Float[Array, ""]]


class Sums(NamedTuple):
    """What the parts of a batch add up to on one device; ``stats`` are those after the last part."""

    loss: Float[Array, ""]
    terms: dict[str, Float[Array, ""]]
    grads: Any
    stats: eqx.nn.State


Batch = Any  # a NamedTuple of arrays with a leading batch axis; which one is the problem's affair
Step = Callable[[Batch, TrainState], tuple[TrainState, StepLog]]


def make_step(
    problem: Problem,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    config: RunConfig,
    teacher: Teacher | None = None,
) -> "CompiledStep":
    """One update on a global batch; the state's memory is reused. Raises ValueError for a batch that cannot be cut."""
    check_accumulation(config, mesh)

    def step(given: tuple[Batch, Teacher | None], state: TrainState) -> tuple[TrainState, StepLog]:
        batch, teacher = given
        specs = parameter_specs(state.model, mesh)
        manual = jax.tree.map(without_model, specs)
        gradients = jax.shard_map(
            lambda *arguments: _gradients(*arguments, specs=specs, problem=problem, config=config),
            mesh=mesh,
            in_specs=(P(DATA_AXES), manual, P(), P(), P()),
            out_specs=(P(), P(), manual, P()),
            axis_names=set(DATA_AXES),
        )
        loss, terms, grads, stats = gradients(batch, state.model, state.stats, state.step, teacher)
        updates, opt_state = optimizer.update(
            cast(optax.Updates, grads), state.opt_state, cast(optax.Params, state.model)
        )
        model = eqx.apply_updates(state.model, updates)
        new = TrainState(model, stats, opt_state, _average(config, state, model), state.step + 1)
        return new, StepLog(loss, _norm(grads, config), terms)

    return CompiledStep(step, teacher)


class CompiledStep:
    """Compiled for each shape of batch when it first comes (detection has several), for the layout of the state that
    it is given: the state comes back in the same. ``compiled`` is the newest program.

    The compiled object does not wait for its result, as calling a jitted function may.
    """

    def __init__(self, function: Callable, teacher: Teacher | None):
        self._function, self._teacher = function, teacher
        self._programs: dict[tuple, Any] = {}
        self.compiled: Any = None

    def compile(self, batch: Batch, state: TrainState) -> "CompiledStep":
        # Said and not left to the compiler, which would hold moments of split parameters whole.
        layout = jax.tree.map(lambda leaf: leaf.sharding, state)
        jitted = jax.jit(self._function, donate_argnums=1, out_shardings=(layout, None))
        self.compiled = jitted.lower((batch, self._teacher), state).compile()
        self._programs[_shapes(batch)] = self.compiled
        return self

    def __call__(self, batch: Batch, state: TrainState) -> tuple[TrainState, StepLog]:
        program = self._programs.get(_shapes(batch)) or self.compile(batch, state).compiled
        return program((batch, self._teacher), state)


def _shapes(batch: Batch) -> tuple:
    return tuple(leaf.shape for leaf in jax.tree.leaves(batch))


def check_accumulation(config: RunConfig, mesh: Mesh) -> None:
    """Raise ValueError unless each device's share of the batch can be cut into equal parts."""
    devices, parts = mesh.shape["data"] * mesh.shape["fsdp"], config.loop.accumulate
    if parts < 1 or config.loop.batch_size % (devices * parts):
        raise ValueError(
            f"--loop.accumulate {parts} cannot cut --loop.batch-size {config.loop.batch_size} over {devices} devices "
            f"into equal parts; use a batch size that {devices * max(parts, 1)} divides"
        )


def _gradients(
    batch: Batch,
    shards: Any,
    stats: eqx.nn.State,
    number: Int[Array, ""],
    teacher: Teacher | None,
    *,
    specs: PyTree[P],
    problem: Problem,
    config: RunConfig,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]], Any, eqx.nn.State]:
    """On one device: loss, its terms and its gradient for the global batch, from this device's rows and its parts of
    the parameters.

    Every device differentiates its own copy of the gathered parameters; the transpose of the gathering adds the
    copies' gradients up, once for all parts of an accumulated batch.
    """
    common = step_key(config.seed, number)
    key = jax.random.fold_in(common, lax.axis_index(DATA_AXES))
    params, add_up = jax.vjp(lambda shards: _copies(gather(shards, specs)), shards)
    counts = jax.tree.map(global_sum, problem.counts(batch))

    def part(rows: Batch, stats: eqx.nn.State, key: PRNGKeyArray) -> Sums:
        def loss_of(params: Any):
            loss, terms, new = problem.loss(params, stats, rows, StepKeys(key, common), counts, teacher)
            return loss, (terms, new)

        (loss, (terms, new)), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        return Sums(loss, terms, grads, new)

    sums = _over_parts(part, batch, stats, key, config.loop.accumulate)
    (grads,) = add_up(sums.grads)
    return global_sum(sums.loss), jax.tree.map(global_sum, sums.terms), grads, sums.stats


def _copies(params: Any) -> Any:
    """Each device's own: marked as different, though equal. The transpose is the sum over devices."""

    def mark(leaf: Array) -> Array:
        missing = tuple(axis for axis in DATA_AXES if axis not in jax.typeof(leaf).manual_axis_type.varying)
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(mark, params)


def _over_parts(part: Callable[..., Sums], batch: Batch, stats: eqx.nn.State, key: PRNGKeyArray, parts: int) -> Sums:
    """Sums over the parts of the batch, one after the other: values, counts and gradients are added, never averaged."""
    if parts == 1:
        return part(batch, stats, key)
    split = jax.tree.map(lambda rows: rows.reshape(parts, -1, *rows.shape[1:]), batch)
    first = part(jax.tree.map(lambda rows: rows[0], split), stats, jax.random.fold_in(key, 0))

    def add(sums: Sums, item: tuple[Batch, Int[Array, ""]]) -> tuple[Sums, None]:
        new = part(item[0], sums.stats, jax.random.fold_in(key, item[1]))
        added = jax.tree.map(jnp.add, sums._replace(stats=None), new._replace(stats=None))
        return added._replace(stats=new.stats), None

    rest = jax.tree.map(lambda rows: rows[1:], split)
    return lax.scan(add, first, (rest, jnp.arange(1, parts)))[0]


def _norm(grads: Any, config: RunConfig) -> Float[Array, ""]:
    """Of the gradients that are used: those of frozen parameters are then never computed."""
    frozen = frozen_mask(config.optimizer, grads)
    return optax.tree.norm(jax.tree.map(lambda grad, is_frozen: None if is_frozen else grad, grads, frozen))


def _average(config: RunConfig, state: TrainState, model: Any) -> Any | None:
    if state.ema is None or config.optimizer.ema is None:
        return None
    return update_ema(state.ema, model, ema_decay(config.optimizer.ema, state.step, config.optimizer.ema_warmup))
