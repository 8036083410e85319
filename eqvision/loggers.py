"""Where a run is seen beside metrics.csv: TensorBoard events, and Weights & Biases where it is asked for.

Neither needs an account or a network, and neither decides whether a run goes on: metrics.csv and metrics.jsonl
hold every number of the training itself. Timings, which differ from run to run, are written here alone.
"""

import importlib
import importlib.util
import io
import os
import secrets
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import UInt8

from eqvision.recipes import RunConfig, to_dict
from eqvision.run_folder import RunFolder

Picture = UInt8[np.ndarray, "h w c"]


@runtime_checkable
class Sink(Protocol):
    """One place that values are written to."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def write_image(self, step: int, name: str, image: Picture) -> None: ...

    def close(self, failed: bool) -> None: ...


class Loggers:
    """Writes the same values to every sink; as a context it closes them, also where the run fails."""

    def __init__(self, sinks: Sequence[Sink]):
        self._sinks = list(sinks)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars of a step; steps come in rising order, and one step may be written in several parts."""
        for sink in self._sinks:
            sink.write(step, values)

    def write_image(self, step: int, name: str, image: Picture) -> None:
        """A picture of 1, 3 or 4 channels."""
        for sink in self._sinks:
            sink.write_image(step, name, image)

    def close(self, failed: bool = False) -> None:
        """Write what is pending. Closing twice is fine."""
        while self._sinks:
            self._sinks.pop().close(failed)

    def __enter__(self) -> "Loggers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=error is not None)


def open_loggers(config: RunConfig, folder: RunFolder, resume_step: int) -> Loggers:
    """The sinks that ``config.log`` asks for, on the first process; no sink on the others.

    ``resume_step`` is the step of the restored checkpoint, 0 for a fresh run: TensorBoard drops the events after it.
    Where tensorboardX is not installed a line says so. Raises ModuleNotFoundError, naming the extra, where
    Weights & Biases is asked for and not installed.
    """
    if jax.process_index() != 0:
        return Loggers([])
    sinks: list[Sink] = []
    if config.log.wandb:  # first, since it may raise
        sinks.append(_Wandb(config, folder))
    if config.log.tensorboard and _has_tensorboard():
        sinks.append(_TensorBoard(folder, resume_step))
    return Loggers(sinks)


def _has_tensorboard() -> bool:
    found = importlib.util.find_spec("tensorboardX") is not None
    if not found:
        _note(
            "no TensorBoard events are written: tensorboardX is not installed (pip install 'eqvision[logging]'); "
            "metrics.csv holds the metrics (--log.no-tensorboard leaves this line out)"
        )
    return found


class _TensorBoard:
    """Event files in RUN/tensorboard, one for each start of the run.

    Every event is on disk when its write returns: a killed run keeps what its checkpoints cover, which the resumed
    run does not write again. (tensorboardX's SummaryWriter leaves events in a queue, also when it is flushed.)
    """

    def __init__(self, folder: RunFolder, resume_step: int):
        from tensorboardX.event_file_writer import EventsWriter

        self._events = importlib.import_module("tensorboardX.proto.event_pb2")
        self._summaries = importlib.import_module("tensorboardX.proto.summary_pb2")
        path = folder.path / "tensorboard"
        path.mkdir(exist_ok=True)
        # TensorBoard reads the files in the order of their names, which begin with the second of their start. The
        # number behind it keeps apart, and in order, starts within one second.
        self._writer = EventsWriter(str(path / "events"), f".{len(list(path.iterdir())):05d}")
        # At this event TensorBoard drops what it has from that step on.
        start = self._events.SessionLog(status=self._events.SessionLog.START)
        self._put(step=resume_step + 1 if resume_step else 0, session_log=start)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        entry = self._summaries.Summary.Value
        self._put(step, [entry(tag=name, simple_value=float(value)) for name, value in values.items()])

    def write_image(self, step: int, name: str, image: Picture) -> None:
        from PIL import Image

        height, width, channels = image.shape
        encoded = io.BytesIO()
        Image.fromarray(image[..., 0] if channels == 1 else image).save(encoded, format="png")
        summary = self._summaries.Summary
        content = summary.Image(
            height=height, width=width, colorspace=channels, encoded_image_string=encoded.getvalue()
        )
        self._put(step, [summary.Value(tag=name, image=content)])

    def _put(self, step: int, values: Sequence[Any] = (), session_log: Any = None) -> None:
        summary = self._summaries.Summary(value=values) if values else None
        event = self._events.Event(step=step, summary=summary, session_log=session_log, wall_time=time.time())
        self._writer.write_event(event)
        self._writer.flush()

    def close(self, failed: bool) -> None:
        del failed
        self._writer.close()


class _Wandb:
    """A Weights & Biases run that keeps its id over restarts (RUN/wandb_id)."""

    def __init__(self, config: RunConfig, folder: RunFolder):
        self._wandb = _import_wandb()
        self._run = _start_wandb(self._wandb, config, folder)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def write_image(self, step: int, name: str, image: Picture) -> None:
        self._run.log({name: self._wandb.Image(image)}, step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=1 if failed else 0)


def _import_wandb() -> Any:
    if importlib.util.find_spec("wandb") is None:
        raise ModuleNotFoundError(
            "--log.wandb needs the package wandb, which is not installed: pip install 'eqvision[wandb]', "
            "or leave --log.wandb out (TensorBoard events and metrics.csv need no account)",
            name="wandb",
        )
    import wandb

    return wandb


def _start_wandb(wandb: Any, config: RunConfig, folder: RunFolder) -> Any:
    """Online where that works, unless WANDB_MODE or `wandb offline` say otherwise."""
    settings = wandb.setup().settings
    mode = os.environ.get("WANDB_MODE") or settings.mode
    if mode != "online":
        return _init_wandb(wandb, config, folder, mode)
    if not _reachable(settings.base_url):
        _note(f"Weights & Biases: {settings.base_url} does not answer; {_OFFLINE}")
        return _init_wandb(wandb, config, folder, "offline")
    try:
        return _init_wandb(wandb, config, folder, "online")
    except wandb.errors.Error as error:  # no account, a rejected key, a server that gives up
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        _note(f"Weights & Biases: {reason}; {_OFFLINE}")
        return _init_wandb(wandb, config, folder, "offline")


_OFFLINE = "WANDB_MODE=offline is chosen, and `wandb sync` uploads the run later"


def _init_wandb(wandb: Any, config: RunConfig, folder: RunFolder, mode: str) -> Any:
    return wandb.init(
        project=config.log.wandb,
        name=folder.path.name,
        id=_wandb_id(folder),
        resume="allow",
        mode=mode,
        dir=str(folder.path),
        config=to_dict(config),
    )


def _wandb_id(folder: RunFolder) -> str:
    """The run's id, made at its first start."""
    file = folder.path / "wandb_id"
    if not file.exists():
        file.write_text(secrets.token_hex(4))
    return file.read_text().strip()


def _reachable(url: str) -> bool:
    """Whether a server answers there, through the proxy of the environment if it names one."""
    try:
        with urllib.request.urlopen(url, timeout=3):
            return True
    except urllib.error.HTTPError:  # it answers, though not with a page
        return True
    except (urllib.error.URLError, OSError, ValueError):
        return False


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
