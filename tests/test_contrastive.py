"""The losses of CLIP and SigLIP: against plain formulas, over devices, in chunks, with padding."""

import re
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import contrastive as benchmark
from eqvision.losses import contrastive_loss, sigmoid_loss

ROWS, WIDTH = 24, 8
LOSSES = {"softmax": lambda *a, **k: contrastive_loss(*a[:3], a[4], **k), "sigmoid": sigmoid_loss}


def arguments(rows=ROWS):
    rng = np.random.default_rng(0)
    image, text = rng.normal(size=(2, rows, WIDTH)).astype(np.float32)
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
    weights = np.ones(rows, np.float32)
    weights[[3, rows - 1]] = 0
    return jnp.asarray(image), jnp.asarray(text), jnp.float32(9.0), jnp.float32(-3.0), jnp.asarray(weights)


def plain(kind, image, text, scale, bias, weights):
    """The published formulas, with the padding cut out."""
    kept = np.flatnonzero(weights)
    logits = scale * image[kept] @ text[kept].T
    if kind == "softmax":
        both = jax.nn.log_softmax(logits, axis=1) + jax.nn.log_softmax(logits, axis=0)
        return -jnp.mean(jnp.diagonal(both)) / 2
    signs = 2 * jnp.eye(len(kept)) - 1
    return -jnp.sum(jax.nn.log_sigmoid(signs * (logits + bias))) / len(kept)


def gradients(loss, given):
    """Value and gradient by image, text, scale and bias."""
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(*given)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("chunk", [None, 7])
def test_chunked_equals_plain(kind, chunk, assert_close):
    given = arguments()
    expected = gradients(lambda *free: plain(kind, *free, np.asarray(given[4])), given[:4])
    actual = gradients(lambda *free: LOSSES[kind](*free, given[4], chunk=chunk), given[:4])
    assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("shape", [pytest.param((8,), marks=pytest.mark.slow), (4, 2)])
def test_eight_devices_equal_one(kind, shape, assert_close):
    """Each device differentiates its own share, as the step does; the sum of all is the gradient of the whole."""
    given, axes = arguments(), ("data", "fsdp")[: len(shape)]
    mesh = jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(shape))

    def device(image, text, scale, bias, weights):
        scale, bias = (lax.pcast(x, axes, to="varying") for x in (scale, bias))
        loss = partial(LOSSES[kind], chunk=5)
        value, grads = jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(image, text, scale, bias, weights)
        return lax.psum(value, axes), (*grads[:2], *lax.psum(grads[2:], axes))

    rows = P(axes)
    specs = {"in_specs": (rows, rows, P(), P(), rows), "out_specs": (P(), (rows, rows, P(), P()))}
    actual = jax.jit(jax.shard_map(device, mesh=mesh, **specs))(*given)
    assert_close(actual, gradients(lambda *free: LOSSES[kind](*free, given[4]), given[:4]), 1e-5)


@pytest.mark.parametrize("kind", LOSSES)
def test_padding_may_hold_anything(kind, assert_close):
    image, text, scale, bias, weights = arguments()
    padding = np.flatnonzero(weights == 0)

    def loss(*free):
        return LOSSES[kind](*free, weights, chunk=7)

    expected = gradients(loss, (image, text, scale, bias))
    junk = (image.at[padding].set(jnp.nan), text.at[padding].set(jnp.inf))
    actual = gradients(loss, (*junk, scale, bias))
    assert_close(actual, expected, 0)
    assert not np.any(actual[1][0][padding])
    nothing = LOSSES[kind](*junk, scale, bias, jnp.zeros_like(weights), chunk=7)
    assert nothing == 0


def test_weights_and_count(assert_close):
    image, text, scale, bias, weights = arguments()
    for loss in LOSSES.values():
        run = jax.jit(lambda weights, count, loss=loss: loss(image, text, scale, bias, weights, count=count))
        expected = loss(image, text, scale, bias, weights)
        assert_close(run(2 * weights, 2 * weights.sum()), expected, 1e-6)
        assert_close(2 * run(weights, 2 * weights.sum()), expected, 1e-6)


def test_large_scales_stay_finite():
    image, text, _, _, weights = arguments()
    value, grads = gradients(
        lambda *free: contrastive_loss(*free[:3], weights, chunk=5), (image, text, jnp.float32(1e4), jnp.float32(0.0))
    )
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(grad)) for grad in grads)


def test_a_chunk_of_nothing_is_refused():
    given = arguments()
    with pytest.raises(ValueError, match="chunk is 0; expected 1 or more texts"):
        contrastive_loss(*given[:3], given[4], chunk=0)


def test_devices_that_jax_does_not_track_are_refused(mesh):
    """Each would else compare its images with its own texts alone."""
    image, text, scale, _, weights = arguments()
    run = jax.shard_map(
        lambda *rows: contrastive_loss(*rows[:2], scale, rows[2])[None],
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data"),
        check_vma=False,
    )
    with pytest.raises(ValueError, match="mesh axis 'data' has several devices, but JAX does not track"):
        run(image, text, weights)


@pytest.mark.parity
def test_as_torch(assert_close):
    """transformers' contrastive loss of CLIP and the loss in its SiglipModel, in torch's own functions."""
    import torch

    image, text, scale, bias, _ = arguments()
    one = jnp.ones(ROWS)
    free = [torch.tensor(np.asarray(x), requires_grad=True) for x in (image, text, scale, bias)]
    logits = free[2] * free[0] @ free[1].T
    labels = torch.arange(ROWS)
    ours = gradients(lambda *free: LOSSES["softmax"](*free, one, chunk=7), (image, text, scale, bias))
    entropy = torch.nn.functional.cross_entropy
    theirs = (entropy(logits, labels) + entropy(logits.T, labels)) / 2
    found = torch.autograd.grad(theirs, free[:3], retain_graph=True)
    assert_close((ours[0], ours[1][:3]), (theirs.detach().numpy(), tuple(g.numpy() for g in found)), 1e-5)

    signs = 2 * torch.eye(ROWS) - 1
    theirs = -torch.nn.functional.logsigmoid(signs * (logits + free[3])).sum(1).mean()
    ours = gradients(lambda *free: LOSSES["sigmoid"](*free, one, chunk=7), (image, text, scale, bias))
    found = torch.autograd.grad(theirs, free)
    assert_close(ours, (theirs.detach().numpy(), tuple(g.numpy() for g in found)), 1e-5)


@pytest.mark.slow
def test_the_benchmark_at_toy_size(capsys):
    """What it prints; and that chunks of a smaller size than the batch need less memory than the table of pairs."""
    benchmark.main(["--batches", "16", "1536", "--width", "4", "--timed", "16", "--repeats", "1"])
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| s")]
    assert [row[:2] for row in rows] == [[kind, size] for kind in ("softmax", "sigmoid") for size in ("16", "1536")]
    assert [row[5:] == ["-", "-"] for row in rows] == [False, True] * 2
    assert re.search(r"Command: `python benchmarks/contrastive.py --batches 16 1536", out)
    assert float(rows[1][3]) < float(rows[1][2])
