"""Which parameters decay, train, and at what share of the learning rate: by their names in the tree.

Names are the fields on the way to a leaf, joined by dots, such as ``backbone.encoder.blocks.attention.query.weight``.
Blocks of a model are what its fields call ``blocks``, ``stages.0.3``, ``stages.0.first``, ``stages.0.rest``,
``hidden.0``, ``encoder.layers`` or ``decoder.layers``, and the ``window_blocks``, ``global_blocks`` and ``residuals``
of a ``VitDet``, which alternate. All but stages and ``hidden`` hold equal blocks stacked along a leading axis, as
``rest`` does, which no rule about the shape of a parameter counts.

A frozen batch norm (``layers.FrozenBatchNorm``) keeps its scale and shift beside its statistics, in ``running_mean``
and ``running_var``. These four are constants: no configuration trains or decays them.
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from eqvision.names import nearest
from eqvision.recipes.config import OptimizerConfig

Leaf = Array | jax.ShapeDtypeStruct  # names and shapes are all that counts

_BLOCK = re.compile(
    r"(?:.*?\.)?(?:(?:window_|global_)?blocks(?:\.\d+)?|residuals|stages\.\d+\.(?:first|rest|\d+)|hidden\.\d+|(?:en|de)coder\.layers)(?=\.|$)"
)
STACKS = ("blocks", "window_blocks", "global_blocks", "residuals", "rest", "layers")


@runtime_checkable
class Alternating(Protocol):
    """A network whose stacks take turns."""

    @property
    def block_numbers(self) -> dict[str, tuple[int, ...]]:
        """The place in the network of each block of a stack, by its field."""
        ...


class ParameterSettings(NamedTuple):
    """How one leaf is trained. ``layer_factors`` has one value, or one for each layer of a stack."""

    frozen: bool
    weight_decay: float
    multiplier: float
    layer_factors: tuple[float, ...]

    @property
    def learning_rate_factor(self) -> np.ndarray:
        """What the learning rate is multiplied by: shape (1,), or (depth,) for a stack under layer-wise decay."""
        return self.multiplier * np.asarray(self.layer_factors, np.float64)


def leaf_name(path: tuple) -> str:
    """The name of the leaf at a key path of ``jax.tree_util``."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def block_name(name: str) -> str | None:
    """The block or stack of blocks that a parameter belongs to; None for embeddings, stems, final norms and heads."""
    found = _BLOCK.match(name)
    return found[0] if found else None


def is_stacked(name: str) -> bool:
    """Whether the leaf's first axis counts equal blocks."""
    block = block_name(name)
    return block is not None and block.rsplit(".", 1)[-1] in STACKS


def layer_axes(name: str, ndim: int) -> tuple[int, ...]:
    """The axes of one layer's parameter: all but the leading one of a stack."""
    return tuple(range(int(is_stacked(name)), ndim))


def is_matrix(name: str, ndim: int) -> bool:
    """Whether the leaf is the weight of a linear map or convolution: no bias, scale, token or position."""
    fields = name.split(".")
    return fields[-1] == "weight" and "position" not in fields and len(layer_axes(name, ndim)) >= 2


def decay_mask(params: PyTree) -> PyTree[bool]:
    """True where weight decay applies: matrices and convolutions, not biases, scales, tokens and positions."""
    return jax.tree.map_with_path(lambda path, leaf: is_matrix(leaf_name(path), leaf.ndim), params)


def fixed_names(names: Iterable[str]) -> set[str]:
    """Those of ``names`` that belong to a frozen batch norm: what lies beside a ``running_mean``."""
    names = list(names)
    norms = {name.rpartition(".")[0] for name in names if name.rpartition(".")[2] == "running_mean"}
    return {name for name in names if name.rpartition(".")[0] in norms}


def frozen_mask(config: OptimizerConfig, params: PyTree) -> PyTree[bool]:
    """True for the parameters that do not train: constants, and those that ``config.freeze`` names.

    Raises UnknownNameError for a pattern without a match.
    """
    settings = parameter_settings(config, params)
    return jax.tree.map_with_path(lambda path, _: settings[leaf_name(path)].frozen, params)


def parameter_settings(config: OptimizerConfig, params: PyTree) -> dict[str, ParameterSettings]:
    """The settings of every leaf, by name, from the regular expressions and the layer decay of the configuration.

    A pattern is searched for anywhere in the name (``^`` and ``$`` tie it down); of several, the first that matches
    counts. Frozen batch norms are frozen whatever the patterns say.

    Raises UnknownNameError for a pattern that matches nothing, ValueError for one that is no regular expression, for a
    configuration that freezes everything, and for a layer decay without blocks.
    """
    leaves = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    multipliers = _first_matches(config.learning_rate_multipliers, leaves, "learning-rate-multipliers")
    decays = _first_matches(config.weight_decays, leaves, "weight-decays")
    frozen = {*_first_matches(dict.fromkeys(config.freeze, 1.0), leaves, "freeze"), *fixed_names(leaves)}
    if leaves and len(frozen) == len(leaves):
        patterns = " ".join(config.freeze)
        raise ValueError(f"--optimizer.freeze {patterns} freezes all {len(leaves)} parameters; leave some to train")
    layers = {} if config.layer_decay is None else layer_factors(params, config.layer_decay)
    return {
        name: ParameterSettings(
            frozen=name in frozen,
            weight_decay=decays.get(name, config.weight_decay if is_matrix(name, leaf.ndim) else 0.0),
            multiplier=multipliers.get(name, 1.0),
            layer_factors=layers.get(name, (1.0,)),
        )
        for name, leaf in leaves.items()
    }


def layer_factors(params: PyTree, decay: float) -> dict[str, tuple[float, ...]]:
    """Layer-wise learning-rate decay (Clark et al. 2020; Bao et al. 2022, BEiT): ``decay ** (layers above)`` by name.

    Blocks are layers 1 to depth in the order of the tree. What comes before them (patch embedding, positions, class
    token, stem) is layer 0. What follows the last block (final norm, head) has the factor 1, and the last block has
    ``decay``. What lies between blocks, as the embedding of a hybrid ViT does, goes with the block before it.
    A stack has one factor for each of its layers. Raises ValueError where the tree has no blocks.
    """
    leaves = [(leaf_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    if leaves and not any(block_name(name) for name, _ in leaves):
        raise ValueError(
            f"--optimizer.layer-decay {decay}: the model has no blocks to order (its parameters are "
            f"{', '.join(name for name, _ in leaves[:3])} ...); set learning_rate_multipliers instead"
        )
    layers, depth = _number_layers(leaves, _alternating(params))
    return {name: tuple(decay ** (depth + 1 - layer) for layer in numbers) for name, numbers in layers.items()}


def _alternating(params: PyTree) -> dict[str, tuple[int, ...]]:
    """The places of blocks in their network, by the name of their stack."""
    nodes = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda node: isinstance(node, Alternating))
    networks = [(leaf_name(path), node) for path, node in nodes if isinstance(node, Alternating)]
    return {
        f"{name}.{field}" if name else field: numbers
        for name, network in networks
        for field, numbers in network.block_numbers.items()
    }


def _number_layers(
    leaves: list[tuple[str, Leaf]], alternating: dict[str, tuple[int, ...]]
) -> tuple[dict[str, Sequence[int]], int]:
    """The layers of each leaf and the number of blocks."""
    last = max((i for i, (name, _) in enumerate(leaves) if block_name(name)), default=0)
    starts: dict[str, int] = {}
    layers: dict[str, Sequence[int]] = {}
    depth = 0
    for i, (name, leaf) in enumerate(leaves):
        block, count = block_name(name), leaf.shape[0] if is_stacked(name) else 1
        if block is None:
            layers[name] = range(depth, depth + 1) if i < last else range(depth + 1, depth + 2)
            continue
        numbers = alternating.get(block, range(count))
        network = block.rpartition(".")[0] if block in alternating else block
        if network not in starts:
            starts[network], depth = depth + 1, depth + _depth(network, alternating, count)
        layers[name] = [starts[network] + number for number in numbers]
    return layers, depth


def _depth(network: str, alternating: dict[str, tuple[int, ...]], count: int) -> int:
    """Blocks of all stacks that take turns in a network, or the ``count`` of a single one."""
    places = [n for name, numbers in alternating.items() if name.rpartition(".")[0] == network for n in numbers]
    return max(places) + 1 if places else count


def _first_matches(patterns: dict[str, float], names: Iterable[str], option: str) -> dict[str, float]:
    """The value of the first pattern that is found in each name, for the names that have one."""
    compiled = [(_compile(pattern, option), value) for pattern, value in patterns.items()]
    names = list(names)
    for regex, _ in compiled:
        # An empty tree is the placeholder with which optax finds the parameters inside an optimizer's state.
        if names and not any(regex.search(name) for name in names):
            raise nearest(regex.pattern, _parts(names), f"--optimizer.{option}: a parameter that matches")
    found = {}
    for name in names:
        values = [value for regex, value in compiled if regex.search(name)]
        if values:
            found[name] = values[0]
    return found


def _compile(pattern: str, option: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"--optimizer.{option}: {pattern!r} is no regular expression: {error}") from error


def _parts(names: list[str]) -> list[str]:
    """Fields, beginnings and whole names: what a mistyped pattern may have meant."""
    parts: dict[str, None] = {}
    for name in names:
        fields = name.split(".")
        parts.update(dict.fromkeys(field for field in fields if not field.isdigit()))
        parts.update(dict.fromkeys(".".join(fields[:end]) for end in range(1, len(fields) + 1)))
    return list(parts)


def add_weight_decays(settings: dict[str, ParameterSettings]) -> optax.GradientTransformation:
    """Add each parameter times its weight decay; leaves without decay pass untouched."""

    def leaf(path: tuple, update: Array, param: Array) -> Array:
        decay = settings[leaf_name(path)].weight_decay
        return update if decay == 0 else update + decay * param

    return optax.stateless(lambda updates, params: jax.tree.map_with_path(leaf, updates, params))


def scale_by_factors(settings: dict[str, ParameterSettings]) -> optax.GradientTransformation:
    """Multiply each update by its share of the learning rate; layers of a stack have one each."""

    def leaf(path: tuple, update: Array) -> Array:
        factor = settings[leaf_name(path)].learning_rate_factor
        if np.all(factor == 1):
            return update
        shape = factor.shape + (1,) * (update.ndim - 1) if factor.size > 1 else ()
        return update * jnp.asarray(factor.reshape(shape), update.dtype)

    return optax.stateless(lambda updates, params: jax.tree.map_with_path(leaf, updates))
