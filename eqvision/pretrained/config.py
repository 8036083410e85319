"""What a ``config.json`` says that the names in a file do not show."""

from collections.abc import Mapping
from typing import Any

from eqvision.pretrained.errors import WeightsError, listed


def check_config(config: Mapping[str, Any], expected: Mapping[str, Any], model: str) -> None:
    """Raises WeightsError for entries with other values than ``expected``; what the config leaves out is as expected.

    ``model`` is what our model is called in the message.
    """
    other = [
        f"{name} = {config[name]!r}, expected {value!r}"
        for name, value in expected.items()
        if name in config and config[name] != value
    ]
    if other:
        raise WeightsError(
            f"config.json describes a model that {model} here is not; "
            f"its weights would give other numbers than there:{listed(other)}"
        )
