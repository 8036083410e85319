"""Options that are a dictionary: ``--optimizer.weight-decays PATTERN NUMBER PATTERN NUMBER ...``."""

from typing import Any, get_args, get_origin

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

REGISTRY = ConstructorRegistry()
"""To be entered around ``tyro.cli``. Alone, tyro makes an option of every key where the default has any, so that a
recipe's patterns could be given other numbers, but not be replaced by other patterns."""


@REGISTRY.primitive_rule
def pairs(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """The rule for ``dict[str, float]``; what is given replaces the default."""
    if get_origin(info.type) is not dict or get_args(info.type) != (str, float):
        return None
    return PrimitiveConstructorSpec(
        nargs="*", metavar="NAME NUMBER ...", instance_from_str=_parsed, is_instance=_is_pairs, str_from_instance=_texts
    )


def _parsed(texts: list[str]) -> dict[str, float]:
    if len(texts) % 2:
        raise ValueError(f"expected pairs of a name and a number, got {len(texts)} words: {' '.join(texts)}")
    return {name: float(number) for name, number in zip(texts[::2], texts[1::2], strict=True)}


def _is_pairs(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


def _texts(value: dict[str, float]) -> list[str]:
    return [text for name, number in value.items() for text in (name, str(number))]
