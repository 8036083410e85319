"""Host batches -> arrays on the device, prepared by one background thread."""

import queue
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax


class DeviceFeed:
    """Iterator over the batches of ``iterator`` as global jax arrays, up to ``depth`` of them ahead.

    ``wait_seconds`` adds up how long ``next`` has waited for data. An error of the iterator is raised from ``next``.
    ``close`` (or leaving the ``with`` block) ends the thread and closes the iterator.
    """

    def __init__(self, iterator: Iterator, sharding: jax.sharding.Sharding, depth: int = 2):
        if depth < 1:
            raise ValueError(f"depth={depth}; expected at least one batch ahead")
        self.wait_seconds = 0.0
        self._ready: queue.Queue = queue.Queue(depth)
        self._stop = threading.Event()
        # The thread must not hold the feed itself, or a forgotten feed would never be collected and stopped.
        arguments = (iterator, sharding, self._ready, self._stop)
        self._thread = threading.Thread(target=_produce, args=arguments, name="eqvision-feed", daemon=True)
        weakref.finalize(self, _release, self._ready, self._stop)
        self._thread.start()

    def __iter__(self) -> "DeviceFeed":
        return self

    def __next__(self) -> Any:
        if self._stop.is_set():
            raise StopIteration
        start = time.perf_counter()
        item = self._ready.get()
        self.wait_seconds += time.perf_counter() - start
        if not isinstance(item, _End):
            return item
        self.close()
        if item.error is not None:
            raise item.error
        raise StopIteration

    def close(self) -> None:
        """Stop reading ahead, and return when the thread has ended. Closing twice is fine."""
        _release(self._ready, self._stop)
        self._thread.join()

    def __enter__(self) -> "DeviceFeed":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def device_feed(iterator: Iterator, sharding: jax.sharding.Sharding, depth: int = 2) -> DeviceFeed:
    """Batches of numpy leaves -> the same batches as jax arrays; see ``DeviceFeed``.

    Each host brings its own rows; the arrays are global, laid out by ``sharding`` over the leading axis.
    """
    return DeviceFeed(iterator, sharding, depth)


class _End(NamedTuple):
    error: BaseException | None


def _produce(iterator: Iterator, sharding: jax.sharding.Sharding, ready: queue.Queue, stop: threading.Event) -> None:
    try:
        _send_all(iterator, sharding, ready, stop)
        end = _End(None)
    except BaseException as error:  # handed to the consumer, whatever it is
        if stop.is_set():  # nobody is listening any more
            raise
        end = _End(error)
    if not stop.is_set():
        ready.put(end)


def _send_all(iterator: Iterator, sharding: jax.sharding.Sharding, ready: queue.Queue, stop: threading.Event) -> None:
    try:
        for batch in iterator:
            # Asked before and after: once stopped, the queue has room for one more batch and nobody empties it.
            if stop.is_set():
                return
            ready.put(jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch))
            if stop.is_set():
                return
    finally:
        close = getattr(iterator, "close", None)
        if close is not None:
            close()


def _release(ready: queue.Queue, stop: threading.Event) -> None:
    stop.set()
    while True:  # a thread blocked on a full queue gets room for its last batch
        try:
            ready.get_nowait()
        except queue.Empty:
            return
