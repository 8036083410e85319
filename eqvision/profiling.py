"""What a step costs: its memory before the first one runs, its arithmetic, and a trace of chosen steps."""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

REMEDIES = (
    "lower --loop.batch-size, raise --loop.accumulate, recompute activations with --model.remat full (transformers), "
    "or compute with --loop.compute-dtype bfloat16"
)

# Dense bfloat16 FLOP/s of one JAX device (one GPU; one TPU chip), by what its `device_kind` holds. First match counts.
# NVIDIA gives figures with sparsity, which are twice these: data sheets of A100 (312 dense), H100 (SXM 1,979, NVL
# 1,671, PCIe 1,513 sparse), H200 (SXM 1,979, NVL 1,671 sparse), HGX B200 (4,500 sparse), GB200 NVL72 (5,000 sparse).
# TPU: "peak compute per chip (bf16)" of the system architecture pages of cloud.google.com/tpu/docs.
PEAKS = (
    ("A100", 312e12),
    ("H100 PCIE", 756.5e12),
    ("H100 NVL", 835.5e12),
    ("H100", 989.5e12),
    ("H200 NVL", 835.5e12),
    ("H200", 989.5e12),
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("TPU V4", 275e12),
    ("TPU V5 LITE", 197e12),
    ("TPU V5E", 197e12),
    ("TPU V5", 459e12),
    ("TPU V6 LITE", 918e12),
    ("TPU V6E", 918e12),
)


class Memory(NamedTuple):
    """Bytes of a compiled program on one device. ``aliased`` outputs lie in the memory of donated arguments."""

    arguments: int
    outputs: int
    temporaries: int
    aliased: int
    code: int

    @property
    def needed(self) -> int:
        return self.arguments + self.outputs + self.temporaries + self.code - self.aliased


class Cost(NamedTuple):
    """Model FLOPs of a step on the global batch, and the peak FLOP/s of all devices together where it is known."""

    flops: float
    peak: float | None


@runtime_checkable
class Device(Protocol):
    """What is asked of a ``jax.Device``."""

    device_kind: str

    def memory_stats(self) -> dict[str, int] | None: ...


class DeviceMemoryError(RuntimeError):
    """A device has no room for the step."""


def program_memory(compiled: Any) -> Memory | None:
    """Memory of a compiled program (of ``jax.jit`` or ``eqx.filter_jit``); None where the backend does not tell."""
    stats = _program(compiled).memory_analysis()
    if stats is None:
        return None
    return Memory(
        stats.argument_size_in_bytes,
        stats.output_size_in_bytes,
        stats.temp_size_in_bytes,
        stats.alias_size_in_bytes,
        stats.generated_code_size_in_bytes,
    )


def _program(compiled: Any) -> jax.stages.Compiled:
    return compiled if isinstance(compiled, jax.stages.Compiled) else compiled.compiled  # Equinox wraps jax's


def training_flops(forward_macs: int, batch_size: int) -> float:
    """Model FLOPs of one step on the global batch: 3 x forward, two for each multiply-add of one image's forward pass.

    The backward pass has twice the products of the forward pass (Kaplan et al. 2020, section 2.1; Chowdhery et al.
    2022, appendix B); what remat computes again does not count, so that MFU measures useful work.
    """
    return 3.0 * 2.0 * forward_macs * batch_size


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device by JAX's name for it, whatever the run computes in; None if unknown.

    A part of a GPU (MIG) has no figure of its own.
    """
    kind = device_kind.upper()
    return None if "MIG" in kind.split() else next((peak for name, peak in PEAKS if name in kind), None)


def step_cost(forward_macs: int, batch_size: int) -> Cost:
    """What ``Progress`` needs to show model FLOP utilisation; arguments as in ``training_flops``."""
    peak = peak_flops(jax.devices()[0].device_kind)
    return Cost(training_flops(forward_macs, batch_size), None if peak is None else peak * jax.device_count())


def describe_program(compiled: Any, model_flops: float, device: Device) -> list[str]:
    """Lines to print before step 0: memory for each device, arithmetic, and a warning where the memory is too small."""
    memory, lines = program_memory(compiled), []
    if memory is not None:
        available = _available(device, memory)
        room = "available memory unknown" if available is None else f"{size_text(available)} available"
        lines.append(f"memory of the compiled step, per device: {memory_text(memory)}; {room}")
        if available is not None and memory.needed > available:
            lines.append(
                f"warning: the step needs {size_text(memory.needed - available)} more than the device has and will "
                f"probably fail; {REMEDIES}"
            )
    return [*lines, _work_text(_program(compiled), model_flops, device)]


def memory_text(memory: Memory) -> str:
    """The sum and its parts."""
    return (
        f"{size_text(memory.needed)} = {size_text(memory.arguments)} arguments (parameters, optimizer, batch) + "
        f"{size_text(memory.temporaries)} temporaries (activations) + "
        f"{size_text(memory.outputs - memory.aliased)} outputs beyond reused arguments + {size_text(memory.code)} code"
    )


def _available(device: Device, memory: Memory) -> int | None:
    """Bytes that the step may take: the limit, less what is in use beside the step's own arguments."""
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - max(0, stats.get("bytes_in_use", 0) - memory.arguments)


def _work_text(program: jax.stages.Compiled, model_flops: float, device: Device) -> str:
    peak, counted = peak_flops(device.device_kind), program.cost_analysis() or {}
    known = "" if peak is None else f"; peak of {device.device_kind}: {flops_text(peak)}/s (dense bfloat16)"
    traffic = f"; {size_text(counted['bytes accessed'])} read and written" if "bytes accessed" in counted else ""
    own = f"; XLA, which counts a scanned body once: {flops_text(counted['flops'])} per device" + traffic
    return f"arithmetic of a step: {flops_text(model_flops)} (model, 3 x forward)" + own * ("flops" in counted) + known


def size_text(count: int | float) -> str:
    """Bytes in the binary unit that fits: ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def flops_text(count: int | float) -> str:
    """FLOPs in the unit that fits: ``989.5 TFLOP``."""
    for unit in ("", "K", "M", "G", "T"):
        if abs(count) < 1000:
            return f"{count:.1f} {unit}FLOP"
        count /= 1000
    return f"{count:.1f} PFLOP"


# Out of memory


@contextlib.contextmanager
def memory_errors(compiled: Callable[[], Any] | None = None) -> Iterator[None]:
    """Within it, XLA's RESOURCE_EXHAUSTED becomes a DeviceMemoryError with sizes and remedies.

    Put it around compilation and the whole loop: steps run asynchronously, so that the error may come from a later
    line than the step's. ``compiled`` gives the compiled step, or None before it exists; it adds what the step needs.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        program = None if compiled is None else compiled()
        memory = None if program is None else program_memory(program)
        raise DeviceMemoryError(explain_out_of_memory(str(error), memory, jax.local_devices()[0])) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether XLA ran out of memory (and not of something else, such as a quota)."""
    text = str(error)
    return "RESOURCE_EXHAUSTED" in text and "memory" in text.lower()


def explain_out_of_memory(text: str, memory: Memory | None, device: Device) -> str:
    """XLA's text in words: what was asked for, what was free, what the step needs, what to do."""
    lines = [f"{device.device_kind} ran out of memory: {_asked(text)}, {_free(device)}."]
    if memory is not None:
        lines.append(f"The compiled step needs, per device: {memory_text(memory)}.")
    lines.append(f"To make it fit, {REMEDIES}.")
    lines.append(f"XLA said: {text.splitlines()[0][:300]}")
    return "\n".join(lines)


_UNITS = {"": 1, "B": 1, "BYTES": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# "allocate 123 bytes" and "allocate 1.5GiB" of CPU and GPU; "Used 23.4G of 15.5G hbm" of TPU.
_ALLOCATION = re.compile(r"allocat\w+ (?:of )?([\d.]*\d) ?(bytes|[KMGT]?i?B|)", re.IGNORECASE)
_USED = re.compile(r"Used ([\d.]*\d)([KMGT]?) of ([\d.]*\d)([KMGT]?)", re.IGNORECASE)


def _asked(text: str) -> str:
    used, allocation = _USED.search(text), _ALLOCATION.search(text)
    if used:
        return f"the program needs {_bytes(used[1], used[2])} of {_bytes(used[3], used[4])}"
    return f"{_bytes(allocation[1], allocation[2])} more were needed" if allocation else "the size was not reported"


def _bytes(number: str, unit: str) -> str:
    short = unit.upper()
    factor = _UNITS[short] if short in _UNITS else _UNITS[short[0]]
    return size_text(float(number) * factor)


def _free(device: Device) -> str:
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return "and this backend does not report what is free"
    limit = stats["bytes_limit"]
    return f"{size_text(limit - stats.get('bytes_in_use', 0))} of {size_text(limit)} are free now"


# Traces


class Steps(NamedTuple):
    """First and last step, both included, counted from 1 as in metrics.csv."""

    first: int
    last: int


def parse_steps(text: str, total: int) -> Steps:
    """``FIRST:LAST`` as steps of a run of ``total``. Raises ValueError that says what is wrong with it."""
    match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
    if match is None:
        raise ValueError(f"--log.profile {text!r} is no range of steps; expected FIRST:LAST, such as 10:15")
    steps = Steps(int(match[1]), int(match[2]))
    if not 1 <= steps.first <= steps.last:
        raise ValueError(f"--log.profile {text!r}: expected 1 <= FIRST <= LAST (both are traced), such as 10:15")
    if steps.last > total:
        raise ValueError(f"--log.profile {text!r} ends after the run, which has {total} steps")
    return steps


class StepTrace:
    """A trace of the JAX profiler over chosen steps, in ``folder``; does nothing where ``text`` is empty.

    Call ``before`` and ``after`` around each step. Only whole steps are in the trace: it waits for what was dispatched
    before its first step and for the results of its last. ``memory.prof`` beside it tells which lines of code hold the
    device's memory (pprof format). A resumed run traces what is left of the range. Raises as ``parse_steps``.
    """

    def __init__(self, text: str, folder: Path, *, first: int, total: int):
        steps = parse_steps(text, total) if text else Steps(0, -1)
        self._steps = Steps(max(steps.first, first + 1), steps.last)
        self._folder, self._running = folder, False
        self._annotation: jax.profiler.StepTraceAnnotation | None = None
        if text and self._steps.first > self._steps.last and jax.process_index() == 0:
            print(f"--log.profile {text}: these steps lie before the restored step {first}; nothing is traced")

    def before(self, step: int, pending: Any) -> None:
        """Ahead of a step; ``pending`` is what the steps before it are still computing."""
        if not self._steps.first <= step <= self._steps.last:
            return
        if not self._running:
            jax.block_until_ready(pending)
            self._folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
            self._running = True
        self._annotation = jax.profiler.StepTraceAnnotation("train", step_num=step)
        self._annotation.__enter__()

    def after(self, step: int, results: Any) -> None:
        """Behind a step, with its results."""
        self._leave_step()
        if self._running and step == self._steps.last:
            jax.block_until_ready(results)
            jax.profiler.save_device_memory_profile(str(self._folder / f"memory{_process()}.prof"))
            self.close()
            if jax.process_index() == 0:
                steps = f"{self._steps.first}:{self._steps.last}"
                print(f"trace of steps {steps}: {self._folder} (open with xprof or Perfetto)")

    def close(self) -> None:
        """Write the trace if one is running."""
        self._leave_step()
        if self._running:
            self._running = False
            jax.profiler.stop_trace()

    def _leave_step(self) -> None:
        if self._annotation is not None:
            self._annotation.__exit__(None, None, None)
            self._annotation = None

    def __enter__(self) -> "StepTrace":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _process() -> str:
    return f"_{jax.process_index()}" if jax.process_count() > 1 else ""
