"""What the evaluators show while they work, on standard error."""

import sys
from typing import Any

import jax


def progress_bar(total: int, what: str, unit: str) -> Any:
    """A tqdm bar of ``total`` units, a context manager with ``update(n)``.

    Seen on a terminal only, by one process, and only for work of more than two seconds.
    """
    from tqdm import tqdm

    hidden = True if jax.process_index() else None  # None: where there is no terminal
    return tqdm(total=total, desc=what, unit=unit, delay=2, leave=False, disable=hidden, dynamic_ncols=True)


def note(text: str) -> None:
    """A line that stays, from one process."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)
