"""Worker processes change nothing in the stream, and leave nothing behind however they or their trainer end."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from images import assert_same, numbered, take, truncate, write_folder

from eqvision.data import (
    CorruptImageError,
    ImageFolder,
    WorkerDiedError,
    eval_stream,
    eval_transform,
    pad_and_crop,
    train_stream,
)
from eqvision.data.workers import WorkerBatches
from eqvision.types import ClassificationBatch

TESTS = Path(__file__).resolve().parent


def shift(image, rng):
    return pad_and_crop(image, rng, 1)


def fail_on_row_5(image):
    if image[0, 0, 0] == 5:
        raise OddError(5, "five")
    return image


def die_on_row_5(image):
    if image[0, 0, 0] == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return image


class OddError(Exception):
    """Cannot be pickled: its arguments are not what it was made from."""

    def __init__(self, number, word):
        super().__init__(f"{number} is {word}")


def workers():
    return [p for p in multiprocessing.active_children() if p.name.startswith("eqvision-worker")]


# The stream


def test_workers_change_nothing():
    source, options = numbered(), {"batch_size": 6, "seed": 3, "transform": shift}
    whole = take(train_stream(source, num_threads=3, **options), 12)
    assert_same(whole, take(train_stream(source, num_workers=2, **options), 12))
    assert_same(whole[7:], take(train_stream(source, num_workers=1, start_step=7, **options), 5))
    assert not workers()


@pytest.mark.slow
def test_workers_of_several_hosts_and_repeated_images():
    source, options = numbered(), {"batch_size": 12, "seed": 3, "transform": shift, "repeats": 3, "start_step": 2}
    for host in (0, 1):
        options |= {"process_index": host, "process_count": 2}
        expected = take(train_stream(source, num_threads=0, **options), 5)
        assert_same(expected, take(train_stream(source, num_workers=3, **options), 5))


def test_eval_ends_and_skipped_images_are_counted_here(tmp_path, caplog):
    write_folder(tmp_path, per_class=3)
    truncate(tmp_path / "cat" / "1.jpg")
    options = {"batch_size": 4, "transform": eval_transform("none", 8)}
    expected = list(eval_stream(ImageFolder(tmp_path, on_corrupt="skip"), num_threads=0, **options))
    source = ImageFolder(tmp_path, on_corrupt="skip")
    stream = eval_stream(source, num_workers=2, **options)
    caplog.clear()
    assert_same(expected, list(stream))
    assert source.num_skipped == 1
    assert len([r for r in caplog.records if "skipped (weight 0)" in r.message]) == 1
    assert not workers()
    assert next(stream, None) is None


class Report:
    """Batches that say what the process that makes them looks like."""

    def __len__(self):
        return 3

    def __getitem__(self, number):
        import jax

        ours = [os.environ["JAX_PLATFORMS"] == "cpu", jax.config.jax_platforms == "cpu"]
        unborn = not jax._src.xla_bridge._backends
        ignored = [signal.getsignal(s) == signal.SIG_IGN for s in (signal.SIGINT, signal.SIGTERM)]
        facts = np.array([number, *ours, unborn, *ignored])
        return ClassificationBatch(np.full((2, 3, 3, 1), number, np.uint8), facts, np.ones(2), np.arange(2))


@pytest.mark.parametrize("slot_bytes", [1, 10_000])
def test_worker_process(slot_bytes):
    """With a slot that is too small the batch comes through the pipe."""
    batches = list(WorkerBatches(Report(), numbered(), num_workers=1, slot_bytes=slot_bytes))
    for number, batch in enumerate(batches):
        np.testing.assert_array_equal(batch.labels, [number, 1, 1, 1, 1, 1])
        np.testing.assert_array_equal(batch.images, np.full((2, 3, 3, 1), number))
        batch.images[0] = 9  # a copy of its own, as from threads
    assert len(batches) == 3


def test_the_thread_that_starts_them_may_end():
    made = []
    thread = threading.Thread(target=lambda: made.append(eval_stream(numbered(), batch_size=5, num_workers=1)))
    thread.start()
    thread.join()
    assert len(list(made[0])) == 5


# Errors


def test_an_error_in_a_worker_names_the_example(tmp_path):
    write_folder(tmp_path, per_class=2)
    truncate(tmp_path / "dog" / "1.jpg")
    stream = eval_stream(ImageFolder(tmp_path), batch_size=2, num_workers=1)
    next(stream)
    with pytest.raises(CorruptImageError, match=rf"corrupt image {tmp_path}/dog/1.jpg: .* \(index 3\)") as info:
        next(stream)
    assert "In the worker process:\nTraceback" in info.value.__notes__[-1]
    assert next(stream, None) is None
    assert not workers()


def test_an_error_that_cannot_be_pickled():
    stream = eval_stream(numbered(), batch_size=6, transform=fail_on_row_5, num_workers=1)
    with pytest.raises(RuntimeError, match="a worker process raised OddError, which cannot be sent") as info:
        next(stream)
    assert "while transforming row 5 of arrays" in str(info.value)


def test_a_worker_that_dies():
    stream = eval_stream(numbered(), batch_size=4, transform=die_on_row_5, num_workers=2)
    next(stream)
    with pytest.raises(
        WorkerDiedError,
        match=r"worker process 1 .* was ended by SIGKILL while reading row 5 of arrays \(index 5\)\. "
        r"SIGKILL often means full memory: lower data.num_workers",
    ):
        next(stream)
    assert not workers()


def test_bad_options():
    with pytest.raises(ValueError, match=r"num_workers=-1; expected 0 \(threads read\) or the number of processes"):
        eval_stream(numbered(), batch_size=4, num_workers=-1)
    source = numbered()
    source.name = threading.Lock()
    with pytest.raises(TypeError, match=r"num_workers > 0 sends .* cannot be pickled: .*lock.* num_workers=0"):
        eval_stream(source, batch_size=4, num_workers=1)


# Ends


def test_forgotten_and_closed_streams_end_their_workers():
    stream = train_stream(numbered(), batch_size=4, seed=0, num_workers=1)
    (process,) = workers()
    del stream
    gc.collect()
    assert process.exitcode == -signal.SIGKILL
    stream = train_stream(numbered(), batch_size=4, seed=0, num_workers=1)
    stream.close()
    stream.close()
    assert not workers()
    assert next(stream, None) is None


SCRIPT = f"""
import multiprocessing, sys, time
print("top", __name__, flush=True)
sys.path.insert(0, {str(TESTS)!r})
from images import numbered
from eqvision.data import eval_stream

def stuck(image):
    while image[0, 0, 0] == 7:
        time.sleep(60)
    return image

stream = eval_stream(numbered(), batch_size=4, transform=stuck, num_workers=2)
next(stream)
print("pids", *(child.pid for child in multiprocessing.active_children()), flush=True)
sys.stdin.read()
"""


def start_trainer(folder, *arguments):
    (folder / "trainer.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{folder}"}
    pipe = subprocess.PIPE
    trainer = subprocess.Popen(
        [sys.executable, *arguments], stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment
    )
    lines = [trainer.stdout.readline().split() for _ in range(2)]
    return trainer, lines


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def shared_blocks(pid):
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split(maxsplit=5)[5] for line in maps if "/dev/shm/" in line}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="reads /proc")
@pytest.mark.parametrize("way", [["trainer.py"], ["-m", "trainer"]])
def test_a_killed_trainer_leaves_nothing(tmp_path, monkeypatch, way):
    """One worker hangs in an example, the other waits for work. No guard: the script runs once all the same."""
    monkeypatch.chdir(tmp_path)
    trainer, (top, (_, *pids)) = start_trainer(tmp_path, *way)
    assert top == ["top", "__main__"]
    assert len(pids) == 2
    assert all(map(is_running, pids))
    blocks = set.union(*map(shared_blocks, [trainer.pid, *pids]))
    trainer.kill()
    end = time.monotonic() + 5
    while any(map(is_running, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not [pid for pid in pids if is_running(pid)]
    assert trainer.communicate(timeout=30)[0] == ""  # a worker that ran the script would have printed again
    assert blocks  # batches did travel through shared memory
    assert not [block for block in blocks if os.path.exists(block)]


@pytest.mark.slow
def test_the_end_of_a_trainer_is_quiet(tmp_path):
    trainer, _ = start_trainer(tmp_path, str(tmp_path / "trainer.py"))
    out, errors = trainer.communicate("", timeout=30)
    assert (trainer.returncode, out, errors) == (0, "", "")
