"""Captions against what people wrote: BLEU, ROUGE-L and CIDEr-D, as coco-caption defines them.

All take one caption and one or more references for each image, as strings, and split them by ``caption_words``. The
first two are in [0, 1]; CIDEr-D is 0 at worst and 10 for a caption that equals all its references. Figures of BLEU and
CIDEr are those of a whole set of images: numbers of n-grams are added up over the images for BLEU, and words are
weighted by how rare they are among the references for CIDEr.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

Gram = tuple[str, ...]
Words = list[str]

LONGEST = 4  # words of the longest n-gram
SIGMA = 6.0  # words: spread of the Gaussian in CIDEr-D
BETA = 1.2  # weight of recall against precision in ROUGE-L

# Clitics that the Penn Treebank splits off, numbers with their points and commas, words with inner hyphens
WORD = re.compile(r"(?:n't|'(?:s|re|ve|ll|d|m))(?!\w)|\d+(?:[.,:]\d+)+|\w+?(?=n't(?!\w))|\w+(?:-\w+)*")


def caption_words(text: str) -> Words:
    """Words in lower case without punctuation, clitics on their own: ``a man's dog, isn't it`` has 7.

    These are the rules by which coco-caption has Stanford's tokenizer split captions, as far as captions go; the
    tokenizer's tables of abbreviations are not followed.
    """
    return WORD.findall(text.lower().replace("\u2019", "'"))


class CaptionMetric:
    """Keeps captions and references, and gives ``bleu_1`` to ``bleu_4``, ``rouge_l`` and ``cider``."""

    def __init__(self) -> None:
        self._captions: list[Words] = []
        self._references: list[list[Words]] = []

    def update(self, captions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Add images. Raises ValueError where there are not as many of each, or an image has no reference."""
        ours, theirs = _split(captions, references)
        self._captions += ours
        self._references += theirs

    def merge(self, other: "CaptionMetric") -> "CaptionMetric":
        """A new accumulator over the images of both."""
        merged = CaptionMetric()
        merged._captions = self._captions + other._captions
        merged._references = self._references + other._references
        return merged

    def compute(self) -> dict[str, float]:
        """The figures; NaN of no images."""
        ours, theirs = self._captions, self._references
        return {
            **{f"bleu_{n}": value for n, value in enumerate(_bleu(ours, theirs), 1)},
            "rouge_l": _mean(_rouge_l(ours, theirs)),
            "cider": _mean(_cider(ours, theirs, penalised=True)),
        }


def bleu(captions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, ...]:
    """BLEU-1 to BLEU-4 of a corpus (Papineni et al. 2002), without smoothing; raises as ``CaptionMetric.update``.

    The brevity penalty takes the reference whose length is nearest to the caption's, the shorter of two.
    """
    return _bleu(*_split(captions, references))


def rouge_l(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """ROUGE-L of each image (Lin 2004, section 3): F measure of the longest common subsequence, recall by 1.2.

    Precision and recall are each the best over the references, as in coco-caption. Raises as ``CaptionMetric.update``.
    """
    return _rouge_l(*_split(captions, references))


def cider(captions: Sequence[str], references: Sequence[Sequence[str]], *, penalised: bool = True) -> list[float]:
    """CIDEr-D of each image (Vedantam et al. 2015, section 4); papers give 100 times their mean.

    An n-gram's weight is the logarithm of the number of images by that of images whose references have it: with one
    image, or where all are described alike, everything is 0. ``penalised=False`` is CIDEr: no clipping of repeated
    words, and no penalty for another length. Raises as ``CaptionMetric.update``.
    """
    return _cider(*_split(captions, references), penalised=penalised)


def _split(captions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[list[Words], list[list[Words]]]:
    if len(captions) != len(references):
        raise ValueError(f"{len(captions)} captions and references of {len(references)} images; expected as many.")
    for number, theirs in enumerate(references):
        if isinstance(theirs, str) or not theirs:
            what = f"{theirs!r}" if isinstance(theirs, str) else "none"
            raise ValueError(f"image {number} has the references {what}; expected a list of one or more texts.")
    return [caption_words(text) for text in captions], [[caption_words(text) for text in each] for each in references]


def _grams(words: Words, n: int) -> Counter[Gram]:
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))


def _bleu(captions: list[Words], references: list[list[Words]]) -> tuple[float, ...]:
    if not captions:
        return (math.nan,) * LONGEST
    ours = sum(len(words) for words in captions)
    theirs = sum(_nearest(len(words), each) for words, each in zip(captions, references, strict=True))
    penalty = 1.0 if ours >= theirs else math.exp(1 - theirs / ours) if ours else 0.0
    shares = [_precision(captions, references, n) for n in range(1, LONGEST + 1)]
    return tuple(penalty * math.prod(shares[:n]) ** (1 / n) for n in range(1, LONGEST + 1))


def _nearest(length: int, references: list[Words]) -> int:
    return min((abs(len(words) - length), len(words)) for words in references)[1]


def _precision(captions: list[Words], references: list[list[Words]], n: int) -> float:
    """Share of n-grams that a reference has, each at most as often as the reference that has it most."""
    found = total = 0
    for words, each in zip(captions, references, strict=True):
        ours, most = _grams(words, n), Counter[Gram]()
        for reference in each:
            most |= _grams(reference, n)
        found += (ours & most).total()
        total += ours.total()
    return found / total if total else 0.0


def _rouge_l(captions: list[Words], references: list[list[Words]]) -> list[float]:
    return [_f_measure(words, each) for words, each in zip(captions, references, strict=True)]


def _f_measure(words: Words, references: list[Words]) -> float:
    common = [(common_length(words, reference), len(reference)) for reference in references]
    precision = max(length for length, _ in common) / max(1, len(words))
    recall = max(length / max(1, whole) for length, whole in common)
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def common_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest sequence of words that both have in this order, with any others between."""
    row = [0] * (len(b) + 1)
    for x in a:
        before, row = row, [0]
        for j, y in enumerate(b, 1):
            row.append(before[j - 1] + 1 if x == y else max(before[j], row[j - 1]))
    return row[-1]


def _cider(captions: list[Words], references: list[list[Words]], *, penalised: bool) -> list[float]:
    images = len(captions)
    scores = np.zeros(images)
    for n in range(1, LONGEST + 1):
        theirs = [[_grams(reference, n) for reference in each] for each in references]
        having = Counter(gram for each in theirs for gram in set().union(*each))
        for i, words in enumerate(captions):
            ours = _weighted(_grams(words, n), having, images)
            each = [_weighted(grams, having, images) for grams in theirs[i]]
            near = [_similarity(ours, their, penalised) for their in each]
            if penalised:
                near = [s * _length_penalty(len(words) - len(r)) for s, r in zip(near, references[i], strict=True)]
            scores[i] += sum(near) / len(near)
    return [float(score) for score in scores * 10 / LONGEST]


def _weighted(grams: Counter[Gram], having: Counter[Gram], images: int) -> dict[Gram, float]:
    """Numbers of n-grams times the logarithm of their rarity; one that no reference has is as rare as one of one."""
    return {gram: count * (math.log(images) - math.log(max(1, having[gram]))) for gram, count in grams.items()}


def _similarity(ours: dict[Gram, float], theirs: dict[Gram, float], clipped: bool) -> float:
    """Cosine of two vectors; ``clipped``: what of ours is more than theirs does not count."""
    norm = math.sqrt(sum(v * v for v in ours.values())) * math.sqrt(sum(v * v for v in theirs.values()))
    if not norm:
        return 0.0
    values = ((min(v, theirs[g]) if clipped else v) * theirs[g] for g, v in ours.items() if g in theirs)
    return sum(values) / norm


def _length_penalty(difference: int) -> float:
    return math.exp(-(difference**2) / (2 * SIGMA**2))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
