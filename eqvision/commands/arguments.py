"""What all commands share: parsing by tyro, and errors that the user can mend."""

import sys
from typing import NoReturn, TypeVar

import tyro

T = TypeVar("T")


def parse(kind: type[T], arguments: list[str], program: str) -> T:
    """The dataclass ``kind`` from the command line; its docstrings are the help."""
    return tyro.cli(kind, args=arguments, prog=program)


def fail(message: str) -> NoReturn:
    """Print the message and exit with code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def unknown(what: str, name: str, valid: list[str]) -> str:
    """The message for a name that does not exist, with the nearest that do."""
    from eqvision.names import nearest

    return str(nearest(name, valid, what))
