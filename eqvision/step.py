"""One training step: augmentation on the device, gradient, update, average; compiled ahead of time.

The gradient is taken in ``jax.shard_map``: each device sees its rows, gathers the parameters that it holds parts of,
and sums values and counts; what is divided is divided once, by the global count. The update then runs on whole
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
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray, PyTree

from eqvision.classifiers import Classifier
from eqvision.data import augment_batch, normalize
from eqvision.losses import logit_distillation, token_distillation, weighted_sums
from eqvision.ops.collectives import DATA_AXES, global_sum
from eqvision.optim import ema_decay, frozen_mask, update_ema
from eqvision.recipes import DistillConfig, TrainConfig
from eqvision.sharding import gather, parameter_specs, without_model
from eqvision.state import TrainState
from eqvision.tasks import Task
from eqvision.types import ClassificationBatch, TokenFeatures


class StepLog(NamedTuple):
    """What a step reports; it stays on the device until the log step."""

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]


class Teacher(NamedTuple):
    """A trained model to learn from; it does not change."""

    model: Classifier
    stats: eqx.nn.State


class Sums(NamedTuple):
    """What the parts of a batch add up to on one device; ``stats`` are those after the last part."""

    total: Float[Array, ""]
    count: Float[Array, ""]
    grads: Classifier
    stats: eqx.nn.State


Step = Callable[[ClassificationBatch, TrainState], tuple[TrainState, StepLog]]


def make_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    config: TrainConfig,
    num_classes: int,
    teacher: Teacher | None = None,
) -> "CompiledStep":
    """One update on a global batch; the state's memory is reused. Raises ValueError for a batch that cannot be cut."""
    check_accumulation(config, mesh)

    def step(given: tuple[ClassificationBatch, Teacher | None], state: TrainState) -> tuple[TrainState, StepLog]:
        batch, teacher = given
        specs = parameter_specs(state.model, mesh)
        manual = jax.tree.map(without_model, specs)
        gradients = jax.shard_map(
            lambda *arguments: _gradients(*arguments, specs=specs, task=task, config=config, num_classes=num_classes),
            mesh=mesh,
            in_specs=(P(DATA_AXES), manual, P(), P(), P()),
            out_specs=(P(), manual, P()),
            axis_names=set(DATA_AXES),
        )
        loss, grads, stats = gradients(batch, state.model, state.stats, state.step, teacher)
        updates, opt_state = optimizer.update(
            cast(optax.Updates, grads), state.opt_state, cast(optax.Params, state.model)
        )
        model = eqx.apply_updates(state.model, updates)
        new = TrainState(model, stats, opt_state, _average(config, state, model), state.step + 1)
        return new, StepLog(loss, _norm(grads, config))

    return CompiledStep(step, teacher)


class CompiledStep:
    """Compiled at the first call, for the layout of the state that it is given: the state comes back in the same.

    The compiled object does not wait for its result, as calling a jitted function may.
    """

    def __init__(self, function: Callable, teacher: Teacher | None):
        self._function, self._teacher = function, teacher
        self.compiled: Any = None

    def compile(self, batch: ClassificationBatch, state: TrainState) -> "CompiledStep":
        # Said and not left to the compiler, which would hold moments of split parameters whole.
        layout = jax.tree.map(lambda leaf: leaf.sharding, state)
        jitted = jax.jit(self._function, donate_argnums=1, out_shardings=(layout, None))
        self.compiled = jitted.lower((batch, self._teacher), state).compile()
        return self

    def __call__(self, batch: ClassificationBatch, state: TrainState) -> tuple[TrainState, StepLog]:
        compiled = self.compiled or self.compile(batch, state).compiled
        return compiled((batch, self._teacher), state)


def check_accumulation(config: TrainConfig, mesh: Mesh) -> None:
    """Raise ValueError unless each device's share of the batch can be cut into equal parts."""
    devices, parts = mesh.shape["data"] * mesh.shape["fsdp"], config.loop.accumulate
    if parts < 1 or config.loop.batch_size % (devices * parts):
        raise ValueError(
            f"--loop.accumulate {parts} cannot cut --loop.batch-size {config.loop.batch_size} over {devices} devices "
            f"into equal parts; use a batch size that {devices * max(parts, 1)} divides"
        )


def step_key(seed: int, number: int | Int[Array, ""]) -> Key[Array, ""]:
    """Of the step after ``number`` steps; each device folds its index into it, each part of a batch its own."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), number)


def augment_key(key: Key[Array, ""]) -> Key[Array, ""]:
    """For what is drawn on the device before the model runs, which folds 0, 1 and 2 itself."""
    return jax.random.fold_in(key, 3)


def _gradients(
    batch: ClassificationBatch,
    shards: Classifier,
    stats: eqx.nn.State,
    number: Int[Array, ""],
    teacher: Teacher | None,
    *,
    specs: PyTree[P],
    task: Task,
    config: TrainConfig,
    num_classes: int,
) -> tuple[Float[Array, ""], Classifier, eqx.nn.State]:
    """On one device: loss and gradient of the global batch, from this device's rows and its parts of the parameters.

    Every device differentiates its own copy of the gathered parameters; the transpose of the gathering adds the
    copies' gradients up, once for all parts of an accumulated batch.
    """
    key = jax.random.fold_in(step_key(config.seed, number), lax.axis_index(DATA_AXES))
    params, add_up = jax.vjp(lambda shards: _copies(gather(shards, specs)), shards)

    def part(rows: ClassificationBatch, stats: eqx.nn.State, key: PRNGKeyArray) -> Sums:
        def loss_of(params: Classifier):
            total, count, new = _loss(params, stats, rows, key, teacher, task, config, num_classes)
            return total, (count, new)

        (total, (count, new)), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        return Sums(total, count, grads, new)

    sums = _over_parts(part, batch, stats, key, config.loop.accumulate)
    count = global_sum(sums.count)
    count = jnp.where(count == 0, 1.0, count)
    (grads,) = add_up(sums.grads)
    return global_sum(sums.total) / count, jax.tree.map(lambda grad: grad / count, grads), sums.stats


def _copies(params: Classifier) -> Classifier:
    """Each device's own: marked as different, though equal. The transpose is the sum over devices."""

    def mark(leaf: Array) -> Array:
        missing = tuple(axis for axis in DATA_AXES if axis not in jax.typeof(leaf).manual_axis_type.varying)
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(mark, params)


def _over_parts(
    part: Callable[..., Sums], batch: ClassificationBatch, stats: eqx.nn.State, key: PRNGKeyArray, parts: int
) -> Sums:
    """Sums over the parts of the batch, one after the other: values, counts and gradients are added, never averaged."""
    if parts == 1:
        return part(batch, stats, key)
    split = jax.tree.map(lambda rows: rows.reshape(parts, -1, *rows.shape[1:]), batch)
    first = part(jax.tree.map(lambda rows: rows[0], split), stats, jax.random.fold_in(key, 0))

    def add(sums: Sums, item: tuple[ClassificationBatch, Int[Array, ""]]) -> tuple[Sums, None]:
        new = part(item[0], sums.stats, jax.random.fold_in(key, item[1]))
        grads = jax.tree.map(jnp.add, sums.grads, new.grads)
        return Sums(sums.total + new.total, sums.count + new.count, grads, new.stats), None

    rest = jax.tree.map(lambda rows: rows[1:], split)
    return lax.scan(add, first, (rest, jnp.arange(1, parts)))[0]


def _loss(
    params: Classifier,
    stats: eqx.nn.State,
    batch: ClassificationBatch,
    key: PRNGKeyArray,
    teacher: Teacher | None,
    task: Task,
    config: TrainConfig,
    num_classes: int,
) -> tuple[Float[Array, ""], Float[Array, ""], eqx.nn.State]:
    """Sum of the losses of these rows, sum of their weights, and the new statistics."""
    images = jnp.asarray(normalize(batch.images, config.data.mean, config.data.std))
    labels, mixing = batch.labels, config.augment
    if mixing.mixup or mixing.cutmix or mixing.random_erasing:
        images, labels = augment_batch(
            images, labels, batch.weights, augment_key(key), config=mixing, num_classes=num_classes
        )
    images = jnp.asarray(images, jnp.dtype(config.loop.compute_dtype))
    features, new = params.features(images, stats, train=True, key=key)
    outputs, new = params.head(features, new, train=True, key=jax.random.fold_in(key, 2))
    values, weights = task.loss(outputs, batch._replace(labels=labels))
    if teacher is not None:
        values = _distilled(values, outputs, features, images, teacher, config.distill)
    total, count = weighted_sums(values, weights, axis_names=())
    return total, count, new


def _distilled(values, outputs, features, images: Array, teacher: Teacher, config: DistillConfig) -> Float[Array, " b"]:
    taught, _ = teacher.model.features(images, teacher.stats)
    if config.kind == "token":
        for name, given in (("student", features), ("teacher", taught)):
            if not isinstance(given, TokenFeatures):
                raise ValueError(
                    f"--distill.kind token needs two transformers, but the {name} has no tokens; use logit"
                )
        extra = token_distillation(cast(TokenFeatures, features).patches, cast(TokenFeatures, taught).patches)
    else:
        wanted, _ = teacher.model.head(taught, teacher.stats)
        extra = logit_distillation(outputs, wanted, temperature=config.temperature)
    return (1 - config.weight) * values + config.weight * extra


def _norm(grads: Classifier, config: TrainConfig) -> Float[Array, ""]:
    """Of the gradients that are used: those of frozen parameters are then never computed."""
    if not config.optimizer.freeze:
        return optax.tree.norm(grads)
    frozen = frozen_mask(config.optimizer, grads)
    return optax.tree.norm(jax.tree.map(lambda grad, is_frozen: None if is_frozen else grad, grads, frozen))


def _average(config: TrainConfig, state: TrainState, model: Classifier) -> Classifier | None:
    if state.ema is None or config.optimizer.ema is None:
        return None
    return update_ema(state.ema, model, ema_decay(config.optimizer.ema, state.step, config.optimizer.ema_warmup))
