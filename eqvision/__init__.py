"""Vision models as plain Equinox pytrees, and the small explicit loop that trains them."""

from typing import TYPE_CHECKING, Any

from eqvision.classifiers import Classifier, inference, reset_head
from eqvision.names import UnknownNameError
from eqvision.zoo import MODELS, create, list_models

if TYPE_CHECKING:
    from eqvision.pretrained import WeightsError, load

__version__ = "0.1.0"

__all__ = [
    "MODELS",
    "Classifier",
    "UnknownNameError",
    "WeightsError",
    "__version__",
    "create",
    "inference",
    "list_models",
    "load",
    "reset_head",
]


def __getattr__(name: str) -> Any:
    """``load`` and ``WeightsError``, imported when they are asked for: most programs load no published weights."""
    if name in ("WeightsError", "load"):
        from eqvision import pretrained

        return getattr(pretrained, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
