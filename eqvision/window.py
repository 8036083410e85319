"""The steps since the last row of the log, and what is said of a step that was not finite."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax
import numpy as np
import optax
from jaxtyping import Array, Float, Int

WORDS = {"grad_norm": "norm of the gradient"}


class DivergedError(RuntimeError):
    """The loss or its gradient is not finite."""


@runtime_checkable
class Described(Protocol):
    """A source of any kind of work: it names its examples."""

    def describe(self, index: int) -> str: ...


@dataclass(frozen=True)
class RunFacts:
    """What a row or a message needs to know of the run."""

    source: Described
    schedule: optax.Schedule
    per_epoch: int
    folder: Path

    def learning_rate(self, step: int) -> float:
        """The rate that step used: optax counts updates from 0, and the log counts them from 1."""
        return np.asarray(self.schedule(step - 1)).item()


class Window:
    """Losses and gradient norms of the steps since the last row.

    They stay on the device until the row is written and are fetched together, so that steps do not wait. ``values`` are
    those that a checkpoint in the middle of a window brought along.
    """

    def __init__(self, facts: RunFacts, values: list[list[float]]):
        self._facts = facts
        self._values = list(values)
        self._names: list[str] = []
        self._logs: list[list[Float[Array, ""]]] = []
        self._indices: list[Int[Array, " b"]] = []

    def add(self, log: dict[str, Float[Array, ""]], indices: Int[Array, " b"]) -> None:
        """``log`` has the same names in every step: ``loss``, ``grad_norm``, and terms of the loss."""
        self._names = list(log)
        self._logs.append(list(log.values()))
        self._indices.append(indices)

    def fetch(self, last: int) -> list[list[float]]:
        """All values so far. Raises DivergedError, naming the first step whose loss or gradient is not finite."""
        logs = [[float(value) for value in values] for values in jax.device_get(self._logs)]
        first = last - len(logs) + 1
        for offset, values in enumerate(logs):
            # Of the gradient too: a finite loss may leave NaN parameters, which must not become a checkpoint.
            for name, value in zip(self._names, values, strict=True):
                if not np.isfinite(value):
                    what = f"the {WORDS.get(name, name)} is {value}"
                    raise self._diverged(first + offset, what, self._indices[offset])
        self._values += logs
        self._logs, self._indices = [], []
        return self._values

    def flush(self, last: int) -> dict[str, float]:
        """Means over the window, which begins anew. Raises DivergedError as ``fetch``."""
        columns = zip(*self.fetch(last), strict=True)
        self._values = []
        means = {f"train/{name}": float(np.mean(column)) for name, column in zip(self._names, columns, strict=True)}
        return {
            **means,
            "train/learning_rate": self._facts.learning_rate(last),
            "train/epoch": last / self._facts.per_epoch,
        }

    def _diverged(self, step: int, what: str, indices: Int[Array, " b"]) -> DivergedError:
        rate = self._facts.learning_rate(step)
        rows = np.concatenate([np.asarray(shard.data) for shard in indices.addressable_shards]).tolist()
        names = [self._facts.source.describe(index) for index in rows[:3]]
        report = self._facts.folder / f"diverged-{jax.process_index()}.json"
        report.write_text(json.dumps({"step": step, "what": what, "learning_rate": rate, "indices": rows}, indent=2))
        return DivergedError(
            f"{what} at step {step} (learning rate {rate:.3g}); nothing after it was saved.\n"
            f"Examples of the batch, by index in the training data: {rows}\n"
            f"The first are: {'; '.join(names)}\n"
            f"They are written to {report}; to see the step again: eqvision replay {self._facts.folder} --step {step}\n"
            "Lower --optimizer.learning-rate, lengthen --schedule.warmup-steps, or set --optimizer.clip-norm 1; "
            "start again in another --out, or from the last checkpoint with the same options."
        )
