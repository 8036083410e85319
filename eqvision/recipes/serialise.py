"""Configurations as nested dictionaries: written to config.yaml, read back with every value checked, compared."""

import dataclasses
import difflib
import re
import types
import typing
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
# YAML 1.2 has 1e-3 as a number; PyYAML follows 1.1, which wants a point and a sign, and gives the text.
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


ORDERED = ("learning_rate_multipliers", "weight_decays")  # of several patterns the first that matches counts


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dictionaries of plain values, as they are written to config.yaml."""
    items = dataclasses.asdict(config).items()
    return {name: _plain(value) for name, value in items}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def from_dict(kind: type[T], values: dict[str, Any]) -> T:
    """The dataclass ``kind`` from nested dictionaries; fields that are absent take its defaults.

    Raises ValueError that names the dotted key: for a field that does not exist, with the nearest that do, and for a
    value of another type. Lists become tuples, whole numbers become floats where the field is one.
    """
    return kind(**_fields(kind, values, ""))


def overlay(base: T, values: dict[str, Any]) -> T:
    """``base`` with the fields that ``values`` names, section by section. Raises as ``from_dict``."""
    return _overlay(base, values, "")


def _overlay(base: Any, values: Any, where: str) -> Any:
    hints = get_type_hints(type(base))
    _check_names(type(base), values, where)
    changes = {}
    for name, value in values.items():
        old, key = getattr(base, name), f"{where}{name}"
        section = dataclasses.is_dataclass(old)
        changes[name] = _overlay(old, value, f"{key}.") if section else _typed(hints[name], value, key)
    return dataclasses.replace(base, **changes)


def _fields(kind: Any, values: Any, where: str) -> dict[str, Any]:
    hints = get_type_hints(kind)
    _check_names(kind, values, where)
    needed = [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    missing = [f"{where}{name}" for name in needed if name not in values]
    if missing:
        raise ValueError(f"{kind.__name__} lacks {', '.join(missing)}")
    return {name: _typed(hints[name], value, f"{where}{name}") for name, value in values.items()}


def _check_names(kind: Any, values: Any, where: str) -> None:
    if not isinstance(values, dict):
        raise _wrong(where.rstrip(".") or kind.__name__, "a section of options", values)
    names = [field.name for field in dataclasses.fields(kind)]
    unknown = [name for name in values if name not in names]
    if unknown:
        lines = [f"{where}{name} does not exist; nearest: {_nearest(str(name), names, where)}" for name in unknown]
        raise ValueError(f"{kind.__name__} has no field {', '.join(map(str, unknown))}: " + "; ".join(lines))


def _nearest(name: str, valid: list[str], where: str = "") -> str:
    close = difflib.get_close_matches(name.replace("-", "_"), valid, n=3, cutoff=0.4) or valid
    return ", ".join(f"{where}{other}" for other in close)


def _typed(hint: Any, value: Any, key: str) -> Any:
    """``value`` as the field's type says, or ValueError."""
    origin = get_origin(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return hint(**_fields(hint, value, f"{key}."))
    if origin in (Union, types.UnionType):
        return _optional(hint, value, key)
    if origin is Literal:
        return _literal(get_args(hint), value, key)
    if origin is tuple:
        return _tuple(get_args(hint), value, key)
    if origin is dict:
        return _dict(get_args(hint), value, key)
    return _scalar(hint, value, key)


def _optional(hint: Any, value: Any, key: str) -> Any:
    """``X | None``, or one of several sections: that which has fields of all these names, and fewest others."""
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    if value is None and len(kinds) < len(get_args(hint)):
        return None
    if len(kinds) > 1 and isinstance(value, dict):
        fitting = [kind for kind in kinds if set(value) <= _field_names(kind)]
        kinds = sorted(fitting, key=lambda kind: len(_field_names(kind))) or kinds
    return _typed(kinds[0], value, key)


def _field_names(kind: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def _literal(choices: tuple[Any, ...], value: Any, key: str) -> Any:
    for choice in choices:
        if value == choice and type(value) is type(choice):
            return choice
    close = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ValueError(f"{key}: {value!r} is none of {', '.join(map(str, choices))}{hint}")


def _tuple(kinds: tuple[Any, ...], value: Any, key: str) -> tuple:
    if not isinstance(value, (list, tuple)):
        raise _wrong(key, "a list, such as [...]", value)
    if kinds[-1:] == (...,):
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise ValueError(f"{key}: expected {len(kinds)} values, got {len(value)}: {value!r}")
    return tuple(_typed(kind, item, f"{key}[{n}]") for n, (kind, item) in enumerate(zip(kinds, value, strict=True)))


def _dict(kinds: tuple[Any, ...], value: Any, key: str) -> dict:
    if not isinstance(value, dict):
        raise _wrong(key, "names with values, such as {name: value}", value)
    return {_typed(kinds[0], name, f"{key} (name)"): _typed(kinds[1], v, f"{key}[{name}]") for name, v in value.items()}


def _scalar(kind: Any, value: Any, key: str) -> Any:
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, str) and NUMBER.fullmatch(value):
        return float(value)
    if kind is typing.Any or type(value) is kind:
        return value
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text (in quotes, if it looks like "}
    expected = words.get(kind, str(kind)) + "something else)" * (kind is str)
    raise _wrong(key, expected, value)


def _wrong(key: str, expected: str, value: Any) -> ValueError:
    given = "nothing" if value is None else f"{type(value).__name__} {value!r}"
    return ValueError(f"{key}: expected {expected}, got {given}")


def difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """One line for each value that differs: ``name: old -> new``."""
    lines = []
    for name in sorted({*old, *new}):
        before, after = old.get(name, "absent"), new.get(name, "absent")
        if isinstance(before, dict) and isinstance(after, dict):
            inner = difference(before, after, f"{prefix}{name}.")
            if not inner and name in ORDERED and list(before) != list(after):
                inner = [f"{prefix}{name}: order {', '.join(before)} -> {', '.join(after)}"]
            lines += inner
        elif before != after:
            lines.append(f"{prefix}{name}: {before} -> {after}")
    return lines
