"""Losses that pull the vectors of an image and of its text together and push all others apart (CLIP, SigLIP).

Every image of the global batch is compared with every text of it: inside ``jax.shard_map`` the texts of all devices
are gathered, and each device returns its images' share of the loss. The shares add up to the loss that one device
would have with all rows, and so do their gradients, as the training step adds them up. An accumulated batch is
compared part by part; give ``count`` of the whole batch then.

No array has as many entries as the batch has pairs: a device takes its images and ``chunk`` texts at a time, and does
so again for the gradient. Rows of weight 0 are padding: they may hold anything, NaN included, are nobody's negatives
and change nothing.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from eqvision.losses.reduce import mask_rows, require_tracking
from eqvision.ops.collectives import DATA_AXES, global_sum, vary_like, varying_axes

CHUNK = 1024
_ABSENT = -1e30  # the logit of a pair that is not there; infinity would give NaN where nothing is there

Vectors = Float[Array, "b d"]


def contrastive_loss(
    image: Vectors,
    text: Vectors,
    scale: Float[Array, ""],
    weights: Float[Array, " b"],
    *,
    count: Float[Array, ""] | None = None,
    chunk: int | None = CHUNK,
) -> Float[Array, ""]:
    """CLIP's loss (Radford et al. 2021, figure 3): which text is whose, and which image, by softmax; the mean of both.

    Row i of ``image`` and ``text`` are a pair; logits are ``scale`` times their products. Each pair counts by its
    weight. ``count`` is the sum of weights that the loss is divided by; None: of this batch, over all devices.
    ``chunk`` None takes all texts at once.

    Raises ValueError inside ``shard_map(..., check_vma=False)``, which hides what varies.
    """
    image, text, weights, axes = _prepared(image, text, weights)
    used, scaled = weights != 0, image * scale
    texts, texts_used = _gathered(text, axes), _gathered(used, axes)
    sums: Any = pair_log_sums(scaled, texts, used, texts_used, _size(chunk, len(texts)))  # of a custom_vjp, no type
    rows, columns = sums
    columns = _own(_log_sum_over_devices(columns, axes), len(image), axes)
    values = (rows + columns) / 2 - jnp.sum(scaled * text, axis=1)
    return _share(values, weights, count)


def sigmoid_loss(
    image: Vectors,
    text: Vectors,
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    weights: Float[Array, " b"],
    *,
    count: Float[Array, ""] | None = None,
    chunk: int | None = CHUNK,
) -> Float[Array, ""]:
    """SigLIP's loss (Zhai et al. 2023, algorithm 1): for each image and each text, whether they are a pair.

    The sum over all texts for each image, then the mean over images by their weights. Arguments and errors are those
    of ``contrastive_loss``; logits are ``scale`` times the products, plus ``bias``.
    """
    image, text, weights, axes = _prepared(image, text, weights)
    texts, texts_used = _gathered(text, axes), _gathered(weights != 0, axes)
    size = _size(chunk, len(texts))
    partners = _own(jnp.arange(len(texts)), len(image), axes)
    scaled = image * scale

    @jax.checkpoint
    def sums(some: Float[Array, "c d"], some_used: Bool[Array, " c"], first: Array) -> Float[Array, " b"]:
        logits = _products(scaled, some) + bias
        is_pair = partners[:, None] == first + jnp.arange(size)
        values = jax.nn.softplus(jnp.where(is_pair, -logits, logits))
        return jnp.sum(jnp.where(some_used, values, 0), axis=1)

    start = vary_like(jnp.zeros(len(image)), scaled + bias)
    chunks = (_chunks(texts, size), _chunks(texts_used, size), jnp.arange(0, len(texts), size))
    values, _ = lax.scan(lambda total, some: (total + sums(*some), None), start, chunks)
    return _share(values, weights, count)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def pair_log_sums(
    a: Float[Array, "n d"], b: Float[Array, "m d"], a_used: Bool[Array, " n"], b_used: Bool[Array, " m"], chunk: int
) -> tuple[Float[Array, " n"], Float[Array, " m"]]:
    """Log-sum-exp of ``a @ b.T`` along both of its axes, over what is used, ``chunk`` columns at a time.

    The backward pass computes the products again from the sums, as FlashAttention does (Dao et al. 2022), so that
    neither pass holds more than ``n * chunk`` of them. Reverse mode only.
    """
    return _pair_forward(a, b, a_used, b_used, chunk)[0]


def _pair_forward(a, b, a_used, b_used, chunk):
    def step(carry, some):
        highest, total = carry
        logits = _logits(a, a_used, *some)
        new = jnp.maximum(highest, jnp.max(logits, axis=1))
        total = total * jnp.exp(highest - new) + jnp.sum(jnp.exp(logits - new[:, None]), axis=1)
        return (new, total), jax.nn.logsumexp(logits, axis=0)

    start = vary_like((jnp.full(len(a), _ABSENT), jnp.zeros(len(a))), a)
    (highest, total), columns = lax.scan(step, start, (_chunks(b, chunk), _chunks(b_used, chunk)))
    sums = highest + jnp.log(total), columns.reshape(-1)[: len(b)]
    return sums, (a, b, a_used, b_used, *sums)


def _pair_backward(chunk, saved, cotangents):
    a, b, a_used, b_used, rows, columns = saved
    row_slope, column_slope = cotangents

    def step(slope, some):
        of_b, used, column, column_slope = some
        logits = _logits(a, a_used, of_b, used)
        weights = row_slope[:, None] * jnp.exp(logits - rows[:, None]) + column_slope * jnp.exp(logits - column)
        weights = jnp.where(a_used[:, None] & used, weights, 0)
        return slope + _exact(weights, of_b), _exact(weights.T, a)

    chunks = tuple(_chunks(x, chunk) for x in (b, b_used, columns, column_slope))
    slope, slopes = lax.scan(step, jnp.zeros_like(a), chunks)
    return slope, slopes.reshape(-1, a.shape[1])[: len(b)], None, None


pair_log_sums.defvjp(_pair_forward, _pair_backward)


def _logits(a, a_used, b, b_used):
    return jnp.where(a_used[:, None] & b_used, _products(a, b), _ABSENT)


def _products(a: Float[Array, "n d"], b: Float[Array, "m d"]) -> Float[Array, "n m"]:
    return _exact(a, b.T)


def _exact(a, b):
    """Logits of a hundred times a cosine have errors that show, in the half precision of accelerators' products."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _prepared(
    image: Vectors, text: Vectors, weights: Float[Array, " b"]
) -> tuple[Vectors, Vectors, Float[Array, " b"], tuple[str, ...]]:
    """In float32 and without padding's numbers; and the mesh axes over which the rows are split."""
    require_tracking(DATA_AXES)
    image, text = (vary_like(mask_rows(x.astype(jnp.float32), weights), weights) for x in (image, text))
    image, text = vary_like(image, text), vary_like(text, image)
    return image, text, vary_like(weights.astype(jnp.float32), image), varying_axes(image)


def _gathered(x: Array, axes: tuple[str, ...]) -> Array:
    """The rows of all devices, in the order of the devices."""
    return lax.all_gather(x, axes, tiled=True) if axes else x


def _own(x: Array, rows: int, axes: tuple[str, ...]) -> Array:
    """This device's part of what has an entry for every row of all devices."""
    return lax.dynamic_slice_in_dim(x, lax.axis_index(axes) * rows, rows) if axes else x


def _log_sum_over_devices(x: Float[Array, " n"], axes: tuple[str, ...]) -> Float[Array, " n"]:
    if not axes:
        return x
    highest = lax.pmax(lax.stop_gradient(x), axes)
    return highest + jnp.log(lax.psum(jnp.exp(x - highest), axes))


def _size(chunk: int | None, rows: int) -> int:
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}; expected 1 or more texts at a time, or None for all at once")
    return rows if chunk is None else min(chunk, rows)


def _chunks(x: Array, size: int) -> Array:
    """(n, ...) -> (parts, size, ...), filled up with zeros."""
    parts = math.ceil(len(x) / size)
    padded = jnp.pad(x, ((0, parts * size - len(x)), *((0, 0) for _ in x.shape[1:])))
    return padded.reshape(parts, size, *x.shape[1:])


def _share(values: Float[Array, " b"], weights: Float[Array, " b"], count: Float[Array, ""] | None) -> Float[Array, ""]:
    count = global_sum(weights.sum()) if count is None else count
    return jnp.sum(mask_rows(values, weights) * weights) / jnp.where(count == 0, 1.0, count)
