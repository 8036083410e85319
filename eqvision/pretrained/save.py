"""A model's numbers under the names of a layout: the rules read backwards."""

import equinox as eqx
import numpy as np

from eqvision.pretrained.errors import WeightsError, listed
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.leaf_names import named_tensors
from eqvision.pretrained.rules import save_rule


def to_layout(model: eqx.Module, state: eqx.nn.State, layout: Layout) -> dict[str, np.ndarray]:
    """Tensors by the layout's names. Raises WeightsError where the model has leaves that the layout has no name for."""
    if not layout.describes(model):
        raise WeightsError(f"layout {layout.name} ({layout.source}) does not describe this model")
    leaves = named_tensors(model, state)
    rules = layout.rules(model)
    known = {name for rule in rules for name in rule.our_names}
    extra = [name for name in leaves if name not in known]
    if extra:
        raise WeightsError(f"layout {layout.name} has no names for {len(extra)} leaves:{listed(extra)}")
    tensors: dict[str, np.ndarray] = {}
    for rule in rules:
        tensors |= save_rule(rule, leaves)
    return {name: np.asarray(array, order="C") for name, array in tensors.items()}
