"""The step: accumulation, the average, distillation, what is mixed, one device against many layouts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from toy import toy_config, toy_images, toy_labels, toy_problem, with_loop, with_optimizer

from eqvision import create
from eqvision.losses import logit_distillation, token_distillation
from eqvision.mesh import BATCH, make_mesh
from eqvision.optim import make_optimizer, make_schedule
from eqvision.recipes import AugmentConfig, DistillConfig, ScheduleConfig
from eqvision.setup import build_model
from eqvision.state import Teacher, first_state
from eqvision.step import make_step
from eqvision.types import ClassificationBatch


def plain_sgd(config):
    """An update that is the gradient itself."""
    return with_optimizer(config, name="sgd", learning_rate=1.0, momentum=0.0, weight_decay=0.0, clip_norm=None)


def toy_batch(mesh, count=16, weights=None):
    labels = toy_labels(count)
    weights = np.ones(count, np.float32) if weights is None else np.asarray(weights, np.float32)
    batch = ClassificationBatch(toy_images(labels), labels.astype(np.int32), weights, np.arange(count, dtype=np.int32))
    return jax.device_put(batch, NamedSharding(mesh, BATCH))


def run(config, mesh, *, steps=1, teacher=None, weights=None):
    """State and log after some steps on one batch."""
    schedule = make_schedule(ScheduleConfig(kind="constant"), config.optimizer.learning_rate, 100)
    optimizer = make_optimizer(config.optimizer, schedule)
    step = make_step(toy_problem(config), optimizer, mesh, config, teacher)
    state, log = first_state(*build_model(config, 3), config, optimizer, mesh), None
    for _ in range(steps):
        state, log = step(toy_batch(mesh, weights=weights), state)
    return state, log


def largest_difference(one, other):
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(one))
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max()) for a, b in pairs) / scale


@pytest.fixture
def config(tmp_path):
    return toy_config(tmp_path, tmp_path)


@pytest.fixture
def vit(tmp_path):
    """A transformer without batch norm, whose gradient does not depend on how the batch is cut."""
    return toy_config(tmp_path, tmp_path, model="vit_ti4")


# Accumulation


@pytest.mark.parametrize("devices", [1, 2])
def test_accumulated_gradients_equal_the_full_batch(vit, devices):
    """R13: with weights that differ between the parts, so that means of means would be wrong."""
    weights = [1, 1, 1, 1, 0, 0, 0, 1, 0.5, 1, 1, 1, 0, 1, 1, 0]
    mesh, whole = make_mesh(num_devices=devices), None
    for parts in (1, 2, 4):
        state, log = run(with_loop(plain_sgd(vit), accumulate=parts), mesh, weights=weights)
        whole = whole or (state, log)
        assert largest_difference(whole[0].model, state.model) < 1e-6
        assert float(log.loss) == pytest.approx(float(whole[1].loss), rel=1e-6)
        assert float(log.grad_norm) == pytest.approx(float(whole[1].grad_norm), rel=1e-5)


def test_a_part_of_weight_zero_alone_adds_nothing(vit):
    weights = [1.0] * 8 + [0.0] * 8
    mesh = make_mesh(num_devices=1)
    one, _ = run(plain_sgd(vit), mesh, weights=weights)
    two, _ = run(with_loop(plain_sgd(vit), accumulate=2), mesh, weights=weights)
    assert largest_difference(one.model, two.model) < 1e-6


def test_batch_norm_statistics_pass_from_part_to_part(config):
    """Two parts move the running mean twice."""
    mesh = make_mesh(num_devices=1)
    one, _ = run(plain_sgd(config), mesh)
    two, _ = run(with_loop(plain_sgd(config), accumulate=2), mesh)
    moved = [float(jnp.abs(leaf).sum()) for leaf in (jax.tree.leaves(one.stats)[0], jax.tree.leaves(two.stats)[0])]
    assert moved[1] > 1.5 * moved[0] > 0


def test_a_batch_that_cannot_be_cut_is_refused(config):
    with pytest.raises(ValueError, match=r"--loop.accumulate 3 cannot cut --loop.batch-size 16 over 2 devices"):
        run(with_loop(config, accumulate=3), make_mesh(num_devices=2))


# Layout


def test_split_parameters_train_like_whole_ones(vit):
    """fsdp=4 with data=2: losses, parameters and averages after three steps.

    SGD and not AdamW, which makes full steps of the rounding of gradients that are zero (those of key biases).
    """
    config = with_optimizer(vit, name="sgd", learning_rate=0.1, ema=0.9)
    one, log_one = run(config, make_mesh(num_devices=1), steps=3)
    split = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, fsdp=4))
    many, log_many = run(split, make_mesh(split.mesh), steps=3)
    assert largest_difference(one.model, many.model) < 1e-5
    assert largest_difference(one.ema, many.ema) < 1e-5
    assert float(log_many.loss) == pytest.approx(float(log_one.loss), rel=1e-5)


# The average


def test_the_average_follows_with_its_warm_up(vit):
    config = with_optimizer(plain_sgd(vit), ema=0.5, ema_warmup=False)
    mesh = make_mesh(num_devices=1)
    before = run(config, mesh, steps=0)[0]
    expected = before.ema
    for steps in (1, 2):
        state, _ = run(config, mesh, steps=steps)
        expected = jax.tree.map(lambda old, new: 0.5 * old + 0.5 * new, expected, state.model)
        assert largest_difference(expected, state.ema) < 1e-6
        assert state.evaluated is state.ema
    assert run(vit, mesh)[0].ema is None


# Distillation


def test_logit_distillation_is_the_divergence(rng):
    student, teacher = (jnp.asarray(rng.normal(size=(5, 7)), jnp.float32) for _ in range(2))
    p, q = (np.asarray(jax.nn.softmax(x / 2.0)) for x in (teacher, student))
    np.testing.assert_allclose(
        logit_distillation(student, teacher, temperature=2.0), 4 * (p * np.log(p / q)).sum(1), rtol=1e-4
    )
    assert float(jnp.abs(logit_distillation(teacher, teacher)).max()) < 1e-6
    assert not jax.grad(lambda t: logit_distillation(student, t).sum())(teacher).any()
    with pytest.raises(ValueError, match="temperature is 0"):
        logit_distillation(student, teacher, temperature=0.0)


def test_token_distillation_is_a_distance_of_directions(rng):
    tokens = jnp.asarray(rng.normal(size=(2, 3, 3, 8)), jnp.float32)
    np.testing.assert_allclose(token_distillation(tokens, 3 * tokens), 0, atol=1e-6)
    np.testing.assert_allclose(token_distillation(tokens, -tokens), 4, rtol=1e-6)
    with pytest.raises(ValueError, match="equal grids and widths; the student gives"):
        token_distillation(tokens, tokens[:, :2])


@pytest.mark.parametrize("kind", ["logit", "token"])
def test_a_student_moves_towards_its_teacher(vit, kind):
    teacher = Teacher(*create("vit_ti4", num_classes=3, image_size=8, in_channels=1, key=jax.random.key(7)))
    config = dataclasses.replace(vit, distill=DistillConfig(teacher="x", kind=kind, weight=1.0))
    mesh = make_mesh(num_devices=2)
    losses = [float(run(config, mesh, steps=steps, teacher=teacher)[1].loss) for steps in (1, 8)]
    assert losses[1] < 0.8 * losses[0]


def test_a_teacher_without_tokens_is_refused(vit):
    teacher = Teacher(*create("small_cnn", num_classes=3, image_size=8, in_channels=1, key=jax.random.key(7)))
    config = dataclasses.replace(vit, distill=DistillConfig(teacher="x", kind="token"))
    with pytest.raises(ValueError, match="but the teacher has no tokens"):
        run(config, make_mesh(num_devices=1), teacher=teacher)


# What is mixed on the device


@pytest.mark.slow
def test_mixing_changes_the_step_and_is_a_function_of_the_seed(vit):
    mesh, mixed = make_mesh(num_devices=2), dataclasses.replace(vit, augment=AugmentConfig(mixup=0.8, cutmix=1.0))
    plain, once, again = (run(config, mesh)[1].loss for config in (vit, mixed, mixed))
    other = run(dataclasses.replace(mixed, seed=1), mesh)[1].loss
    assert float(once) == float(again)
    assert len({float(plain), float(once), float(other)}) == 3


def test_bfloat16_computes_and_keeps_float32_parameters(vit):
    state, log = run(with_loop(vit, compute_dtype="bfloat16"), make_mesh(num_devices=1))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.model)} == {jnp.dtype("float32")}
    exact = run(vit, make_mesh(num_devices=1))[1]
    assert float(log.loss) == pytest.approx(float(exact.loss), rel=0.02)
    assert float(log.loss) != float(exact.loss)


def test_the_state_owns_its_memory(vit):
    """The average begins as a copy: donating the state must not free the same buffer twice."""
    config = with_optimizer(vit, ema=0.9)
    optimizer = make_optimizer(config.optimizer, optax.constant_schedule(1e-3))
    state = first_state(*build_model(config, 3), config, optimizer, make_mesh(num_devices=1))
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((state.model, state.ema))]
    assert len(set(pointers)) == len(pointers)
    assert build_model(config, 3)[0] is not state.model
