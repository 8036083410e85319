"""The progress line of a run: on a terminal one line that moves, elsewhere one line for each log row."""

import sys
import time
from types import TracebackType


class Progress:
    """Step, ETA, loss, examples per second, share of time spent waiting for data, learning rate, memory."""

    def __init__(self, first: int, total: int, batch_size: int):
        from tqdm import tqdm

        self._total, self._batch_size = total, batch_size
        self._start, self._first, self._last = time.perf_counter(), first, first
        self._mark, self._waited = self._start, 0.0
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=first, unit="step", dynamic_ncols=True, disable=not self._terminal)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def update(self, step: int, row: dict[str, float], waited: float) -> dict[str, float]:
        """Show a row of the log, and return it."""
        now = time.perf_counter()
        seconds, steps = now - self._mark, step - self._last
        speed, wait = steps * self._batch_size / seconds, (waited - self._waited) / seconds
        self._mark, self._waited, self._last = now, waited, step
        text = (
            f"loss {row['train/loss']:.4f}  {speed:.0f} examples/s  data wait {wait:.0%}  "
            f"lr {row['train/learning_rate']:.2e}  grad {row['train/grad_norm']:.2f}  {_memory()}"
        )
        if self._terminal:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
        else:
            print(f"step {step}/{self._total}  ETA {self._eta(step, now)}  {text}", file=sys.stderr, flush=True)
        return row

    def note(self, step: int, metrics: dict[str, float], headline: str) -> None:
        """A line that stays: the result of an evaluation. Its time counts in no step."""
        shown = [headline, *(name for name in ("loss",) if name in metrics)]
        self._bar.write(
            f"step {step}: " + "  ".join(f"test/{name} {metrics[name]:.4f}" for name in shown), file=sys.stderr
        )
        self._mark = time.perf_counter()

    def _eta(self, step: int, now: float) -> str:
        left = (now - self._start) / max(1, step - self._first) * (self._total - step)
        return f"{int(left // 60)}:{int(left % 60):02d}"


def _memory() -> str:
    """Peak memory: of the first device where it keeps count, else of this process."""
    import resource

    import jax

    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return f"device {stats['peak_bytes_in_use'] / 2**30:.1f} GiB"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"RSS {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB"
