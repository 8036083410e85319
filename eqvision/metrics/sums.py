"""Metrics that are sums: what they share, and the weighted mean that most of them are."""

import operator
from collections.abc import Mapping
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from eqvision.losses.reduce import weighted_sums
from eqvision.ops.collectives import DATA_AXES, global_sum

T = TypeVar("T")  # a metric, or a dict of metrics


@runtime_checkable
class Metric(Protocol):
    """What ``compute`` needs of a metric, whether its sums live on the device or in numpy."""

    def compute(self) -> float | dict[str, float]: ...


class Mean(NamedTuple):
    """Weighted mean of one value per example: the loss, the accuracy, an error."""

    total: Float[Array, ""]
    weight: Float[Array, ""]

    @classmethod
    def of(cls, values: Float[Array, " b"], weights: Float[Array, " b"]) -> "Mean":
        """Sums of one batch; rows of weight 0 add nothing even if their value is NaN."""
        return cls(*weighted_sums(values, weights, axis_names=()))

    def compute(self) -> float:
        """The mean; NaN where no example was counted."""
        return ratio(float(self.total), float(self.weight))


def merge(a: T, b: T) -> T:
    """Sums of two disjoint sets of examples: one metric, or a dict of them with equal keys."""
    return jax.tree.map(operator.add, a, b)


def all_reduce(metrics: T, axis_names: tuple[str, ...] = DATA_AXES) -> T:
    """Sums over the devices that hold different examples; inside ``shard_map``, changes nothing elsewhere."""
    return jax.tree.map(lambda leaf: global_sum(leaf, axis_names), metrics)


def zeros_like(metrics: T) -> T:
    """The sums of no example, from sums or from their ``jax.eval_shape``."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), metrics)


def compute(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Host values by name; a metric of several values gives ``name/part`` for each."""
    results: dict[str, float] = {}
    for name, metric in metrics.items():
        value = metric.compute()
        if isinstance(value, dict):
            results.update({f"{name}/{part}": number for part, number in value.items()})
        else:
            results[name] = value
    return results


def ratio(total: float, weight: float) -> float:
    """Quotient on the host, NaN for a zero weight: no examples is not a score of 0."""
    return total / weight if weight else float("nan")
