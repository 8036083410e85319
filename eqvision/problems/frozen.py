"""What must not begin fresh."""

from typing import Any

import jax

from eqvision.layers import FrozenBatchNorm


def check_frozen(model: Any, name: str, init: str) -> None:
    """Raise ValueError for frozen batch norms without weights to begin with: they would do nothing for good."""
    if not init and _has_frozen_norms(model):
        raise ValueError(
            f"the batch norms of the backbone of {name} are frozen, so it needs weights to begin with: "
            "--init resnet50:torchvision_v1 or --init RUN; or train the norms: --model.norm batch"
        )


def _has_frozen_norms(model: Any) -> bool:
    def frozen(node: object) -> bool:
        return isinstance(node, FrozenBatchNorm)

    return any(frozen(node) for node in jax.tree.leaves(model, is_leaf=frozen))
