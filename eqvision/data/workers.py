"""Batches made by other processes, in the same order and with the same content as in this one.

Threads are the default: the decoders release the interpreter's lock, and nothing has to be started or copied.
Processes pay off on hosts with many cores. Their usual traps, and what is done about each:

- Workers that outlive a killed trainer: every worker waits for its parent's end and ends with it.
- Shared memory left behind: batches travel through anonymous memory, which has no name in ``/dev/shm`` and goes when
  the last process does. Where ``/dev/shm`` is small (containers), it lies in the folder for temporary files.
- Scripts that run twice: ``__main__`` is not imported in the workers, so that no guard is needed; its functions and
  classes travel by value.
- Accelerators: JAX is told in the workers to use the processor alone, so none of them takes accelerator memory.
- Ctrl-C and SIGTERM, which terminals and schedulers send to whole groups: workers leave them to the trainer.
"""

import contextlib
import ctypes
import logging
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing.context import SpawnProcess
from multiprocessing.util import Finalize
from typing import Any, Protocol, runtime_checkable

import numpy as np

from eqvision.data.sources import Source
from eqvision.types import ClassificationBatch

AHEAD = 2  # batches that each worker is asked for in advance: one in work, one ready
_ALIGNMENT = 64  # bytes, of each array in a slot
_PR_SET_PDEATHSIG = 1
_example_in_work: Any = None  # in a worker: shared with the parent


class WorkerDiedError(RuntimeError):
    """A worker process has ended by itself; the message names the example that it worked on."""


@runtime_checkable
class Batches(Protocol):
    """Random access to batches."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> ClassificationBatch: ...


class WorkerBatches:
    """Iterator over ``batches[0]``, ``batches[1]`` ... of ``source`` as made by ``num_workers`` processes in turn.

    ``slot_bytes`` is the shared memory for one batch (there are two per worker); a larger batch travels through a
    pipe, more slowly. What a worker raises is raised from ``next``; WorkerDiedError where it has ended (out of
    memory, a crash in a library). The workers run until ``close``, the end of the batches, an error, or the end of
    this process. Raises TypeError for batches that cannot be sent to a process.
    """

    def __init__(self, batches: Batches, source: Source, *, num_workers: int, slot_bytes: int):
        self._source, self._count, self._next = source, len(batches), 0
        self._skipped: set[int] = set()
        payload = _pickled(batches)
        with _main_hidden():
            self._workers = [_Worker(number, payload, slot_bytes) for number in range(num_workers)]
        processes = [worker.process for worker in self._workers]
        # Runs when nobody holds the iterator any more, and before multiprocessing's own end, which waits for children.
        self._stop = Finalize(self, _kill, args=(processes,), exitpriority=10)
        for number in range(min(AHEAD * num_workers, self._count)):
            self._worker_of(number).ask(number)

    def __iter__(self) -> "WorkerBatches":
        return self

    def __next__(self) -> ClassificationBatch:
        if self._next >= self._count or not self._stop.still_active():
            self.close()
            raise StopIteration
        worker = self._worker_of(self._next)
        try:
            batch = worker.answer(self._source)
            self._count_skipped(batch)
        except BaseException:
            self.close()
            raise
        following = self._next + AHEAD * len(self._workers)
        if following < self._count:
            worker.ask(following)
        self._next += 1
        return batch

    def close(self) -> None:
        """End the processes. Closing twice is fine."""
        self._stop()

    def _worker_of(self, number: int) -> "_Worker":
        return self._workers[number % len(self._workers)]

    def _count_skipped(self, batch: ClassificationBatch) -> None:
        """Read corrupt images here once more, so that this process's source logs and counts them."""
        for index in map(int, batch.indices[(batch.weights == 0) & (batch.indices >= 0)]):
            if index not in self._skipped:
                self._skipped.add(index)
                self._source[index]


def note_example(index: int) -> None:
    """Tell the trainer which example is read next, for its message should this worker die. Elsewhere: nothing."""
    if _example_in_work is not None:
        _example_in_work.value = index


# In the trainer


class _Worker:
    """One process, its end of the pipe, and its slots of shared memory, used in turn."""

    def __init__(self, number: int, payload: bytes, slot_bytes: int):
        context = multiprocessing.get_context("spawn")  # a forked child would inherit JAX's threads, half alive
        self._number, self._asked, self._answered = number, 0, 0
        slots = [context.RawArray(ctypes.c_ubyte, max(slot_bytes, 1)) for _ in range(AHEAD)]
        self._slots = [_bytes_of(slot) for slot in slots]
        self._example = context.RawValue(ctypes.c_int64, -1)
        self._pipe, theirs = context.Pipe()
        in_main_thread = threading.current_thread() is threading.main_thread()
        arguments = (theirs, payload, slots, self._example, in_main_thread)
        self.process = context.Process(target=_serve, args=arguments, name=f"eqvision-worker-{number}", daemon=True)
        self.process.start()
        theirs.close()  # so that the pipe ends with the worker

    def ask(self, batch: int) -> None:
        with contextlib.suppress(BrokenPipeError):  # a dead worker is reported where its answer is missed
            self._pipe.send((batch, self._asked % AHEAD))
        self._asked += 1

    def answer(self, source: Source) -> ClassificationBatch:
        try:
            kind, content, sizes = self._pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            raise WorkerDiedError(self._obituary(source)) from error
        slot = self._slots[self._answered % AHEAD]
        self._answered += 1
        if kind == "error":
            raise content
        return pickle.loads(content, buffers=_copies(slot, sizes))

    def _obituary(self, source: Source) -> str:
        self.process.join()
        code, example = self.process.exitcode or 0, self._example.value
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        doing = f"while reading {source.describe(example)} (index {example})" if example >= 0 else "as it started"
        hint = " SIGKILL often means full memory: lower data.num_workers." if code == -signal.SIGKILL else ""
        return f"worker process {self._number} (of data.num_workers) {how} {doing}.{hint} Its own messages are above."


def _pickled(batches: Batches) -> bytes:
    import cloudpickle  # takes lambdas, and what __main__ defines, by value

    try:
        return cloudpickle.dumps(batches)
    except Exception as error:
        raise TypeError(
            f"num_workers > 0 sends source and transform to other processes, and they cannot be pickled: {error}. "
            "Open files and make locks where they are needed instead of keeping them, or use num_workers=0 (threads)"
        ) from error


@contextlib.contextmanager
def _main_hidden() -> Iterator[None]:
    """Keep ``spawn`` from importing the script in the workers, where it would run again (see the top of this file)."""
    main = sys.modules["__main__"]
    kept = {name: main.__dict__[name] for name in ("__spec__", "__file__") if name in main.__dict__}
    main.__dict__.update(dict.fromkeys(kept))
    try:
        yield
    finally:
        main.__dict__.update(kept)


def _kill(processes: list[SpawnProcess]) -> None:
    for process in processes:  # at once: they hold nothing that would need tidying up
        process.kill()
    for process in processes:
        process.join()


def _copies(slot: np.ndarray, sizes: list[int]) -> list[np.ndarray]:
    # Copied, so that the slot is free for the next batch whatever the caller keeps.
    starts = _starts(sizes)
    whole = slot[: starts[-1]].copy()
    return [whole[start : start + size] for start, size in zip(starts, sizes, strict=False)]


def _bytes_of(slot: Any) -> np.ndarray:
    return np.frombuffer(slot, np.uint8)


def _starts(sizes: list[int]) -> list[int]:
    """Where arrays of these bytes begin in a slot; the last number is where the slot's use ends."""
    return [0, *(int(end) for end in np.cumsum([-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]))]


# In the worker


def _serve(
    pipe: multiprocessing.connection.Connection, payload: bytes, slots: list, example: Any, signal_too: bool
) -> None:
    global _example_in_work
    _end_with_parent(signal_too)
    _settle_in()
    _example_in_work = example
    slots = [_bytes_of(slot) for slot in slots]
    batches = None
    while True:
        try:
            number, slot = pipe.recv()
        except EOFError:
            return
        try:
            batches = pickle.loads(payload) if batches is None else batches
            answer = _packed(batches[number], slots[slot])
        except Exception as error:
            answer = ("error", _sendable(error), [])
        pipe.send(answer)


def _end_with_parent(signal_too: bool) -> None:
    """Let this process end when its parent does, however that ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_after, args=(parent.sentinel,), daemon=True).start()
    # The kernel's signal reaches code that never comes back to Python, too. But it follows the thread that started
    # this process, not the process: only the main thread is sure to last.
    if signal_too and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent.pid:  # it died before
            os._exit(1)


def _end_after(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _settle_in() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_platforms", "cpu")
    # Skipped images are reported by the trainer, which counts them.
    logging.getLogger("eqvision").setLevel(logging.ERROR)


def _packed(batch: Any, slot: np.ndarray) -> tuple[str, bytes, list[int]]:
    """The batch with its arrays in the slot, or where they do not fit, with everything inside the pickle."""
    buffers: list[pickle.PickleBuffer] = []
    content = pickle.dumps(batch, protocol=5, buffer_callback=buffers.append)
    arrays = [np.frombuffer(buffer.raw(), np.uint8) for buffer in buffers]
    starts = _starts([array.size for array in arrays])
    if starts[-1] > slot.size:
        return "batch", pickle.dumps(batch, protocol=5), []
    for start, array in zip(starts, arrays, strict=False):
        slot[start : start + array.size] = array
    return "batch", content, [array.size for array in arrays]


def _sendable(error: Exception) -> Exception:
    """The error, with the worker's traceback as a note; a RuntimeError that quotes it where it cannot be pickled."""
    import traceback

    trace = "".join(traceback.format_exception(error))
    try:
        error.add_note(f"In the worker process:\n{trace}")
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"a worker process raised {type(error).__name__}, which cannot be sent on:\n{trace}")
    return error
