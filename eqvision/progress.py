"""The progress line of a run: on a terminal one line that moves, elsewhere one line for each log row."""

import sys
import time
from types import TracebackType

from eqvision.profiling import Cost


class Progress:
    """Step, share done, ETA, loss, examples per second, share of time spent waiting for data, learning rate, gradient
    norm, memory, and model FLOP utilisation where ``cost`` has a peak. Only the first process shows it.

    ``timing`` holds what the last ``update`` measured, by names for loggers. It belongs to no row of metrics.csv, which
    is equal for equal runs. Make it after the step is compiled, or the first row's times hold the compilation;
    ``waited`` is what the feed has waited for data until then.
    """

    def __init__(self, first: int, total: int, batch_size: int, cost: Cost | None = None, waited: float = 0.0):
        import jax
        from tqdm import tqdm

        self._total, self._batch_size, self._cost = total, batch_size, cost
        self._start, self._first, self._last = time.perf_counter(), first, first
        self._mark, self._waited = self._start, waited
        self._shown = jax.process_index() == 0
        self._terminal = sys.stderr.isatty()
        disable = not (self._terminal and self._shown)
        self._bar = tqdm(
            total=total, initial=first, unit="step", dynamic_ncols=True, disable=disable, bar_format=_BAR, leave=True
        )
        self.timing: dict[str, float] = {}

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def update(self, step: int, row: dict[str, float], waited: float) -> dict[str, float]:
        """Show a row of the log, and return it. ``waited`` are all seconds that the feed has waited for data so far."""
        now = time.perf_counter()
        self.timing = self._measure(now - self._mark, step - self._last, waited - self._waited)
        self._mark, self._waited, self._last = now, waited, step
        if self._shown and self._terminal:
            self._bar.set_postfix_str(self._text(row), refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._shown:
            self._print(f"{self._place(step, now)}  {self._text(row)}")
        return row

    def note(self, step: int, metrics: dict[str, float], headline: str) -> None:
        """A line that stays: the result of an evaluation. Its time counts in no step."""
        shown = [headline, *(name for name in ("loss",) if name in metrics)]
        text = f"step {step}: " + "  ".join(f"test/{name} {metrics[name]:.4f}" for name in shown)
        if self._shown:
            self._bar.write(text, file=sys.stderr)
        self._mark = time.perf_counter()

    def _measure(self, seconds: float, steps: int, waited: float) -> dict[str, float]:
        seconds_per_step = seconds / max(1, steps)
        timing = {
            "time/step_seconds": seconds_per_step,
            "time/examples_per_second": self._batch_size / seconds_per_step,
            "time/data_wait": waited / seconds,
            **_memory(),
        }
        if self._cost is not None and self._cost.peak is not None:
            timing["time/mfu"] = self._cost.flops / (seconds_per_step * self._cost.peak)
        return timing

    def _text(self, row: dict[str, float]) -> str:
        timing = self.timing
        device, host = timing.get("memory/device_gib"), timing["memory/host_gib"]
        parts = [
            f"loss {row['train/loss']:.4f}",
            f"{timing['time/examples_per_second']:.0f} examples/s",
            f"data wait {timing['time/data_wait']:.0%}",
            f"lr {row['train/learning_rate']:.2e}",
            f"grad {row['train/grad_norm']:.2f}",
            f"RSS {host:.1f} GiB" if device is None else f"device {device:.1f} GiB",
        ]
        return "  ".join([*parts, f"MFU {timing['time/mfu']:.1%}"] if "time/mfu" in timing else parts)

    def _place(self, step: int, now: float) -> str:
        left = (now - self._start) / max(1, step - self._first) * (self._total - step)
        return f"step {step}/{self._total}  {step / self._total:.0%}  ETA {duration_text(left)}"

    def _print(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


_BAR = "{n_fmt}/{total_fmt} {percentage:3.0f}% |{bar:16}| ETA {remaining}{postfix}"  # tqdm's own order hides the ETA


def duration_text(seconds: int | float) -> str:
    """``1:05`` or ``2:03:04``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _memory() -> dict[str, float]:
    """Peak memory in GiB: of this process, and of the fullest local device where devices keep count."""
    import resource

    import jax

    unit = 1 if sys.platform == "darwin" else 1024
    memory = {"memory/host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each]
    return memory | ({"memory/device_gib": max(peaks) / 2**30} if peaks else {})
