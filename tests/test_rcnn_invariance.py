"""What may change nothing in what R-CNNs learn and find: order, padding, the canvas, and other images of the batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rcnn_references import STRIDES, dialect, head_model, random_maps

from eqvision.detectors import DETECTRON2
from eqvision.losses import DETECTRON2_LOSS, rcnn_counts, rcnn_loss
from eqvision.types import DetectionTargets, PaddedImages


@pytest.fixture(scope="module")
def complete():
    """Heads that draw all there is (1023 anchors, 40 proposals and the objects), and their jitted outputs."""
    rule = dialect(anchors=1024, boxes=64)
    rule = dataclasses.replace(
        DETECTRON2,  # whose anchors do not move with the canvas
        sampling_ratio=2,
        train_proposals=rule.train_proposals,
        test_proposals=rule.test_proposals,
        anchor_sample=rule.anchor_sample,
        box_sample=dataclasses.replace(rule.box_sample, positive=1.0),
    )
    model, state = head_model(rule)

    @jax.jit
    def outputs(maps, images, size, targets, keys):
        inputs = PaddedImages(images, size)
        samples, _ = model.samples(maps, inputs, targets, state, keys=keys)
        losses = rcnn_loss(samples, jnp.ones(len(size)), rcnn_counts(samples, jnp.ones(len(size))), DETECTRON2_LOSS)
        return losses, samples, model.detect(maps, inputs, state)

    return outputs


def small_scene(rng, canvas=(128, 128)):
    """Images of 64 and 48 pixels on a larger canvas: maps are zeros behind 64. Three objects and one, in five rows."""
    maps, inputs = random_maps(rng, size=(64, 64)), jnp.zeros((2, *canvas, 3))
    grids = [(canvas[0] // s, canvas[1] // s) for s in STRIDES]
    maps = tuple(
        jnp.pad(x, ((0, 0), (0, h - x.shape[1]), (0, w - x.shape[2]), (0, 0)))
        for x, (h, w) in zip(maps, grids, strict=True)
    )
    boxes = [[[10.0, 10, 30, 30], [30, 20, 60, 50], [8, 34, 24, 62]], [[4, 4, 36, 30], [0] * 4, [0] * 4]]
    boxes = jnp.pad(jnp.array(boxes), ((0, 0), (0, 2), (0, 0)))
    masks = (np.random.default_rng(9).random((2, 5, 8, 8)) > 0.5).astype(np.uint8)
    valid = jnp.array([[True] * 3 + [False] * 2, [True] + [False] * 4])
    targets = DetectionTargets(boxes, jnp.array([[1, 3, 0, 0, 0], [2] * 5]), valid, jnp.asarray(masks), boxes)
    return maps, inputs, jnp.array([[64, 64], [48, 40]]), targets


@pytest.mark.slow
def test_order_of_objects_and_the_canvas_change_nothing(complete, assert_close):
    """With all boxes drawn; what is drawn else depends on the order of rows."""
    maps, images, size, targets = small_scene(np.random.default_rng(5))
    keys = jax.random.split(jax.random.key(3))
    (loss, terms), _, found = complete(maps, images, size, targets, keys)
    assert all(terms[name] > 0 for name in ("objectness", "proposal", "class", "box", "mask"))
    assert found.valid.sum() > 20
    order = jnp.array([4, 2, 0, 3, 1])
    other = jax.tree.map(lambda x: x[:, order], targets)
    assert_close(complete(maps, images, size, other, keys)[0], (loss, terms), 1e-5)
    maps, images, _, _ = small_scene(np.random.default_rng(5), canvas=(192, 256))
    wide, _, again = complete(maps, images, size, targets, keys)
    assert_close(wide, (loss, terms), 1e-5)
    assert_close(again, found, 1e-5)


@pytest.mark.slow
def test_images_are_seen_one_by_one_as_together(complete, assert_close):
    maps, images, size, targets = small_scene(np.random.default_rng(6))
    keys = jax.random.split(jax.random.key(4))
    _, together, found = complete(maps, images, size, targets, keys)
    for i in range(2):
        rows = jax.tree.map(lambda x, i=i: x[i : i + 1], (maps, images, size, targets, keys))
        _, samples, alone = complete(*rows)
        assert_close((samples, alone), jax.tree.map(lambda x, i=i: x[i : i + 1], (together, found)), 1e-5)
    inside = found.boxes[1][found.valid[1]]
    assert len(inside)
    assert inside[:, 2].max() <= 40
    assert inside[:, 3].max() <= 48


@pytest.mark.slow
def test_objects_that_do_not_fit(complete, assert_close):
    """Cut off at the image, left out without area, more than are drawn; and what must not pass in silence."""
    maps, images, size, targets = small_scene(np.random.default_rng(7))
    keys = jax.random.split(jax.random.key(5))

    def first(*boxes):
        rows = targets.boxes.at[0, :3].set(jnp.array(boxes))
        return complete(maps, images, size, targets._replace(boxes=rows), keys)[0]

    inside = first([10, 10, 30, 30], [0, 40, 20, 64], [50, 0, 64, 20])
    assert_close(first([10, 10, 30, 30], [-30, 40, 20, 99], [50, -9, 1e4, 20]), inside, 1e-6)
    kept = targets.valid.at[0, 1:].set(False)
    alone = complete(maps, images, size, targets._replace(valid=kept), keys)[0]
    assert_close(first([10, 10, 30, 30], [20, 20, 20, 40], [64, 70, 90, 90]), alone, 1e-6)
    assert_close(first([10, 10, 30, 30], [40, 40, 20, 20], [-5, -5, 0, 9]), alone, 1e-6)
    assert np.isnan(first([10, 10, 30, 30], [20, 20, np.nan, 40], [64, 70, 90, 90])[0])
