"""Errors about unknown names."""

import difflib


class UnknownNameError(ValueError):
    """A name that no table has; the message lists the nearest ones."""


def nearest(name: str, valid: list[str], what: str) -> UnknownNameError:
    """The error to raise for ``name``: what is unknown and which ``valid`` names come nearest."""
    longer = [other for other in valid if name and other.startswith(name)]
    close = [*longer, *difflib.get_close_matches(name, valid, n=3, cutoff=0.4)] or sorted(valid)
    return UnknownNameError(f"{what} {name!r} does not exist; nearest: {', '.join(list(dict.fromkeys(close))[:3])}")
