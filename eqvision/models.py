"""What all models of the zoo have in common, classifiers and detectors."""

from typing import Any, Protocol, runtime_checkable

import equinox as eqx
from jaxtyping import PRNGKeyArray


@runtime_checkable
class Model(Protocol):
    """What the zoo builds: a pytree of arrays. Published weights are loaded into it and saved from it.

    Classifiers, DETRs and CenterNets have one ``head``, with ``reset(num_classes, *, key)``, which gives the head for
    another number of classes. R-CNNs have several: their layouts say which layers depend on the classes.
    """

    backbone: Any

    def __call__(
        self, inputs: Any, state: eqx.nn.State, /, *, train: bool = False, key: PRNGKeyArray | None = None
    ) -> tuple[Any, eqx.nn.State]: ...
