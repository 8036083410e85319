"""Which checkpoints stay."""

import math
from collections.abc import Mapping, Sequence


def steps_to_keep(
    steps: Sequence[int],
    scores: Mapping[int, float],
    *,
    keep_last: int,
    keep_best: int,
    keep_every: int | None,
    lower_is_better: bool = False,
) -> set[int]:
    """The newest ``keep_last``, the best ``keep_best`` by score, and multiples of ``keep_every``; of ties the earlier.

    A score of NaN (the AP of a split without objects) is worse than every other.

    A pure function of what is on disk and of the history of scores, so a resumed run keeps what an uninterrupted one
    keeps. Raises ValueError unless at least one newest is kept: it is what a run resumes from.
    """
    if keep_last < 1 or keep_best < 0 or (keep_every is not None and keep_every < 1):
        raise ValueError(
            f"checkpoint.keep_last={keep_last}, keep_best={keep_best}, keep_every={keep_every}; "
            "expected keep_last >= 1, keep_best >= 0, keep_every >= 1 or none"
        )
    sign = 1 if lower_is_better else -1
    scored = sorted((step for step in steps if step in scores), key=lambda step: (*_rank(sign * scores[step]), step))
    every = {step for step in steps if keep_every and step % keep_every == 0}
    return set(sorted(steps)[-keep_last:]) | set(scored[:keep_best]) | every


def _rank(score: float) -> tuple[bool, float]:
    return (True, 0.0) if math.isnan(score) else (False, score)
