"""Objects and panoptic segments from what DETR says, by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from eqvision.detectors import decode_sigmoid, decode_softmax, panoptic_segments
from eqvision.types import SetPredictions


def test_decode_softmax_drops_no_object_and_orders():
    logits = np.log([[[0.1, 0.2, 0.7], [0.5, 0.3, 0.2]], [[0.25, 0.75, 1e-9], [0.3, 0.3, 0.4]]]).astype(np.float32)
    boxes = np.array([[[0.5, 0.5, 1.0, 0.5], [0.25, 0.75, 0.5, 0.5]], [[0.5, 0.5, 1.2, 1.0], [0, 0, 0, 0]]], np.float32)
    predictions = SetPredictions(jnp.stack([jnp.zeros_like(logits), logits]), jnp.stack([jnp.zeros_like(boxes), boxes]))
    found = decode_softmax(predictions, jnp.array([[20, 40], [10, 10]]))
    np.testing.assert_allclose(found.scores, [[0.5, 0.2], [0.75, 0.3]], rtol=1e-5)
    np.testing.assert_array_equal(found.labels, [[0, 1], [1, 0]])
    expected = [[[0, 10, 20, 20], [0, 5, 40, 15]], [[-1, 0, 11, 10], [0, 0, 0, 0]]]
    np.testing.assert_allclose(found.boxes, expected, atol=1e-5)  # and not clipped
    assert found.valid.all()
    assert found.masks is None


def test_decode_softmax_orders_masks_too():
    logits = jnp.array([[[[0.0, 5.0], [9.0, 0.0]]]])
    masks = jnp.arange(2.0)[None, :, None, None] * jnp.ones((1, 2, 3, 4))
    found = decode_softmax(SetPredictions(logits, jnp.zeros((1, 1, 2, 4)), masks=masks), jnp.ones((1, 2), jnp.int32))
    np.testing.assert_array_equal(found.masks[0, :, 0, 0], [1, 0])


def test_decode_sigmoid_takes_pairs_of_query_and_class():
    logits = jnp.array([[[[3.0, 2.0, -9.0], [1.0, -1.0, 2.5]]]])
    boxes = jnp.array([[[[0.5, 0.5, 1.0, 1.0], [0.25, 0.25, 0.5, 0.5]]]])
    found = decode_sigmoid(SetPredictions(logits, boxes), jnp.array([[10, 20]]), count=4)
    np.testing.assert_allclose(found.scores[0], 1 / (1 + np.exp(-np.array([3, 2.5, 2, 1]))), rtol=1e-5)
    np.testing.assert_array_equal(found.labels, [[0, 2, 1, 0]])
    whole, corner = [0, 0, 20, 10], [0, 0, 10, 5]
    np.testing.assert_allclose(found.boxes[0], [whole, corner, whole, corner], atol=1e-5)
    assert decode_sigmoid(SetPredictions(logits, boxes), jnp.array([[10, 20]])).scores.shape == (1, 6)


# Panoptic segments, by hand


THINGS = np.array([True, True, False])


def logits_for(labels, strength=9.0):
    """Rows sure of a class; 3 is no object."""
    return strength * np.eye(4, dtype=np.float32)[labels]


def segments(labels, masks, **options):
    masks = np.asarray(masks, np.float32)
    size = masks.shape[1:]
    given = {"padded": size, "size": size, "target_size": size, **options}
    return panoptic_segments(logits_for(labels), masks, THINGS, **given)


def blocks(*columns, height=3, width=8):
    """A mask for each pair of columns: 5 inside, -5 outside."""
    masks = np.full((len(columns), height, width), -5, np.float32)
    for mask, (first, last) in zip(masks, columns, strict=True):
        mask[:, first:last] = 5
    return masks


def test_pixels_go_to_the_strongest_mask_and_no_object_is_left_out():
    found = segments([0, 3, 1], blocks((0, 3), (0, 8), (3, 8)))
    np.testing.assert_array_equal(found.ids, [[0, 0, 0, 1, 1, 1, 1, 1]] * 3)
    np.testing.assert_array_equal(found.labels, [0, 1])
    np.testing.assert_array_equal(found.areas, [9, 15])
    assert found.scores == pytest.approx([np.exp(9) / (np.exp(9) + 3)] * 2)


def test_unsure_queries_are_left_out():
    logits = np.concatenate([logits_for([0]), logits_for([1], strength=2.5)])  # 0.80
    found = panoptic_segments(logits, blocks((0, 4), (4, 8)), THINGS, padded=(3, 8), size=(3, 8), target_size=(3, 8))
    np.testing.assert_array_equal(found.labels, [0])
    assert (found.ids == 0).all()


def test_equal_stuff_is_one_segment_and_equal_things_are_two():
    stuff = segments([2, 0, 2], blocks((0, 2), (2, 5), (5, 8)))
    np.testing.assert_array_equal(stuff.labels, [2, 0])
    things = segments([0, 1, 0], blocks((0, 2), (2, 5), (5, 8)))
    np.testing.assert_array_equal(things.labels, [0, 1, 0])
    np.testing.assert_array_equal(things.areas, [6, 9, 9])


def test_small_segments_go_and_their_pixels_are_shared_out_until_none_is_small():
    masks = blocks((0, 4), (4, 8), (0, 0))
    masks[2, 0, 2:6] = 9  # four pixels, two in each
    found = segments([0, 1, 0], masks)
    np.testing.assert_array_equal(found.ids, [[0, 0, 0, 0, 1, 1, 1, 1]] * 3)
    np.testing.assert_array_equal(found.areas, [12, 12])
    masks[2, 1, 2] = 9  # five stay
    np.testing.assert_array_equal(segments([0, 1, 0], masks).areas, [9, 10, 5])


def test_no_segment_at_all():
    found = segments([3, 3], blocks((0, 4), (4, 8)), target_size=(5, 6))
    assert (found.ids == -1).all()
    assert found.ids.shape == (5, 6)
    assert not len(found.labels)
    assert not len(found.areas)


def test_padding_is_cut_off_before_the_image_is_resized():
    masks = blocks((0, 2), (2, 4), height=4, width=8)
    found = segments([0, 1], masks, padded=(8, 16), size=(8, 8), target_size=(4, 12))
    np.testing.assert_array_equal(found.ids, [[0] * 6 + [1] * 6] * 4)


@pytest.mark.parity
def test_masks_are_resized_as_torch_does_it(rng, assert_close):
    import torch

    from eqvision.detectors.panoptic import _resize

    masks = rng.normal(size=(3, 7, 9)).astype(np.float32)
    for size in ((14, 27), (5, 4), (7, 30)):
        theirs = torch.nn.functional.interpolate(torch.tensor(masks)[None], size=size, mode="bilinear")[0]
        assert_close(_resize(masks, size), theirs.numpy(), 1e-5)
