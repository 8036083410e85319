"""Metrics of language models and of transcripts: perplexity and word error rate."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from eqvision.losses.reduce import weighted_sums
from eqvision.metrics.sums import ratio


class Perplexity(NamedTuple):
    """Sums over tokens of their cross entropy, and how many they are; e to the mean of the former."""

    total: Float[Array, ""]
    tokens: Float[Array, ""]

    @classmethod
    def of(cls, cross_entropy: Float[Array, "b n"], weights: Float[Array, "b n"]) -> "Perplexity":
        """Sums of one batch, in nats (``losses.token_cross_entropy``); tokens of weight 0 add nothing, even if NaN."""
        return cls(*weighted_sums(jnp.asarray(cross_entropy), weights, axis_names=()))

    def compute(self) -> float:
        """1 for a model that is sure and right, the vocabulary's size for one that knows nothing; NaN of no tokens."""
        mean = ratio(float(self.total), float(self.tokens))
        return math.inf if mean > 700 else math.exp(mean)


class WordErrors(NamedTuple):
    """Words wrong (substituted, deleted, inserted) and words there should be."""

    errors: int
    words: int

    def merge(self, other: "WordErrors") -> "WordErrors":
        return WordErrors(self.errors + other.errors, self.words + other.words)

    def compute(self) -> float:
        """Word error rate: 0 is perfect, and insertions can make it more than 1. NaN where no words should be."""
        return ratio(float(self.errors), float(self.words))


def word_errors(hypotheses: Sequence[str], references: Sequence[str], *, characters: bool = False) -> WordErrors:
    """Errors of transcripts: the fewest substitutions, deletions and insertions that turn each reference into its text.

    Words are what stands between blanks; case and punctuation count, so normalise both sides before. With
    ``characters`` they are characters, and the rate is the character error rate. The rate of many texts is that of
    their sums, not the mean of their rates. Raises ValueError where there are not as many of each.
    """
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} texts and {len(references)} references; expected one for each.")
    split = list if characters else str.split
    errors = sum(edit_distance(split(ours), split(right)) for ours, right in zip(hypotheses, references, strict=True))
    return WordErrors(errors, sum(len(split(right)) for right in references))


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Levenshtein distance: the fewest substitutions, deletions and insertions that turn ``a`` into ``b``."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y)))
    return row[-1]
