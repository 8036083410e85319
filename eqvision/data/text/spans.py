"""T5's span corruption (Raffel et al. 2020, section 3.1.4; ``random_spans_noise_mask`` of the published code).

Stretches of a text are taken out, a sentinel stands for each, and the target is what was taken out, each stretch
behind its sentinel.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

Ids = Int[np.ndarray, " _"]


def num_noise_and_spans(length: int, *, share: float = 0.15, mean: float = 3.0) -> tuple[int, int]:
    """How many of ``length`` tokens are taken out, and in how many spans; of both at least one, of the rest, too."""
    noise = min(max(round(length * share), 1), length - 1)
    return noise, max(min(round(noise / mean), noise, length - noise), 1)


def corrupted_lengths(length: int, *, share: float = 0.15, mean: float = 3.0) -> tuple[int, int]:
    """Tokens of source and target, end tokens included, that ``length`` tokens of text give."""
    noise, spans = num_noise_and_spans(length, share=share, mean=mean)
    return length - noise + spans + 1, noise + spans + 1


def text_length(source_length: int, *, share: float = 0.15, mean: float = 3.0) -> int:
    """The most tokens of text whose source has at most ``source_length``: 568 for 512 (the target then has 114)."""
    length = 2
    while corrupted_lengths(length + 1, share=share, mean=mean)[0] <= source_length:
        length += 1
    return length


def noise_mask(
    length: int, rng: np.random.Generator, *, share: float = 0.15, mean: float = 3.0
) -> Bool[np.ndarray, " n"]:
    """True on what is taken out: spans of random lengths, of which the text begins with none and ends with one."""
    noise, spans = num_noise_and_spans(length, share=share, mean=mean)
    lengths = np.stack([random_parts(length - noise, spans, rng), random_parts(noise, spans, rng)], axis=1)
    return np.repeat(np.arange(2 * spans) % 2 == 1, lengths.ravel())


def random_parts(total: int, count: int, rng: np.random.Generator) -> Int[np.ndarray, " k"]:
    """``count`` positive numbers that add up to ``total``, all such rows being equally likely."""
    cuts = np.sort(rng.choice(total - 1, count - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]])).astype(np.int64)


def corrupt_spans(ids: Ids, mask: Bool[np.ndarray, " _"], sentinels: Sequence[int], end: int) -> tuple[Ids, Ids]:
    """Source and target, each with an end token. Raises ValueError where there are more spans than sentinels."""
    return _with_sentinels(ids, mask, sentinels, end), _with_sentinels(ids, ~mask, sentinels, end)


def _with_sentinels(ids: Ids, mask: Bool[np.ndarray, " _"], sentinels: Sequence[int], end: int) -> Ids:
    """Each stretch of the mask becomes its sentinel."""
    first = mask & ~np.concatenate([[False], mask[:-1]])
    if (count := int(first.sum())) > len(sentinels):
        raise ValueError(f"{count} spans and {len(sentinels)} sentinels in the vocabulary; take shorter texts")
    marked = ids.astype(np.int64)
    marked[first] = np.asarray(sentinels, np.int64)[:count]
    return np.append(marked[~mask | first], end)


def fill_spans(source: Ids, target: Ids, sentinels: Sequence[int], end: int) -> list[int]:
    """The text again: the target's spans in place of the source's sentinels. A sentinel without a span is left out."""
    spans: dict[int, list[int]] = {}
    inside: list[int] | None = None
    for token in target.tolist():
        if token == end:
            break
        if token in sentinels:
            inside = spans.setdefault(token, [])
        elif inside is not None:
            inside.append(token)
    filled = [spans.get(token, []) if token in sentinels else [token] for token in source.tolist() if token != end]
    return [token for tokens in filled for token in tokens]
