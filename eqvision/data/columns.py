"""Which columns of a table hold the images and the classes, and whether the classes are the expected ones."""

from typing import Any


def choose_column(features: Any, kind: type, wanted: str | None, usual: str, where: str) -> str:
    """The name of the column of that kind: ``wanted``, else the usual one, else the only one. Raises ValueError."""
    names = [name for name, feature in features.items() if isinstance(feature, kind)]
    if wanted is None and usual in names:
        return usual
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted is not None and wanted in names:
        return wanted
    columns = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in sorted(features.items()))
    problem = f"no column {wanted!r}" if wanted else ("several columns" if names else "no column")
    raise ValueError(f"{where} has {problem} of type {kind.__name__}; it has: {columns}. Pass {usual}_column")


def same_classes(names: tuple[str, ...], wanted: tuple[str, ...] | None, where: str) -> tuple[str, ...]:
    """``names``, after a ValueError where they are not the ones wanted."""
    if wanted is None or tuple(wanted) == names:
        return names
    for position in range(max(len(names), len(wanted))):
        if names[position : position + 1] != tuple(wanted[position : position + 1]):
            break
    raise ValueError(
        f"{where} has {len(names)} classes, expected {len(wanted)}; the first that differs is number {position}: "
        f"{', '.join(names[position : position + 1]) or 'none'}, "
        f"expected {', '.join(wanted[position : position + 1]) or 'none'}"
    )
