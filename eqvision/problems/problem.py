"""What the loop needs to know of a kind of work. Everything else in the loop is the same for all."""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from eqvision.keys import StepKeys
from eqvision.run_folder import Row, RunFolder

Counts = Any  # a pytree of scalars: what a loss is divided by


@runtime_checkable
class Problem(Protocol):
    """Data, model, loss and evaluation of one run. A batch is a NamedTuple with ``indices`` and ``weights``."""

    @property
    def source(self) -> Any:
        """What is trained on."""
        ...

    @property
    def test_source(self) -> Any:
        """What is evaluated."""
        ...

    @property
    def num_classes(self) -> int: ...

    @property
    def headline(self) -> str:
        """The metric that sums up an evaluation."""
        ...

    def build(self) -> tuple[Any, eqx.nn.State]:
        """The model as it is before step 0."""
        ...

    def forward_macs(self) -> int:
        """Multiply-adds of the model for one image; nothing is run."""
        ...

    def teacher(self, mesh: Mesh) -> Any:
        """Another model to learn from, on every device, or None."""
        ...

    def stream(self, start_step: int) -> Iterator[Any]:
        """This process's rows of every training batch from ``start_step`` on."""
        ...

    def counts(self, batch: Any) -> Counts:
        """Sums over the rows of a batch that tell what its loss is divided by. They do not depend on the model.

        The step adds them up over all devices and all parts of an accumulated batch before any loss is computed, so
        that terms with different denominators add up to the same on one device and on many.
        """
        ...

    def loss(
        self, model: Any, stats: eqx.nn.State, batch: Any, keys: StepKeys, counts: Counts, teacher: Any
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]], eqx.nn.State]:
        """These rows' share of the loss of the whole batch, whose ``counts`` are given; its share of each term to be
        logged, by name; and the new statistics."""
        ...

    def evaluator(self, mesh: Mesh) -> Any:
        """``(model, stats, stop=...) -> Evaluation`` of the test split; compiled once."""
        ...

    @property
    def late_metrics(self) -> bool:
        """Whether ``more_metrics`` gives any at some time."""
        ...

    def more_metrics(
        self, model: Any, stats: eqx.nn.State, number: int, last: bool, folder: RunFolder, mesh: Mesh
    ) -> dict:
        """Metrics that are measured less often than ``evaluator``'s, if they are due after step ``number``."""
        ...

    def report(self, folder: RunFolder, rows: list[Row], evaluation: Any) -> None:
        """What people look at when the run has ended."""
        ...
