"""CenterNet: planted objects are found, shapes and sizes of the published models, gradients, what is refused."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvision.backbones import DLA, DLASize, HourglassSize, StackedHourglass, dla, resnet
from eqvision.detectors import (
    CenterNet,
    centernet_dla34,
    centernet_hourglass104,
    centernet_r18_dcn,
    centernet_resnet,
    decode_centers,
)
from eqvision.heads import CenterHead
from eqvision.losses import center_counts, center_loss, center_targets
from eqvision.necks import DeconvUp, DLAUp
from eqvision.types import CenterPredictions, DetectionTargets, PaddedImages

KEY = jax.random.key(0)


def abstract(build):
    """Model and state as shapes."""
    return eqx.filter_eval_shape(eqx.nn.make_with_state(build))


def parameters(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# Decoding

BOXES = np.array([[[8, 4, 30, 18], [33, 20, 44, 37], [2, 22, 13, 30]], [[5, 3, 20, 20], [0, 0, 0, 0], [0, 0, 0, 0]]])
LABELS, VALID = np.array([[2, 0, 2], [1, 0, 0]]), np.array([[True, True, True], [True, False, False]])
SIZE = np.array([[40, 48], [32, 24]], np.int32)
PEAKS = np.array([[2.0, 3.0, 1.0], [2.5, 0, 0]])  # logits


@functools.cache
def planted():
    """Maps that say what the targets say, with peaks of known height, and nonsense wherever there is no centre."""
    targets = DetectionTargets(BOXES.astype(np.float32), LABELS.astype(np.int32), VALID)
    wanted = jax.jit(lambda *given: center_targets(*given, (10, 14), 3))(targets, SIZE, np.ones(2, np.float32))
    wanted = wanted._replace(**{name: np.asarray(value) for name, value in wanted._asdict().items()})
    logits = np.log(0.5 * wanted.heatmap + 1e-9) - np.log(1 - 0.5 * wanted.heatmap)
    maps = np.random.default_rng(0).normal(size=(2, 2, 10, 14, 2)) * 100
    for image, row in zip(*np.nonzero(VALID), strict=True):
        y, x = wanted.cells[image, row]
        logits[image, y, x, LABELS[image, row]] = PEAKS[image, row]
        maps[0, image, y, x], maps[1, image, y, x] = wanted.sizes[image, row], wanted.offsets[image, row]
    logits[0, :, 12:] = logits[1, 8:] = logits[1, :, 6:] = 9.0  # in the padding
    stacks = [np.stack([np.zeros_like(each), each]).astype(np.float32) for each in (logits, *maps)]
    return CenterPredictions(*stacks)


def test_planted_objects_are_found():
    original = SIZE * [2, 3]
    found = jax.jit(decode_centers, static_argnames="count")(planted(), SIZE, original.astype(np.int32), count=50)
    scale = np.array([3, 2, 3, 2])
    order = [1, 0, 2]
    np.testing.assert_allclose(found.boxes[0, :3], BOXES[0, order] * scale, atol=1e-3)
    np.testing.assert_array_equal(found.labels[0, :3], LABELS[0, order])
    np.testing.assert_allclose(found.scores[0, :3], 1 / (1 + np.exp(-PEAKS[0, order])), rtol=1e-5)
    np.testing.assert_allclose(found.boxes[1, 0], BOXES[1, 0] * scale, atol=1e-3)
    assert (found.labels[1, 0], found.boxes.shape) == (1, (2, 50, 4))
    # Behind them is nothing but the ground: no neighbour of a peak, and no peak of the padding.
    assert found.scores[0, 3] < 1e-6
    assert found.scores[1, 1] < 1e-6


def test_rows_behind_the_last_peak_are_not_valid():
    predictions = jax.tree.map(lambda x: x[:, :1], planted())
    steep = predictions._replace(logits=np.where(np.arange(3) == 2, predictions.logits, np.float32(-np.inf)))
    found = jax.jit(decode_centers)(steep, np.array([[4, 4]], np.int32), np.array([[4, 4]], np.int32))
    np.testing.assert_array_equal(found.valid, [[True] + [False] * 99])
    assert (np.asarray(found.boxes)[..., 2:] >= np.asarray(found.boxes)[..., :2]).all()


# Models


def small_hourglass(norm="frozen"):
    size = HourglassSize((4, 6), (1, 1), stem=4, width=8)
    backbone = StackedHourglass(size, 2, norm=norm, key=KEY)
    return CenterNet(backbone, None, CenterHead(8, 3, stacks=2, width=4, key=KEY))


@functools.cache
def inputs():
    rng = np.random.default_rng(0)
    size = np.array([[64, 64], [45, 64]], np.int32)
    images = rng.normal(size=(2, 64, 64, 3)).astype(np.float32)
    images[1, 45:] = 0
    boxes = np.array([[[3, 5, 40, 30], [20, 20, 60, 61]], [[10, 4, 30, 22], [np.nan] * 4]], np.float32)
    valid = np.array([[True, True], [True, False]])
    targets = DetectionTargets(boxes, np.array([[0, 2], [1, -1]], np.int32), valid)
    return jax.tree.map(jnp.asarray, (PaddedImages(images, size), targets))


def graded(model, state):
    """Predictions in training, loss, gradient and the new state."""

    @jax.jit
    def value(model, state, given, targets):
        weights = jnp.ones(2)
        counts = center_counts(targets, given.size, weights)

        def loss(model):
            predictions, new = model(given, state, train=True)
            return center_loss(predictions, targets, given.size, weights, counts)[0], (predictions, new)

        return jax.value_and_grad(loss, has_aux=True)(model)

    return value(model, state, *inputs())


@pytest.mark.slow
def test_every_stack_learns():
    model, state = eqx.nn.make_with_state(small_hourglass)()
    (loss, (predictions, _)), gradient = graded(model, state)
    assert [each.shape for each in predictions] == [(2, 2, 16, 16, 3), (2, 2, 16, 16, 2), (2, 2, 16, 16, 2)]
    assert np.isfinite(loss)
    assert all(np.isfinite(each).all() for each in jax.tree.leaves(gradient))
    for each in jax.tree.leaves(gradient.head):
        assert (np.abs(each).max(axis=tuple(range(1, each.ndim))) > 0).all()  # of both stacks


def test_a_fresh_head_says_one_in_ten():
    def build(x, key):
        head = CenterHead(2, 5, stacks=2, width=4, key=key).reset(7, key=key)
        head = jax.tree.map(lambda leaf: leaf if leaf.ndim == 2 else jnp.ones_like(leaf), head)  # all but biases
        return head((x, x, x))

    predictions = jax.jit(build)(np.zeros((1, 2, 3, 2), np.float32), KEY)
    np.testing.assert_allclose(1 / (1 + np.exp(-predictions.logits)), 0.1, atol=1e-3)
    assert not np.any(predictions.sizes)
    assert [each.shape for each in predictions] == [(2, 1, 2, 3, n) for n in (7, 2, 2)]


def head_parameters(channels, width, num_classes):
    return 3 * width * (9 * channels + 1) + (num_classes + 4) * (width + 1)


def test_published_models():
    """Shapes at 512 pixels, and parameters: those of backbones and necks are tested with them."""
    images = PaddedImages(*(jax.ShapeDtypeStruct(s, t) for s, t in (((1, 512, 512, 3), "float32"), ((1, 2), "int32"))))
    for build, width in ((centernet_r18_dcn, 64), (centernet_dla34, 256)):
        model, state = abstract(functools.partial(build, key=KEY))
        predictions, _ = eqx.filter_eval_shape(model, images, state)
        assert [each.shape for each in predictions] == [(1, 1, 128, 128, n) for n in (80, 2, 2)]
        assert parameters(model.head) == head_parameters(64, width, 80)
        assert model.stride == 4
    assert parameters(abstract(lambda: resnet(18, key=KEY))[0]) == 11_689_512 - 513_000
    plain = abstract(functools.partial(centernet_r18_dcn, conv="plain", key=KEY))[0]
    assert parameters(plain.neck) == sum(9 * i * o + 16 * o * o + 4 * o for i, o in ((512, 256), (256, 128), (128, 64)))


@pytest.mark.slow
def test_published_hourglass():
    images = PaddedImages(*(jax.ShapeDtypeStruct(s, t) for s, t in (((1, 512, 384, 3), "float32"), ((1, 2), "int32"))))
    model, state = abstract(functools.partial(centernet_hourglass104, key=KEY))
    predictions, _ = eqx.filter_eval_shape(model, images, state)
    assert [each.shape for each in predictions] == [(2, 1, 128, 96, n) for n in (80, 2, 2)]
    assert parameters(model.head) == 2 * head_parameters(256, 256, 80)


@pytest.mark.slow
@pytest.mark.parametrize("conv", ["plain", "deformable"])
def test_residual_network_runs(conv):
    build = functools.partial(
        centernet_resnet, 18, num_classes=3, conv=conv, width=4, up_widths=(8, 8, 4), head_width=4, key=KEY
    )
    check_training(*eqx.nn.make_with_state(build)())


@pytest.mark.slow
def test_dla_with_deformable_convolutions_runs():
    def build():
        backbone = DLA(DLASize((1, 1, 1, 2, 2, 1), (2, 2, 4, 4, 6, 6)), key=KEY)
        neck = DLAUp(backbone.channels, backbone.strides, conv="deformable", key=KEY)
        return CenterNet(backbone, neck, CenterHead(4, 3, width=4, key=KEY))

    check_training(*eqx.nn.make_with_state(build)())


def check_training(model, state):
    (loss, (predictions, new)), gradient = graded(model, state)
    assert predictions.logits.shape == (1, 2, 16, 16, 3)
    assert np.isfinite(loss)
    assert all(np.isfinite(each).all() for each in jax.tree.leaves((gradient, new)))
    before, after = jax.tree.leaves(state), jax.tree.leaves(new)
    assert any(not np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    for offsets in [each for each in jax.tree.leaves(gradient.neck) if each.shape[-1:] == (27,)]:
        assert np.abs(offsets).max() > 0  # convolutions learn where to look


def test_refused():
    backbone = abstract(lambda: dla("34", key=KEY))[0]
    neck = abstract(lambda: DeconvUp((8,), (32,), widths=(8, 8, 4), conv="plain", key=KEY))[0]
    one, two = (abstract(lambda n=n: CenterHead(4, 3, stacks=n, key=KEY))[0] for n in (1, 2))
    message = r"its head reads 1 map\(s\) of 4 channels and one stride, and the maps of its backbone have \(16, 32"
    with pytest.raises(ValueError, match=message):
        CenterNet(backbone, None, one)
    with pytest.raises(
        ValueError, match=r"its head reads 2 map\(s\) of .* its neck have \(4,\) channels and strides \(4,\)"
    ):
        CenterNet(backbone, neck, two)
    assert CenterNet(backbone, neck, one).stride == 4
