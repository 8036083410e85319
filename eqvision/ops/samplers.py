"""Random samples of positive and negative boxes in a fixed number of rows, inside ``jit``."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, Key

from eqvision.ops.iou_assignment import NEGATIVE, POSITIVE


class Sample(NamedTuple):
    """Rows that were drawn: positive ones first, then negative ones, then rows with ``valid`` False and index 0.

    ``positive`` is True on rows that are positive and valid.
    """

    indices: Int[Array, " k"]
    positive: Bool[Array, " k"]
    valid: Bool[Array, " k"]


def sample_balanced(label: Int[Array, " n"], *, count: int, positive_fraction: float, key: Key[Array, ""]) -> Sample:
    """``count`` rows, of which at most ``positive_fraction`` (rounded down) are positive, without replacement.

    ``label`` is 1 (positive), 0 (negative) or anything else (never drawn), as from ``assign_by_iou``. Where there are
    fewer positive rows, negative ones take their places; where there are not enough of those, the sample is smaller,
    and more positives than the fraction are not taken. So do torchvision, detectron2 and mmdet. Every positive row is
    as likely as any other, and so is every negative one. ``jax.vmap`` it over images, with a key for each.

    The same key and labels give the same sample, however many rows of padding (never drawn) stand behind them, with
    JAX's default keys.
    """
    _check(count, positive_fraction)
    most = int(count * positive_fraction)
    # Integers: 24 bits of a float would tie among the anchors of one image, and ties go to the lower row.
    priority = (jax.random.bits(key, label.shape) >> 1).astype(jnp.int32)
    positive, positives = _draw(label == POSITIVE, priority, most)
    negative, negatives = _draw(label == NEGATIVE, priority, count)
    place = jnp.arange(count)
    is_positive = place < positives
    after = negative.at[jnp.maximum(place - positives, 0)].get(mode="clip")
    indices = jnp.where(is_positive, jnp.pad(positive, (0, count - most)), after)
    valid = place < positives + negatives
    return Sample(jnp.where(valid, indices, 0), is_positive, valid)


def drawn_rows(sample: Sample, count: int) -> Bool[Array, " n"]:
    """Which of ``count`` rows are in the sample."""
    place = jnp.where(sample.valid, sample.indices, count)
    return jnp.zeros(count, bool).at[place].set(True, mode="drop")


def _draw(wanted: Bool[Array, " n"], priority: Int[Array, " n"], most: int) -> tuple[Int[Array, " k"], Int[Array, ""]]:
    """Rows of highest priority among the wanted, in ``most`` places, and how many of the places count."""
    drawn = min(most, len(wanted))
    _, rows = lax.top_k(jnp.where(wanted, priority, -1), drawn)
    return jnp.pad(rows, (0, most - drawn)), jnp.minimum(jnp.sum(wanted), most)


def _check(count: int, positive_fraction: float) -> None:
    if count < 1:
        raise ValueError(f"count {count}: expected at least 1 row")
    if not 0 <= positive_fraction <= 1:
        raise ValueError(f"positive_fraction {positive_fraction}: expected a share between 0 and 1")
