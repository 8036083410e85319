"""Orbax's reads, all of them ended before its event loop is closed."""

import asyncio
import contextlib
import warnings
from collections.abc import Iterator


class FinishingLoop(asyncio.SelectorEventLoop):
    """An event loop that waits for its tasks before it closes."""

    def close(self) -> None:
        if not self.is_closed():
            unfinished = asyncio.all_tasks(self)
            if unfinished:
                self.run_until_complete(asyncio.gather(*unfinished, return_exceptions=True))
        super().close()


class FinishingPolicy(asyncio.DefaultEventLoopPolicy):
    """New loops are FinishingLoop."""

    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return FinishingLoop()


@contextlib.contextmanager
def reads_finish() -> Iterator[None]:
    """Where one array cannot be read, let orbax's other reads end.

    Orbax closes its loop over them; they then fail at any later time, in any thread, with pages of text about a closed
    loop that has nothing to do with what runs by then.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # policies, from Python 3.14 on
        before = asyncio.get_event_loop_policy()
        asyncio.set_event_loop_policy(FinishingPolicy())
        try:
            yield
        finally:
            asyncio.set_event_loop_policy(before)
