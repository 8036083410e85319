"""Detection streams are pure functions of (seed, step); batches hold every object where the transform left it."""

import logging

import jax
import numpy as np
import pytest
from detection_boards import Boards, mixed_sizes
from images import take

from eqvision.data import IMAGENET_MEAN, IMAGENET_STD, device_feed
from eqvision.data.detection import (
    Buckets,
    DetectionSource,
    DetectionTransform,
    coco_buckets,
    detection_eval,
    detection_eval_stream,
    detection_train_stream,
    detr_train,
    normalize_padded,
    one_canvas,
    resized_size,
    smallest_bucket,
)

BUCKETS = Buckets(((32, 32), (48, 32), (32, 48), (48, 48)), window=4)
CANVAS = one_canvas(48)
TRANSFORM = detr_train(scales=(20, 26, 32), longest=46, crop_scales=(30, 36), crop=(18, 30), color_jitter=0.2)


def train(buckets=CANVAS, count=6, number=23, **options):
    options = {"batch_size": 4, "seed": 3, "transform": TRANSFORM, "num_threads": 0, "max_objects": 4} | options
    return take(detection_train_stream(Boards(mixed_sizes(number)), buckets=buckets, **options), count)


def evaluate(source, count=1000, **options):
    options = {"batch_size": 4, "num_threads": 0, "max_objects": 4, "buckets": CANVAS} | options
    return take(detection_eval_stream(source, **options), count)


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        for a, b in zip(jax.tree.leaves(batch), jax.tree.leaves(other), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def joined(parts):
    return [jax.tree.map(lambda *rows: np.concatenate(rows), *part) for part in zip(*parts, strict=True)]


def indices_of(batches):
    return np.concatenate([batch.indices for batch in batches])


# Contents


def test_batch_contents():
    source = Boards(mixed_sizes(9))
    assert isinstance(source, DetectionSource)
    (batch,) = evaluate(source, batch_size=9, masks=True)
    assert batch.images.shape == (9, 48, 48, 3)
    assert batch.targets.masks.shape == (9, 4, 48, 48)
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(batch)]
    assert dtypes == [np.uint8, np.int32, np.int32, np.float32, np.int32, bool, np.uint8, np.float32, np.int32]
    np.testing.assert_array_equal(batch.size, source.sizes)
    np.testing.assert_array_equal(batch.original_size, source.sizes)
    for row, example in enumerate(source[index] for index in range(9)):
        height, width = source.sizes[row]
        np.testing.assert_array_equal(batch.images[row, :height, :width], example.image)
        assert batch.images[row].sum() == example.image.sum(dtype=np.int64)  # zeros elsewhere
        count = len(example.boxes)
        assert batch.targets.valid[row].tolist() == [True] * count + [False] * (4 - count)
        np.testing.assert_array_equal(batch.targets.boxes[row, :count], example.boxes)
        np.testing.assert_array_equal(batch.targets.labels[row, :count], example.labels)
        np.testing.assert_array_equal(batch.targets.masks[row, :count, :height, :width], example.masks)
        assert batch.targets.masks[row].sum() == example.masks.sum()
    assert evaluate(source, count=1)[0].targets.masks is None


def test_training_keeps_the_size_of_the_file_beside_that_of_the_image():
    for batch in train(BUCKETS, count=8):
        np.testing.assert_array_equal(batch.original_size, mixed_sizes(23)[batch.indices])
        assert (batch.size.max(0) <= batch.images.shape[1:3]).all()
        assert (batch.size != batch.original_size).any()


def test_stand_ins_keep_weight_0():
    source = Boards(mixed_sizes(5))
    source.weight[3] = 0.0
    (batch,) = evaluate(source, batch_size=5)
    assert batch.weights.tolist() == [1, 1, 1, 0, 1]
    assert batch.indices.tolist() == [0, 1, 2, 3, 4]


def test_too_many_objects_keep_the_largest_and_warn_once(caplog):
    source = Boards([(30, 30)] * 8)
    stream = detection_eval_stream(source, batch_size=4, buckets=CANVAS, max_objects=2, masks=True, num_threads=0)
    with caplog.at_level(logging.WARNING):
        batches = list(stream)
    assert stream.num_dropped == 2  # images 3 and 7 have three objects each, the later ones larger
    assert batches[0].targets.labels[3].tolist() == [1, 2]
    np.testing.assert_array_equal(batches[0].targets.boxes[3], source[3].boxes[1:])
    np.testing.assert_array_equal(batches[0].targets.masks[3, :, :30, :30], source[3].masks[1:])
    assert [record.message for record in caplog.records] == [
        "board 3 has 3 objects; only the max_objects=2 largest are kept, here and in other images (said once)"
    ]


# Order


@pytest.mark.parametrize("buckets", [CANVAS, BUCKETS], ids=["canvas", "buckets"])
@pytest.mark.parametrize("start", [1, 5, 11])
def test_resume_equals_uninterrupted(buckets, start):
    whole = train(buckets, count=start + 4)
    assert_same(whole[start:], train(buckets, count=4, start_step=start, num_threads=2))


@pytest.mark.parametrize("buckets", [CANVAS, BUCKETS], ids=["canvas", "buckets"])
def test_threads_change_nothing(buckets):
    runs = [train(buckets, count=9, num_threads=threads, masks=True) for threads in (0, 1, 4)]
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])


@pytest.mark.parametrize("buckets", [CANVAS, BUCKETS], ids=["canvas", "buckets"])
def test_two_processes_give_the_rows_of_one(buckets):
    parts = [train(buckets, count=7, process_index=index, process_count=2, start_step=2) for index in (0, 1)]
    assert {len(batch.images) for part in parts for batch in part} == {2}
    assert_same(train(buckets, count=7, start_step=2), joined(parts))
    source, options = Boards(mixed_sizes(13)), {"buckets": buckets, "transform": detection_eval(24, 46)}
    parts = [evaluate(source, process_index=index, process_count=2, **options) for index in (0, 1)]
    assert_same(evaluate(source, **options), joined(parts))


def test_far_resume_needs_no_replay():
    for buckets in (CANVAS, BUCKETS):
        far = {"start_step": 10**9, "count": 2}
        assert_same(train(buckets, **far), train(buckets, num_threads=2, **far))


def test_one_canvas_shows_each_example_once_in_an_epoch():
    order = indices_of(train(count=9, number=9)).reshape(4, 9)
    np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(9), (4, 1)))
    assert len({tuple(row) for row in order}) == 4
    assert (indices_of(train(count=9, number=9, seed=4)).reshape(4, 9) != order).any()


def test_windows_show_each_position_of_the_sequence_once():
    # Windows of 4 batches of 4, three of which are two epochs of 24 examples.
    plain, bucketed = (indices_of(train(buckets, count=12, number=24)) for buckets in (CANVAS, BUCKETS))
    for window in range(3):
        span = slice(16 * window, 16 * window + 16)
        np.testing.assert_array_equal(np.sort(plain[span]), np.sort(bucketed[span]))
    assert (plain != bucketed).any()
    # A window is never longer than an epoch, so that no example can be twice in it.
    small = train(BUCKETS, count=6, number=8)
    np.testing.assert_array_equal(np.sort(indices_of(small).reshape(6, 4)[:2].ravel()), np.arange(8))


def test_batches_take_the_smallest_bucket_that_holds_them():
    plain = detr_train(scales=(20, 26, 32), longest=46, crop_probability=0)
    batches = train(Buckets(BUCKETS.sizes, window=16), count=64, number=300, transform=plain)
    mixed = 0
    for batch in batches:
        shape = batch.images.shape[1:3]
        assert smallest_bucket(BUCKETS, tuple(batch.size.max(0).tolist())) == shape
        mixed += len({smallest_bucket(BUCKETS, tuple(size)) for size in batch.size.tolist()}) > 1
    shapes = {batch.images.shape[1:3] for batch in batches}
    assert shapes >= {(32, 32), (48, 32), (32, 48)}
    assert 0 < mixed <= 4 * (len(BUCKETS.sizes) - 1)  # in each of the four windows
    first = [batch.images.shape[1:3] for batch in batches[:16]]
    assert first != sorted(first)
    assert first != sorted(first, reverse=True)


def test_augmentation_differs_between_epochs():
    batches = train(count=9, number=9)
    rows = [image.tobytes() for batch in batches for image in batch.images[batch.indices == 5]]
    assert len(rows) == len(set(rows)) == 4


@pytest.mark.parametrize("batch_size", [1, 4, 13, 32])
@pytest.mark.parametrize("buckets", [CANVAS, BUCKETS, None], ids=["canvas", "buckets", "exact"])
def test_evaluation_shows_each_example_once(batch_size, buckets):
    source = Boards(mixed_sizes(13))
    batches = evaluate(source, batch_size=batch_size, buckets=buckets, transform=detection_eval(24, 46), num_threads=2)
    assert {len(batch.images) for batch in batches} == {batch_size}
    indices, weights = indices_of(batches), np.concatenate([batch.weights for batch in batches])
    np.testing.assert_array_equal(np.sort(indices[weights == 1]), np.arange(13))
    assert (indices[weights == 0] == -1).all()
    for batch in batches:
        padding = batch.weights == 0
        assert not batch.images[padding].any()
        assert not batch.targets.valid[padding].any()
        assert (batch.size[padding] == batch.images.shape[1:3]).all()  # not 0: models divide by it
    if buckets is not BUCKETS:
        np.testing.assert_array_equal(indices[:13], np.arange(13))


def test_exact_shapes_have_no_padding():
    source = Boards(mixed_sizes(7))
    for batch in evaluate(source, batch_size=1, buckets=None, transform=detection_eval(24, 46)):
        expected = resized_size(tuple(source.sizes[batch.indices[0]].tolist()), 24, 46)
        assert batch.images.shape[1:3] == tuple(batch.size[0]) == expected


# Errors


def test_an_image_that_fits_nowhere_is_named():
    source = Boards([(20, 20), (20, 60)])
    with pytest.raises(ValueError, match=r"board 1 is 20x60 \(height x width\) after the transform and fits into none"):
        detection_eval_stream(source, batch_size=1, buckets=BUCKETS)
    message = r"board 1 is 20x60 .* does not fit into its batch of 48x48: use a larger bucket, or resize to less"
    with pytest.raises(ValueError, match=message):
        evaluate(source)
    with pytest.raises(ValueError, match=r"board 1 is 20x60 .* fits into none of the buckets \[\(32, 32\), .*larger"):
        take(detection_train_stream(source, batch_size=2, seed=0, buckets=BUCKETS, num_threads=0), 1)


def test_a_failing_transform_names_the_example():
    class Fails:
        def __call__(self, example, rng):
            raise ZeroDivisionError("no")

    stream = detection_eval_stream(Boards([(20, 20)]), batch_size=1, buckets=CANVAS, transform=Fails(), num_threads=1)
    with pytest.raises(ZeroDivisionError) as info:
        next(stream)
    stream.close()
    assert info.value.__notes__[0] == "while transforming board 0"
    with pytest.raises(ValueError, match="the 4 buckets need a transform that tells the size of its result"):
        detection_eval_stream(Boards([(20, 20)]), batch_size=1, buckets=BUCKETS, transform=Fails())
    with pytest.raises(ValueError, match=r"exact shapes need a transform .* use one_canvas\(height, width\) with it"):
        detection_eval_stream(Boards([(20, 20)]), batch_size=1, buckets=None, transform=Fails())


def test_missing_masks_and_other_channels_are_named():
    source = Boards([(20, 20)] * 3, masks=False)
    with pytest.raises(ValueError, match="board 1 has no masks; open the source with masks, or set masks=False"):
        evaluate(source, masks=True)

    def grey_from_1_on(example, rng):
        return example._replace(image=example.image[..., : 1 if example.index else 3])

    with pytest.raises(ValueError, match="board 1 has 1 channels and others have 3"):
        evaluate(source, transform=grey_from_1_on)


def test_a_host_without_examples_has_the_channels_of_the_others():
    def grey(example, rng):
        return example._replace(image=example.image[..., :1])

    (batch,) = evaluate(Boards([(20, 20)]), transform=grey, process_index=1, process_count=2)
    assert batch.images.shape == (2, 48, 48, 1)
    assert batch.weights.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 is global; expected a positive multiple"),
        ({"batch_size": 5, "process_count": 2}, "batch_size=5 is global; .* multiple of process_count=2"),
        ({"process_count": 2, "process_index": 2}, r"process_index=2 is not in 0..1"),
        ({"num_threads": -1}, "num_threads=-1"),
        ({"start_step": -1}, "start_step=-1, seed=3; expected start_step >= 0"),
        ({"seed": 2**32}, "expected start_step >= 0 and 0 <= seed"),
        ({"max_objects": 0}, "max_objects=0; expected the rows for targets of an image"),
        ({"number": 0}, "the source is empty"),
        ({"buckets": Buckets(())}, r"buckets=\[\]; expected \(height, width\) of 1 or more, each once"),
        ({"buckets": Buckets(((4, 4), (4, 4)))}, "expected .* each once"),
        ({"buckets": Buckets(((4, 4),), window=0)}, "window=0; expected the number of batches sorted together"),
        ({"buckets": Buckets(((32, 48), (48, 32)))}, r"none of the buckets .* holds all others.*: add \(48, 48\)"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        train(**options)


def test_buckets_for_coco():
    assert smallest_bucket(coco_buckets(), (800, 1067)) == (800, 1088)
    assert smallest_bucket(coco_buckets(), (1333, 600)) == (1344, 800)
    assert smallest_bucket(coco_buckets(), (480, 640)) == (800, 800)
    assert smallest_bucket(coco_buckets(), (1088, 1088)) == (1344, 1344)
    assert smallest_bucket(coco_buckets(), (1345, 20)) is None
    assert one_canvas(3, 4) == Buckets(((3, 4),), 1)


# On the device


def test_normalized_padding_is_zero(assert_close):
    (batch,) = evaluate(Boards(mixed_sizes(6)), batch_size=6)
    padded = jax.jit(normalize_padded, static_argnums=(2, 3))(batch.images, batch.size, IMAGENET_MEAN, IMAGENET_STD)
    assert padded.images.dtype == np.float32
    np.testing.assert_array_equal(padded.size, batch.size)
    for row, (height, width) in enumerate(batch.size):
        image = np.asarray(padded.images[row])
        expected = (batch.images[row, :height, :width] / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
        assert_close(image[:height, :width], expected, 1e-6)
        assert (image[:height, :width] != 0).all()
        assert not image[height:].any()
        assert not image[:, width:].any()


def test_batches_are_fed_to_devices(mesh):
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    source = Boards(mixed_sizes(10))
    expected = evaluate(source, batch_size=8, masks=True)
    with device_feed(
        detection_eval_stream(source, batch_size=8, buckets=CANVAS, max_objects=4, masks=True), sharding
    ) as feed:
        batches = list(feed)
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(batches))
    assert_same(expected, jax.device_get(batches))


def test_no_transform_changes_nothing():
    example = Boards([(20, 30)] * 4)[3]
    for before, after in zip(example, DetectionTransform()(example, np.random.default_rng(0)), strict=True):
        np.testing.assert_array_equal(before, after)
