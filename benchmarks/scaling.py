"""What one device holds and sends in a training step, for 1 to 1,024 devices and several layouts, by counting.

Run from the repository root::

    python benchmarks/scaling.py --csv benchmarks/results/scaling.csv > benchmarks/results/scaling.md
    python benchmarks/scaling.py vit_h14 --images 8

Nothing runs and nothing is allocated: models are built as shapes, split by the rules of eqvision/sharding.py over
meshes that need not exist, and bytes are added up. tests/test_sharding.py compares the collectives with those of the
compiled step on 8 devices. It is no prediction of time.
"""

import argparse
import csv
import functools
import math
import re
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import eqvision
from benchmarks import timing
from eqvision.counting import count_model
from eqvision.layers import BatchNorm, TransformerStack
from eqvision.mesh import AXES
from eqvision.sharding import device_bytes, parameter_specs, shardings

MODELS = ("resnet50", "vit_b16", "vit_G14")
DEVICES = (1, 8, 16, 64, 256, 1024)
IMAGES = 32  # for each device, whatever the layout: the global batch grows with the number of devices
FLOAT = 4
PACKAGES = ("jax", "equinox", "eqvision")


class Traffic(NamedTuple):
    """Bytes of the buffers of a step's collectives on one device, by kind.

    All-gather: what comes out; reduce-scatter: what goes in; all-reduce: the buffer. ``sent`` is what a ring sends:
    (n - 1) / n of the buffer, twice for all-reduce.
    """

    all_gather: int
    reduce_scatter: int
    all_reduce: int
    sent: float


class Row(NamedTuple):
    """One model on one mesh; bytes on one device."""

    model: str
    devices: int
    layout: str
    parameters: int
    optimizer: int
    average: int
    gradients: int
    whole: int
    activations: int
    all_gather: int
    reduce_scatter: int
    all_reduce: int
    sent: int


def abstract_mesh(data: int, fsdp: int, model: int) -> AbstractMesh:
    """A mesh of devices that need not exist."""
    return AbstractMesh((data, fsdp, model), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def layouts(devices: int, heads: int) -> list[tuple[int, int, int]]:
    """(data, fsdp, model): all on data; all on fsdp; fsdp within 8 devices; for transformers also 4 on model."""
    found = [(devices, 1, 1), (1, devices, 1), (devices // 8, 8, 1)]
    if heads % 4 == 0:
        found += [(devices // 4, 1, 4), (devices // 32, 8, 4)]
    return list(dict.fromkeys(layout for layout in found if math.prod(layout) == devices))


def traffic(tree, specs, mesh, images: int, tokens: int = 0) -> Traffic:
    """Collectives of a step: of parameters and gradients, of batch norm, and of the layers split over ``model``.

    ``images`` are those of one part of the batch, ``tokens`` those of one image. Sums of a few scalars (the loss, the
    norm of the gradient) are left out.
    """
    found = [
        _parameter_traffic(leaf, spec, mesh)
        for leaf, spec in zip(jax.tree.leaves(tree), jax.tree.leaves(specs), strict=True)
    ]
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    found.append(_all_reduce(_batch_norm_bytes(tree, specs), shards))
    found.append(_all_reduce(_model_bytes(tree, images * tokens), mesh.shape["model"]))
    return Traffic(*(sum(column) for column in zip(*found, strict=True)))


def _parameter_traffic(leaf, spec: P, mesh) -> Traffic:
    data, fsdp = mesh.shape["data"], mesh.shape["fsdp"]
    size = leaf.size * FLOAT // (mesh.shape["model"] if "model" in spec else 1)
    if "fsdp" not in spec:
        return _all_reduce(size, data * fsdp)
    ring = (fsdp - 1) / fsdp
    part = _all_reduce(size // fsdp, data)
    return Traffic(size, size, part.all_reduce, 2 * ring * size + part.sent)


def _all_reduce(size: int, devices: int) -> Traffic:
    return Traffic(0, 0, size, 2 * (devices - 1) / devices * size) if devices > 1 else Traffic(0, 0, 0, 0.0)


def _batch_norm_bytes(tree, specs) -> int:
    """Mean and variance forward; backward the gradients of weight and bias, which the input's gradient needs.

    Where those are replicated the sum is the parameter's own, which is counted there: the compiler takes it once.
    """
    total = 0
    for norm, spec in zip(_of_kind(tree, BatchNorm), _of_kind(specs, BatchNorm), strict=True):
        total += norm.weight.size * FLOAT * (2 + ("fsdp" in spec.weight) + ("fsdp" in spec.bias))
    return total


def _model_bytes(tree, tokens: int) -> int:
    """For each block, sums over ``model`` of (tokens, width): after attention and MLP; backward before them.

    Backward the gradients that query, key and value give to their common input are summed one by one.
    """
    stacks = _of_kind(tree, TransformerStack)
    return sum(stack.depth * (2 + 4) * tokens * stack.blocks.norm1.weight.shape[-1] * FLOAT for stack in stacks)


def _of_kind(tree, kind: type[eqx.Module]) -> list:
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in nodes if isinstance(node, kind)]


def heads_of(tree) -> int:
    """Heads of the transformer, 1 where there is none: what decides how far ``model`` can split it."""
    stacks = _of_kind(tree, TransformerStack)
    return stacks[0].blocks.attention.num_heads if stacks else 1


@functools.cache
def shapes_of(name: str, image_size: int):
    """The model's parameters as shapes."""
    return jax.eval_shape(lambda: eqvision.create(name, image_size=image_size, key=jax.random.key(0))[0])


@functools.cache
def _activations(name: str, image_size: int) -> int:
    return count_model(name, image_size).activations


def row(name: str, layout: tuple[int, int, int], images: int, image_size: int) -> Row:
    tree = shapes_of(name, image_size)
    mesh = abstract_mesh(*layout)
    specs = parameter_specs(tree, mesh)
    held = device_bytes(tree, shardings(specs, mesh))
    used = traffic(tree, specs, mesh, images * layout[2], _tokens(name, image_size))
    # Of the products alone, as timm counts; `model` devices share most of them, for `model` times the images.
    activations = round(_activations(name, image_size) * images * FLOAT)
    return Row(
        name,
        math.prod(layout),
        "x".join(map(str, layout)),
        held,
        2 * held,
        held,
        held,
        2 * used.all_gather,
        activations,
        used.all_gather,
        used.reduce_scatter,
        used.all_reduce,
        round(used.sent),
    )


def _tokens(name: str, image_size: int) -> int:
    """Tokens of one image of a ViT, its class token included; the name ends with the patch size."""
    patch = re.fullmatch(r"vit_[a-zA-Z]+(\d+)", name)
    return 0 if patch is None else (image_size // int(patch.group(1))) ** 2 + 1


def collective_bytes(hlo: str, fsdp: int) -> Counter[str]:
    """Bytes of the collectives in a compiled program's text, as ``Traffic`` counts them; loops by their trip count."""
    bodies = _computations(hlo)
    entry = next(name for name in bodies if name.startswith("ENTRY"))
    return _bytes_of(entry, bodies, fsdp)


def _computations(hlo: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in hlo.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            found[("ENTRY " if head.group(1) else "") + head.group(2)] = current = []
        elif line.startswith("  "):
            current.append(line)
    return found


def _bytes_of(name: str, bodies: dict[str, list[str]], fsdp: int) -> Counter[str]:
    total: Counter[str] = Counter()
    for line in bodies[name]:
        kind = re.search(r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", line)
        if kind and not re.search(r"replica_groups=(\{\{\d+\}|\[\d+,1\]<=)", line):  # groups of one send nothing
            size = _result_bytes(line[: kind.start()])
            total[kind.group(1)] += size * (fsdp if kind.group(1) == "reduce-scatter" else 1)
        body = re.search(r" while\(.*body=%?([\w.\-]+)", line)
        if body:
            times = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            if times is None:
                raise ValueError(f"a loop of unknown length: {line.strip()[:200]}")
            inner = _bytes_of(body.group(1), bodies, fsdp)
            total.update({kind: size * int(times.group(1)) for kind, size in inner.items()})
        called = re.search(r" (?:call|conditional)\(.*(?:to_apply)=%?([\w.\-]+)", line)
        if called:
            total.update(_bytes_of(called.group(1), bodies, fsdp))
    return total


def _result_bytes(text: str) -> int:
    widths = {"f64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2}
    shapes = re.findall(r"\b(f64|f32|s32|u32|bf16|f16)\[([\d,]*)\]", text.partition(" = ")[2])
    return sum(widths[kind] * math.prod(int(size) for size in sizes.split(",") if size) for kind, sizes in shapes)


def table(rows: Sequence[Row]) -> str:
    """Markdown, in MB (1e6 bytes)."""
    lines = [
        "| " + " | ".join(name.replace("_", " ") for name in Row._fields) + " |",
        "| --- " * 3 + "| ---: " * 10 + "|",
    ]
    for each in rows:
        numbers = (f"{value / 1e6:,.1f}" for value in each[3:])
        lines.append(f"| {' | '.join([each.model, f'{each.devices:,}', each.layout, *numbers])} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), help="names in the zoo")
    parser.add_argument("--images", type=int, default=IMAGES, help="images for each device")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--csv", type=Path, help="also write the table, in bytes, to this file")
    given = parser.parse_args(arguments)
    rows = [
        row(name, layout, given.images, given.image_size)
        for name in given.models
        for devices in DEVICES
        for layout in layouts(devices, heads_of(shapes_of(name, given.image_size)))
    ]
    command = shlex.join(["python", "benchmarks/scaling.py", *(sys.argv[1:] if arguments is None else arguments)])
    print(f"`{command}` with {timing.versions(PACKAGES)}\n")
    print(f"Analytic, in MB on one device: float32, AdamW and an average, {given.images} images of")
    print(f"{given.image_size} px for each device. Layout is data x fsdp x model.\n")
    print(table(rows))
    if given.csv:
        with given.csv.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([Row._fields, *rows])


if __name__ == "__main__":
    main()
