"""Streams are pure functions of (seed, position); the feed loses nothing and leaves nothing behind."""

import threading

import jax
import numpy as np
import pytest
from images import assert_same, noise, numbered, take, write_folder
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eqvision.data import (
    Arrays,
    CorruptImageError,
    ImageFolder,
    device_feed,
    eval_stream,
    eval_transform,
    pad_and_crop,
    steps_per_epoch,
    train_stream,
)

# Streams


def shift(image, rng):
    return pad_and_crop(image, rng, 1)


def fail_on_row_5(image, rng):
    if image[0, 0, 0] == 5:
        raise ZeroDivisionError("five")
    return image


def test_batch_contents():
    (batch,) = take(train_stream(numbered(), batch_size=4, seed=0, num_threads=0), 1)
    assert batch.images.shape == (4, 8, 8, 1)
    assert (batch.images.dtype, batch.labels.dtype) == (np.uint8, np.int32)
    assert (batch.weights.dtype, batch.indices.dtype) == (np.float32, np.int32)
    np.testing.assert_array_equal(batch.images[:, 0, 0, 0], batch.labels)
    np.testing.assert_array_equal(batch.indices, batch.labels)
    np.testing.assert_array_equal(batch.weights, 1)
    rows = Arrays(noise((4, 4, 4)), np.eye(4, 3))
    (multi,) = take(train_stream(rows, batch_size=2, seed=0, num_threads=0), 1)
    assert (multi.labels.shape, multi.labels.dtype) == ((2, 3), np.float32)


def test_every_epoch_is_another_permutation():
    n, epochs = 23, 6
    batches = take(train_stream(numbered(n), batch_size=3, seed=1, num_threads=0), n * epochs // 3)
    order = np.concatenate([b.indices for b in batches]).reshape(epochs, n)
    np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(n), (epochs, 1)))
    assert len({tuple(row) for row in order}) == epochs
    (other,) = take(train_stream(numbered(n), batch_size=n, seed=2, num_threads=0), 1)
    assert tuple(other.indices) not in {tuple(row) for row in order}


@pytest.mark.parametrize("start", [1, 7, 8, 40])
@pytest.mark.parametrize("num_threads", [0, 3])
def test_resume_equals_skipping(start, num_threads):
    source, options = numbered(), {"batch_size": 6, "seed": 3, "transform": shift}
    whole = take(train_stream(source, num_threads=0, **options), start + 5)
    resumed = take(train_stream(source, num_threads=num_threads, start_step=start, **options), 5)
    assert_same(whole[start:], resumed)


def test_far_resume_needs_no_replay():
    far = 10**9
    (batch,) = take(train_stream(numbered(), batch_size=4, seed=0, num_threads=0, start_step=far), 1)
    (after,) = take(train_stream(numbered(), batch_size=4, seed=0, num_threads=2, start_step=far), 1)
    assert_same([batch], [after])


def test_threads_change_nothing_and_augmentation_changes_by_epoch():
    source = numbered(12)
    runs = [take(train_stream(source, batch_size=12, seed=0, transform=shift, num_threads=t), 8) for t in (0, 1, 2, 4)]
    for run in runs[1:]:
        assert_same(runs[0], run)
    row_3 = [b.images[b.indices == 3].tobytes() for b in runs[0]]
    assert len(set(row_3)) > 2


@pytest.mark.parametrize("process_count", [2, 4])
def test_hosts_reassemble_the_global_batch(process_count):
    source, options = numbered(), {"batch_size": 8, "num_threads": 0}
    train = {"seed": 5, "transform": shift, "start_step": 2}
    one = take(train_stream(source, **options, **train), 6)
    hosts = [
        take(train_stream(source, process_index=i, process_count=process_count, **options, **train), 6)
        for i in range(process_count)
    ]
    assert_same(one, [jax.tree.map(lambda *rows: np.concatenate(rows), *parts) for parts in zip(*hosts, strict=True)])
    one = take(eval_stream(source, **options), 9)
    hosts = [
        take(eval_stream(source, process_index=i, process_count=process_count, **options), 9)
        for i in range(process_count)
    ]
    assert_same(one, [jax.tree.map(lambda *rows: np.concatenate(rows), *parts) for parts in zip(*hosts, strict=True)])


@pytest.mark.parametrize("batch_size", [1, 5, 23, 64])
def test_eval_counts_each_example_once(batch_size):
    source = numbered()
    batches = take(eval_stream(source, batch_size=batch_size, num_threads=2), 100)
    assert len(batches) == -(-23 // batch_size)
    assert {len(b.images) for b in batches} == {batch_size}
    indices, weights = (np.concatenate([getattr(b, f) for b in batches]) for f in ("indices", "weights"))
    np.testing.assert_array_equal(indices[:23], np.arange(23))
    np.testing.assert_array_equal(weights, (np.arange(len(weights)) < 23).astype(np.float32))
    assert (indices[23:] == -1).all()
    assert not np.concatenate([b.images for b in batches])[23:].any()


def test_eval_pads_after_the_transform():
    source = Arrays(noise((3, 10, 14, 3)), np.eye(3))
    batches = take(eval_stream(source, batch_size=2, transform=eval_transform("none", 6), num_threads=0), 3)
    assert batches[1].images.shape == (2, 6, 6, 3)
    assert batches[1].labels.shape == (2, 3)


def test_steps_per_epoch():
    assert steps_per_epoch(numbered(23), 5) == 4
    assert steps_per_epoch(numbered(23), 64) == 1


def test_images_of_different_shapes_are_named(tmp_path):
    write_folder(tmp_path, classes=("cat",), shape=(20, 24, 3))
    write_folder(tmp_path, classes=("dog",), shape=(9, 24, 3))
    stream = eval_stream(ImageFolder(tmp_path), batch_size=6, num_threads=2)
    with pytest.raises(
        ValueError, match=r"differ in shape: /.*0.jpg is \(20, 24, 3\), /.*0.jpg is \(9, 24, 3\)"
    ) as info:
        next(stream)
    stream.close()
    assert "sparse" not in "".join(info.value.__notes__)  # grain's own guess at the cause would mislead


def test_a_failing_transform_names_the_example():
    stream = train_stream(numbered(), batch_size=23, seed=0, transform=fail_on_row_5, num_threads=1)
    with pytest.raises(ZeroDivisionError) as info:
        next(stream)
    stream.close()
    assert info.value.__notes__[0] == "while transforming row 5 of arrays"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 is global; expected a positive multiple"),
        (
            {"batch_size": 5, "process_count": 2},
            "batch_size=5 is global; expected a positive multiple of process_count=2",
        ),
        ({"batch_size": 4, "process_count": 2, "process_index": 2}, r"process_index=2 is not in 0..1"),
        ({"batch_size": 4, "num_threads": -1}, "num_threads=-1"),
        ({"batch_size": 4, "start_step": -1}, "start_step=-1, seed=0; expected start_step >= 0"),
        ({"batch_size": 4, "seed": 2**32}, "expected start_step >= 0 and 0 <= seed"),
    ],
)
def test_stream_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        train_stream(numbered(), **{"seed": 0, **options})


def test_empty_source():
    source = numbered()
    source.images, source.labels = source.images[:0], source.labels[:0]
    with pytest.raises(ValueError, match="the source is empty"):
        eval_stream(source, batch_size=2)


# Feeding the device


@pytest.fixture
def sharding():
    return NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))


def feed_threads():
    return [t for t in threading.enumerate() if t.name == "eqvision-feed"]


def test_feed_gives_the_same_batches_on_the_device(sharding):
    expected = take(eval_stream(numbered(), batch_size=8, num_threads=0), 9)
    with device_feed(eval_stream(numbered(), batch_size=8, num_threads=2), sharding) as feed:
        batches = list(feed)
        assert next(feed, None) is None
    assert all(leaf.sharding == sharding for batch in batches for leaf in batch)
    assert_same(expected, jax.device_get(batches))
    assert feed.wait_seconds > 0
    assert not feed_threads()


class Counted:
    """Endless batches that count themselves and remember being closed."""

    def __init__(self):
        self.produced, self.closed = 0, False
        self.filled = threading.Event()

    def __iter__(self):
        return self

    def __next__(self):
        self.produced += 1
        if self.produced == 4:  # two are waiting, one is held by the thread: it asks for no more than this
            self.filled.set()
        return np.full((8,), self.produced)

    def close(self):
        self.closed = True


def test_feed_reads_ahead_only_so_far_and_closes(sharding):
    source = Counted()
    feed = device_feed(source, sharding, depth=2)
    assert next(feed)[0] == 1
    assert source.filled.wait(30)
    assert source.produced == 4
    feed.close()
    feed.close()
    assert source.closed
    assert not feed_threads()
    assert next(feed, None) is None


def test_forgotten_feed_ends_its_thread(sharding):
    feed = device_feed(Counted(), sharding)
    next(feed)
    (thread,) = feed_threads()
    del feed
    thread.join(30)
    assert not thread.is_alive()


class FailsToClose(Counted):
    def __next__(self):
        raise StopIteration

    def close(self):
        raise RuntimeError("cannot close")


def test_feed_raises_the_error_of_closing_the_iterator(sharding):
    feed = device_feed(FailsToClose(), sharding)
    with pytest.raises(RuntimeError, match="cannot close"):
        next(feed)
    assert not feed_threads()


def test_feed_raises_the_error_of_its_thread(sharding):
    def failing():
        yield np.zeros(8)
        raise CorruptImageError("corrupt image /x.jpg")

    feed = device_feed(failing(), sharding)
    next(feed)
    with pytest.raises(CorruptImageError, match=r"corrupt image /x.jpg"):
        next(feed)
    assert next(feed, None) is None
    assert not feed_threads()
    with pytest.raises(ValueError, match="depth=0"):
        device_feed(failing(), sharding, depth=0)
