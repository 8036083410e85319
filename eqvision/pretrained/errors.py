"""The error that all of ``pretrained`` raises about files, and how it lists names."""

from collections.abc import Iterable

SHOWN = 5  # names that a message lists


class WeightsError(ValueError):
    """Weights that do not fit: broken file, unknown layout, another architecture. Nothing has been loaded."""


def listed(lines: Iterable[str], shown: int = SHOWN) -> str:
    """The first lines, indented, and how many more there are."""
    lines = list(lines)
    more = [f"and {len(lines) - shown} more"] if len(lines) > shown else []
    return "".join(f"\n  {line}" for line in [*lines[:shown], *more])
