"""Vision models as plain Equinox pytrees, and the small explicit loop that trains them."""

from eqvision.classifiers import Classifier, inference, reset_head
from eqvision.names import UnknownNameError
from eqvision.zoo import MODELS, create, list_models

__version__ = "0.1.0"

__all__ = [
    "MODELS",
    "Classifier",
    "UnknownNameError",
    "__version__",
    "create",
    "inference",
    "list_models",
    "reset_head",
]
