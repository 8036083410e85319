"""Configurations as nested dictionaries: written to config.yaml, read back, compared."""

import dataclasses
from typing import Any, TypeVar, get_type_hints

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dictionaries of plain values, as they are written to config.yaml."""
    items = dataclasses.asdict(config).items()
    return {name: _plain(value) for name, value in items}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def from_dict(kind: type[T], values: dict[str, Any]) -> T:
    """The dataclass ``kind`` from nested dictionaries. Raises ValueError for a field that it does not have."""
    hints = get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {', '.join(unknown)}; it has {', '.join(hints)}")
    return kind(**{name: _typed(hints[name], value) for name, value in values.items()})


def _typed(hint: Any, value: Any) -> Any:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_dict(hint, value)
    return tuple(value) if isinstance(value, list) else value


def difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """One line for each value that differs: ``name: old -> new``."""
    lines = []
    for name in sorted({*old, *new}):
        before, after = old.get(name, "absent"), new.get(name, "absent")
        if isinstance(before, dict) and isinstance(after, dict):
            lines += difference(before, after, f"{prefix}{name}.")
        elif before != after:
            lines.append(f"{prefix}{name}: {before} -> {after}")
    return lines
