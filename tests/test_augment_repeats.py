"""Repeated augmentation: which images a batch shows, and that nothing but (seed, position) decides it."""

import collections

import jax
import numpy as np
import pytest
from images import assert_same, numbered, take

from eqvision.data import Arrays, pad_and_crop, train_stream, train_transform
from eqvision.recipes import AugmentConfig


def shift(image, rng):
    return pad_and_crop(image, rng, 3)


def order(n, repeats, batch_size, steps, seed=1):
    stream = train_stream(numbered(n), batch_size=batch_size, seed=seed, num_threads=0, repeats=repeats)
    return np.stack([batch.indices for batch in take(stream, steps)])


@pytest.mark.parametrize("repeats", [2, 3, 6, 12])
def test_each_image_appears_so_often_in_its_batch(repeats):
    for row in order(24, repeats, 12, 8):
        assert set(collections.Counter(row.tolist()).values()) == {repeats}


def test_the_images_are_those_of_the_plain_stream_in_its_order():
    plain = order(23, 1, 4, 30)
    repeated = order(23, 3, 12, 30)
    np.testing.assert_array_equal(repeated, np.tile(plain, (1, 3)))
    # Every image comes once before any comes again, over as many epochs as there are repeats.
    assert sorted(plain.ravel()[:23]) == list(range(23))


def test_copies_lie_apart_so_that_devices_see_different_images():
    for row in order(24, 3, 12, 5):
        for device in row.reshape(4, 3):
            assert len(set(device.tolist())) == 3


def test_every_copy_is_augmented_anew():
    source = numbered(8, (12, 12, 3))
    for batch in take(train_stream(source, batch_size=8, seed=0, transform=shift, num_threads=0, repeats=4), 4):
        for index in set(batch.indices.tolist()):
            assert len({image.tobytes() for image in batch.images[batch.indices == index]}) >= 3
            assert len(set(batch.labels[batch.indices == index].tolist())) == 1


@pytest.mark.parametrize("process_count", [1, 2, 4])
@pytest.mark.parametrize("num_threads", [0, 3])
def test_hosts_threads_and_resume_change_nothing(process_count, num_threads):
    source = numbered()
    options = {"batch_size": 8, "seed": 3, "transform": shift, "repeats": 2}
    one = take(train_stream(source, num_threads=0, **options), 9)[4:]
    hosts = [
        take(
            train_stream(
                source,
                num_threads=num_threads,
                start_step=4,
                process_index=i,
                process_count=process_count,
                **options,
            ),
            5,
        )
        for i in range(process_count)
    ]
    assert_same(one, [jax.tree.map(lambda *rows: np.concatenate(rows), *parts) for parts in zip(*hosts, strict=True)])


def test_one_repeat_is_the_plain_stream():
    options = {"batch_size": 5, "seed": 2, "transform": shift, "num_threads": 0}
    assert_same(take(train_stream(numbered(), **options), 6), take(train_stream(numbered(), repeats=1, **options), 6))


def test_far_resume_needs_no_replay():
    options = {"batch_size": 6, "seed": 0, "num_threads": 0, "repeats": 3}
    (batch,) = take(train_stream(numbered(), start_step=10**9, **options), 1)
    assert set(collections.Counter(batch.indices.tolist()).values()) == {3}


def test_a_batch_larger_than_the_source():
    (batch,) = take(train_stream(numbered(3), batch_size=12, seed=0, num_threads=0, repeats=2), 1)
    assert sorted(batch.indices.tolist()) == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize("repeats", [0, 3, 16])
def test_repeats_must_divide_the_batch(repeats):
    with pytest.raises(ValueError, match=f"repeats={repeats} does not divide batch_size=8 .global.; every image"):
        train_stream(numbered(), batch_size=8, seed=0, repeats=repeats)


def test_a_policy_in_the_stream_names_an_image_it_cannot_take():
    source = Arrays(np.zeros((4, 8, 8, 4), np.uint8), np.zeros(4, np.int32))
    transform = train_transform("none", 8, augment=AugmentConfig(policy="three_augment"))
    stream = train_stream(source, batch_size=4, seed=0, transform=transform, num_threads=0)
    with pytest.raises(ValueError, match="the image has 4 channels") as info:
        next(stream)
    stream.close()
    assert info.value.__notes__[0].startswith("while transforming row")
