"""Small trees of parameters, stacked and as lists of blocks, and their training, for the tests of optimizers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from eqvision.optim import make_optimizer, make_schedule
from eqvision.recipes import ScheduleConfig


@dataclasses.dataclass
class Matrix:
    """Parameters with the names that weight decay looks at."""

    weight: jax.Array
    bias: jax.Array


jax.tree_util.register_dataclass(Matrix, ["weight", "bias"], [])


def optimizer_of(config):
    return make_optimizer(config, make_schedule(ScheduleConfig(kind="constant"), config.learning_rate, 1))


def toy_params(rng, depth=2):
    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    blocks = {
        "fc1": {"weight": normal(depth, 32, 40), "bias": normal(depth, 40)},
        "conv": {"weight": normal(depth, 3, 3, 8, 32)},
        "norm": {"weight": normal(depth, 32)},
    }
    return {
        "backbone": {"blocks": blocks, "patch_embed": {"weight": normal(4, 4, 3, 32)}},
        "head": {"linear": {"weight": normal(32, 64), "bias": jnp.zeros((64,))}},
    }


def unstacked(params):
    blocks = params["backbone"]["blocks"]
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], blocks) for i in range(blocks["norm"]["weight"].shape[0])]
    return params | {"backbone": params["backbone"] | {"blocks": layers}}


def restacked(params):
    layers = params["backbone"]["blocks"]
    return params | {"backbone": params["backbone"] | {"blocks": jax.tree.map(lambda *x: jnp.stack(x), *layers)}}


def toy_gradients(params, rng, steps=3):
    return [
        jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), params) for _ in range(steps)
    ]


fast_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def train(optimizer, params, gradients, jit=fast_jit):
    state = optimizer.init(params)
    update = jit(optimizer.update)
    for grads in gradients:
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state
