"""Weights out again: which layout a model is written in, what would be computed otherwise there, and the writing."""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import numpy as np

from eqvision.names import nearest
from eqvision.pretrained.errors import WeightsError
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts import LAYOUTS
from eqvision.pretrained.leaf_names import named_arrays
from eqvision.pretrained.load import layout_options
from eqvision.zoo import row_of

# Options that only say which tensors there are
STORED = ("norm", "num_queries", "vocab_size", "max_positions", "num_segments", "next_sentence")


def target_layout(model: eqx.Module, state: eqx.nn.State, to: str, source: str | None = None) -> Layout:
    """The layout called ``to``, or the one of the origin ``to`` (timm, hf, torchvision, google ...) for the model.

    Of several, the layout ``source``, which the weights are from, comes first. Raises UnknownNameError for a word
    that is neither, WeightsError naming the layouts that there are for the model.
    """
    possible = [each for each in LAYOUTS.values() if holds(each, model, state)]
    if to in LAYOUTS:
        wanted = LAYOUTS[to]
        if wanted in possible or (wanted.describes(model) and _same_leaves(wanted, model, state)):
            return wanted
        raise _impossible(to, possible)
    if to not in origins():
        raise nearest(to, ["eqvision", *origins(), *LAYOUTS], "layout or origin")
    found = [each for each in possible if to in _origins(each) and each.computes(model)]
    if not found:
        raise _impossible(to, possible)
    return next((each for each in found if each.name == source), found[0])


def holds(layout: Layout, model: eqx.Module, state: eqx.nn.State) -> bool:
    """Whether the layout has names for all leaves of the model and no others, and would be recognised by them."""
    if not layout.describes(model) or not _same_leaves(layout, model, state):
        return False
    return layout.recognises([name for rule in layout.rules(model) for name in rule.their_names])


def _same_leaves(layout: Layout, model: eqx.Module, state: eqx.nn.State) -> bool:
    known = {name for rule in layout.rules(model) for name in rule.our_names}
    return known == set(named_arrays(model, state))


def _impossible(to: str, possible: list[Layout]) -> WeightsError:
    there = ", ".join(f"{each.name} ({each.source})" for each in possible)
    return WeightsError(f"this model cannot be written as {to}; layouts that there are for it: {there}")


def origins() -> list[str]:
    """Words for whose files layouts are of: timm, hf, torchvision, google ..."""
    return sorted({origin for layout in LAYOUTS.values() for origin in _origins(layout)} - {"eqvision"})


def _origins(layout: Layout) -> set[str]:
    """The first part of the name; torchvision's ResNet is timm's too, as its source says. Bare backbones are only
    written by the name of their layout."""
    if layout.name.endswith("_backbone"):
        return set()
    also = {"timm"} if " timm " in layout.source else set()
    return {layout.name.partition("_")[0]} | also


def builder_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments that the zoo's builder of ``name`` is called with: the row's and these."""
    row = inspect.signature(row_of(name)).parameters
    return {parameter: value.default for parameter, value in row.items()} | dict(options)


def computed_otherwise(
    name: str, options: Mapping[str, Any], layout: Layout, config: Mapping[str, Any] | None
) -> list[str]:
    """What the models of ``layout`` compute otherwise than the weights were trained with: ``eps: 1e-12 -> 1e-06``."""
    stored = {key: value for key, value in options.items() if key in STORED}
    here, there = builder_options(name, options), builder_options(name, {**layout_options(layout, config), **stored})
    return [f"{key}: {here[key]} -> {there[key]}" for key in here if here[key] != there.get(key, here[key])]


def write_tensors(tensors: Mapping[str, np.ndarray], file: Path, *, npz: bool) -> None:
    """``.npz``, or safetensors whose header says that torch may read them."""
    if npz:
        arrays: dict[str, Any] = dict(tensors)
        with file.open("wb") as opened:
            np.savez(opened, **arrays)
        return
    from safetensors.numpy import save_file

    save_file(dict(tensors), file, {"format": "pt"})


def write_json(content: Mapping[str, Any], file: Path) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
