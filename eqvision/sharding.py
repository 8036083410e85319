"""Which device holds which part of a parameter, and the gradient of parameters that are held in parts.

Parameters, their averages and the optimizer's state are split over the mesh axis ``fsdp`` (Rajbhandari et al. 2020,
ZeRO stage 3, at rest) and the layers of transformers over ``model`` (Shoeybi et al. 2019, Megatron-LM). A step
gathers the parameters over ``fsdp`` inside the differentiated function, so that the transpose of the gather, a
reduce-scatter, leaves each device with its part of the gradient. The optimizer then sees whole (global) arrays.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PyTree

from eqvision.ops.collectives import DATA_AXES

MIN_SIZE = 2**14  # elements; splitting a smaller leaf saves less memory than its collective costs time

T = TypeVar("T")
Aux = Any
Leaf = Array | jax.ShapeDtypeStruct


class Rule(NamedTuple):
    """What the parameters whose dotted name ``pattern`` is found in are split over.

    ``axes`` name the mesh axes of the parameter's last axes, aligned at the end, so that a stacked depth axis comes
    before them; None in their place leaves the choice of an axis for ``fsdp`` to size alone.
    """

    pattern: str
    axes: tuple[str | None, ...] | None
    why: str


# The first that matches counts.
RULES = (
    Rule(r"\.(query|key|value|fc1|gate)\.weight$", ("fsdp", "model"), "columns: each device has its heads or units"),
    Rule(r"\.(query|key|value|fc1|gate)\.bias$", ("model",), "goes with the columns"),
    Rule(r"\.(attention\.out|fc2)\.weight$", ("model", "fsdp"), "rows: partial products are summed over `model`"),
    Rule(r"", None, "the largest axis that `fsdp` divides"),
)

# Fields that hold equal blocks with a leading depth axis.
_STACKED = re.compile(r"(^|\.)(blocks|rest|(en|de)coder\.layers)\.(?!\d)")


def parameter_specs(tree: PyTree[Leaf], mesh: Mesh | AbstractMesh, *, min_size: int = MIN_SIZE) -> PyTree[P]:
    """The ``PartitionSpec`` of every parameter by ``RULES``; ``tree`` may be abstract (``jax.eval_shape``).

    An axis is split only where the number of devices divides it, never the depth axis of a scanned stack. Leaves of
    fewer than ``min_size`` elements are not split over ``fsdp``. Raises ValueError where ``model`` has several
    devices and no parameter can be split over it.
    """
    specs = jax.tree.map_with_path(lambda path, leaf: _spec(_name(path), leaf.shape, mesh, min_size), tree)
    if mesh.shape["model"] > 1 and not any("model" in spec for spec in jax.tree.leaves(specs)):
        raise ValueError(
            f"--mesh.model {mesh.shape['model']}: no parameter of this model can be split over it. It splits the "
            "attention and the MLP of transformers whose widths it divides; use --mesh.fsdp for other models"
        )
    return specs


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def matching_rule(name: str) -> Rule:
    """The first of ``RULES`` whose pattern is found in the dotted name."""
    return next(rule for rule in RULES if re.search(rule.pattern, f".{name}"))


def _spec(name: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, min_size: int) -> P:
    axes: list[str | None] = [None] * len(shape)
    first = 1 if _STACKED.search(name) else 0
    for axis, wanted in enumerate(_aligned(matching_rule(name).axes, len(shape))):
        if wanted is not None and axis >= first and mesh.shape[wanted] > 1 and shape[axis] % mesh.shape[wanted] == 0:
            axes[axis] = wanted
    if math.prod(shape) < min_size:
        axes = [None if axis == "fsdp" else axis for axis in axes]
    elif "fsdp" not in axes and mesh.shape["fsdp"] > 1:
        _split_largest(axes, shape, first, mesh.shape["fsdp"])
    return _trimmed(axes)


def _trimmed(axes: Sequence[str | None]) -> P:
    """Without None at the end, as JAX returns specs: equal placements shall be equal objects."""
    last = max((i for i, axis in enumerate(axes) if axis is not None), default=-1)
    return P(*axes[: last + 1])


def _aligned(axes: tuple[str | None, ...] | None, ndim: int) -> tuple[str | None, ...]:
    axes = () if axes is None else axes[-ndim:] if ndim else ()
    return (None,) * (ndim - len(axes)) + axes


def _split_largest(axes: list[str | None], shape: tuple[int, ...], first: int, fsdp: int) -> None:
    free = [axis for axis in range(first, len(shape)) if axes[axis] is None and shape[axis] % fsdp == 0]
    if free:
        # Of equal axes the last: outputs, which are a multiple of 8 more often than inputs are.
        axes[max(free, key=lambda axis: (shape[axis], axis))] = "fsdp"


def state_specs(state: PyTree[Leaf], parameters: PyTree[Leaf], specs: PyTree[P]) -> PyTree[P]:
    """Specs for a tree that holds parameters, moments and averages of them, and other leaves.

    A leaf whose dotted name ends with a parameter's and whose shape is that parameter's gets its spec; all others
    (counts, statistics, factored moments) are replicated. ``state`` and ``parameters`` may be abstract.
    """
    leaves = jax.tree_util.tree_leaves_with_path(parameters)
    known = {
        _segments(path): (leaf.shape, spec) for (path, leaf), spec in zip(leaves, jax.tree.leaves(specs), strict=True)
    }

    def spec_of(path: tuple, leaf: Leaf) -> P:
        segments = _segments(path)
        ends = (known[segments[i:]] for i in range(len(segments)) if segments[i:] in known)
        shape, spec = next(ends, (None, P()))
        return spec if shape == leaf.shape else P()

    return jax.tree.map_with_path(spec_of, state)


def _segments(path: tuple) -> tuple[str, ...]:
    return tuple(_name((part,)) for part in path)


def shardings(specs: PyTree[P], mesh: Mesh | AbstractMesh) -> PyTree[NamedSharding]:
    """The same tree for ``jax.device_put`` and ``jax.jit(..., out_shardings=...)``."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def state_shardings(
    state: PyTree[Leaf], parameters: PyTree[Leaf], mesh: Mesh | AbstractMesh, *, min_size: int = MIN_SIZE
) -> PyTree[NamedSharding]:
    """Where every leaf of ``state`` lives; ``parameters`` is the model inside of it (or an equal tree of shapes)."""
    specs = parameter_specs(parameters, mesh, min_size=min_size)
    return shardings(state_specs(state, parameters, specs), mesh)


def constrain(tree: T, specs: PyTree[P], mesh: Mesh) -> T:
    """``tree`` under ``jit``, held as ``specs`` say: updates and moments must not drift to another layout."""
    return jax.tree.map(lambda leaf, spec: lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec)), tree, specs)


def gather(shards: T, specs: PyTree[P]) -> T:
    """Whole parameters from this device's parts, inside ``shard_map``; leaves without ``fsdp`` pass untouched.

    The transpose is a reduce-scatter over ``fsdp`` of the gradient and then a sum over ``data`` of the part.
    Gathered leaves count as different on every device of ``fsdp`` and ``data``: a loss term of parameters alone
    must not be summed over devices (weight decay belongs to the optimizer).
    """
    return jax.tree.map(_gather_leaf, shards, specs)


def _gather_leaf(shard: Array, spec: P) -> Array:
    if "fsdp" not in spec:
        return shard
    whole = functools.partial(_gather_fsdp, axis=tuple(spec).index("fsdp"))
    if "model" not in spec:
        return whole(shard)
    # Manual over `model` too: the compiler would make the leaf whole over it before each collective over `fsdp`.
    by_model = _trimmed([axis if axis == "model" else None for axis in spec])
    mesh = jax.sharding.get_abstract_mesh()
    return jax.shard_map(whole, mesh=mesh, in_specs=by_model, out_specs=by_model, axis_names={"model"})(shard)


def _gather_fsdp(shard: Array, axis: int) -> Array:
    # Before the gather, so that its transpose sums over `data` what the reduce-scatter has already made small.
    others = tuple(axis for axis in DATA_AXES if axis not in jax.typeof(shard).manual_axis_type.varying)
    shard = lax.pcast(shard, others, to="varying") if others else shard
    return lax.all_gather(shard, "fsdp", axis=axis, tiled=True)


def sharded_value_and_grad(
    loss_fn: Callable[..., tuple[Float[Array, ""], Aux]], mesh: Mesh, specs: PyTree[P]
) -> Callable[..., tuple[tuple[Float[Array, ""], Aux], PyTree[Array]]]:
    """``(params, batch, *replicated) -> ((loss, aux), grads)``; call it under ``jit``.

    ``loss_fn(params, batch, *replicated) -> (loss, aux)`` sees whole parameters and this device's rows of the batch;
    its loss and every leaf of ``aux`` must be equal on all devices (sums by ``global_sum``; JAX refuses others).
    ``params`` are global arrays held as ``specs`` say, and so are the gradients.
    """

    def local(shards: PyTree[Array], batch: PyTree[Array], *replicated: PyTree[Array]):
        def loss_of(shards: PyTree[Array]) -> tuple[Float[Array, ""], Aux]:
            return loss_fn(gather(shards, specs), batch, *replicated)

        return jax.value_and_grad(loss_of, has_aux=True)(shards)

    def value_and_grad(params: PyTree[Array], batch: PyTree[Array], *replicated: PyTree[Array]):
        run = _over_data_axes(local, mesh, specs, (P(), _manual(specs)), len(replicated))
        value, grads = run(params, batch, *replicated)
        return value, constrain(grads, specs, mesh)

    return value_and_grad


def sharded_call(function: Callable[..., T], mesh: Mesh, specs: PyTree[P], out_specs: Any) -> Callable[..., T]:
    """``(params, batch, *replicated) -> function(params, batch, *replicated)``; call it under ``jit``.

    As ``sharded_value_and_grad`` without the gradient, for evaluation: ``out_specs`` is ``P()`` for sums over all
    devices and ``eqvision.mesh.BATCH`` for one row per example.
    """

    def local(shards: PyTree[Array], batch: PyTree[Array], *replicated: PyTree[Array]) -> T:
        return function(gather(shards, specs), batch, *replicated)

    def call(params: PyTree[Array], batch: PyTree[Array], *replicated: PyTree[Array]) -> T:
        return _over_data_axes(local, mesh, specs, out_specs, len(replicated))(params, batch, *replicated)

    return call


def _over_data_axes(local: Callable, mesh: Mesh, specs: PyTree[P], out_specs: Any, replicated: int) -> Callable:
    in_specs = (_manual(specs), P(DATA_AXES), *(P(),) * replicated)
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=set(DATA_AXES))


def without_model(spec: P) -> P:
    """What ``shard_map`` is told, which is manual over ``data`` and ``fsdp``: ``model`` stays with the compiler."""
    return _trimmed([None if axis == "model" else axis for axis in spec])


def _manual(specs: PyTree[P]) -> PyTree[P]:
    return jax.tree.map(without_model, specs)


def device_bytes(tree: PyTree[Leaf], where: PyTree[NamedSharding]) -> int:
    """Bytes that one device holds of ``tree`` (arrays or shapes) placed by the shardings ``where``."""
    return sum(
        _leaf_bytes(leaf, sharding)
        for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(where), strict=True)
    )


def _leaf_bytes(leaf: Leaf, sharding: NamedSharding) -> int:
    return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def sharding_table(tree: PyTree[Leaf], mesh: Mesh | AbstractMesh, *, min_size: int = MIN_SIZE) -> str:
    """How ``tree`` is split: the rules, then leaf, shape, spec, rule, bytes on one device, and the totals."""
    where = shardings(parameter_specs(tree, mesh, min_size=min_size), mesh)
    rows = [("parameter", "shape", "split over", "rule", "bytes/device")]
    pairs = zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(where), strict=True)
    for (path, leaf), sharding in pairs:
        name, shape = _name(path), "x".join(map(str, leaf.shape)) or "scalar"
        axes = (*sharding.spec, *(None,) * (leaf.ndim - len(sharding.spec)))
        split = ", ".join(str(axis or "-") for axis in axes) if any(axes) else "replicated"
        number = str(RULES.index(matching_rule(name)) + 1)
        rows.append((name, shape, split, number, f"{_leaf_bytes(leaf, sharding):,}"))
    here, whole = device_bytes(tree, where), sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    return "\n".join([_rules_text(mesh, min_size), "", *_columns(rows), "", _totals(here, whole)])


def _rules_text(mesh: Mesh | AbstractMesh, min_size: int) -> str:
    sizes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    lines = [f"Mesh {sizes}. Rules, of which the first that matches counts; under {min_size} elements no fsdp:"]
    for number, rule in enumerate(RULES, 1):
        axes = "by size" if rule.axes is None else ", ".join(map(str, rule.axes))
        lines.append(f"  {number}  {rule.pattern or '(any)':45} {axes:12}  {rule.why}")
    return "\n".join(lines)


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _totals(here: int, whole: int) -> str:
    return f"Total {here:,} bytes on each device of {whole:,} ({here / whole:.3f})"
