"""Asked to stop: SIGTERM and Ctrl-C let the run save its state and end; a second one ends it at once."""

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
import numpy as np


class StoppedError(RuntimeError):
    """The run was asked to stop, and saved its state before it did."""


class StopSignals:
    """Within the ``with`` block the first SIGTERM or SIGINT sets ``requested``; the next one acts as it always did."""

    def __init__(self) -> None:
        self.name = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # only there does Python deliver signals
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell sets it for what runs in the background
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    @property
    def requested(self) -> bool:
        return bool(self.name)

    def agreed(self) -> bool:
        """Whether any process was asked; the same answer on all of them. All processes must ask together."""
        if jax.process_count() == 1:
            return self.requested
        from jax.experimental.multihost_utils import process_allgather

        asked = bool(np.any(process_allgather(np.array(self.requested))))
        self.name = self.name or ("a signal to another process" if asked else "")
        return asked

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        print(f"\n{self.name}: saving after this step; once more ends at once", file=sys.stderr, flush=True)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
