"""Embedded demo: real handwritten digits, and sentences that say which digit it is."""

import numpy as np
from jaxtyping import Int

from eqvision.data.pairs.source import PairExample
from eqvision.data.sources import digits

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SENTENCES = (
    "a handwritten {word}",
    "the digit {word}",
    "a photo of the number {word}",
    "someone wrote a {numeral} here",
    "this is a {numeral}",
    "a small grey picture of the digit {numeral}",
    "the number {word}, written by hand",
    "here we see a {word}",
)
# What classes are asked for with: of the same words, and yet sentences that no training example has
TEMPLATES = ("a photo of the digit {}", "a handwritten number {}")


class CaptionedDigits:
    """``data.digits`` with ``SENTENCES`` as captions, all eight for each image: a word or a numeral in each.

    The two splits have no image in common, and the same sentences. Raises ValueError for another split and ImportError
    without scikit-learn (extra [demo]).
    """

    class_names = WORDS
    num_skipped = 0

    def __init__(self, split: str, *, channels: int = 1, length: int | None = None):
        self._digits = digits(split)
        self._channels, self._length = channels, len(self._digits) if length is None else length
        if not 1 <= self._length <= len(self._digits):
            raise ValueError(f"length={length}; the split {split!r} has 1 to {len(self._digits)} images")

    @property
    def labels(self) -> Int[np.ndarray, " n"]:
        """The digits."""
        return self._digits.labels[: self._length]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> PairExample:
        index = range(len(self))[index]
        image = np.repeat(self._digits[index].image, self._channels, axis=-1)
        return PairExample(image, self.captions(index), index)

    def captions(self, index: int) -> tuple[str, ...]:
        """The sentences about an image."""
        return digit_captions(int(self.labels[range(len(self))[index]]))

    def describe(self, index: int) -> str:
        """Row of the digits."""
        return self._digits.describe(index)


def digit_captions(digit: int) -> tuple[str, ...]:
    """Everything that is said of a digit."""
    return tuple(sentence.format(word=WORDS[digit], numeral=digit) for sentence in SENTENCES)
