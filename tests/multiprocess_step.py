"""A few sharded steps on given devices, to be run by one process or by several."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, NamedSharding

import eqvision
from eqvision.losses import weighted_mean
from eqvision.mesh import AXES, BATCH
from eqvision.sharding import parameter_specs, sharded_value_and_grad, state_shardings


def train_steps(devices, steps: int = 3):
    """Losses, and the parameters as whole numpy arrays, of a ResNet with batch norm over data 2 x fsdp 2."""
    mesh = jax.make_mesh((2, 2, 1), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    optimizer = optax.sgd(0.05, momentum=0.9)

    def begin():
        model, stats = eqvision.create("small_cnn", num_classes=4, image_size=8, key=jax.random.key(0))
        return model, optimizer.init(model), stats

    abstract = jax.eval_shape(begin)
    where = state_shardings(abstract, abstract[0], mesh, min_size=64)
    value_and_grad = sharded_value_and_grad(loss_fn, mesh, parameter_specs(abstract[0], mesh, min_size=64))

    def step(state, batch):
        model, opt_state, stats = state
        (loss, stats), grads = value_and_grad(model, batch, stats)
        updates, opt_state = optimizer.update(grads, opt_state, model)
        return (optax.apply_updates(model, updates), opt_state, stats), loss

    run = jax.jit(step, out_shardings=(where, None))
    state, losses = jax.jit(begin, out_shardings=where)(), []
    for number in range(steps):
        state, loss = run(state, batch_of(number, mesh))
        losses.append(float(loss))
    return np.array(losses), [np.asarray(process_allgather(leaf, tiled=True)) for leaf in jax.tree.leaves(state[0])]


def loss_fn(model, batch, stats):
    images, labels = batch
    outputs, stats = model(images, stats, train=True)
    values = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
    return weighted_mean(values, jnp.ones_like(values)), stats


def batch_of(number, mesh):
    rng = np.random.default_rng(number)
    images, labels = rng.normal(size=(16, 8, 8, 3)).astype(np.float32), rng.integers(0, 4, 16)
    rows = np.split(np.arange(16), jax.process_count())[jax.process_index()]
    put = lambda x: jax.make_array_from_process_local_data(NamedSharding(mesh, BATCH), x[rows])  # noqa: E731
    return put(images), put(labels)


def digest(leaves) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(leaf).tobytes() for leaf in leaves)).hexdigest()
