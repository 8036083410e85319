"""A published checkpoint layout: its rules, how to tell its files from others, and what its models do otherwise."""

import fnmatch
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from eqvision.classifiers import Classifier
from eqvision.pretrained.rules import Rule

# (positions (h, w, d), new (h, w)) -> positions on the new grid
Resample = Callable[[np.ndarray, tuple[int, int]], np.ndarray]


@dataclass(frozen=True)
class Layout:
    """One way in which weights are published.

    ``rules`` gives the table for a model (its shapes suffice). A file is of this layout if every pattern of ``marks``
    fits one of its names and no pattern of ``unlike`` does; ``|`` stands between patterns of which one is enough.
    Tensors that fit ``ignored`` may be in the file and are not read; leaves of ours that begin with one of ``fresh``
    have no counterpart in it.
    """

    name: str
    source: str
    """Whose files these are, for messages and tables: 'timm VisionTransformer'."""
    fits: Callable[[Any], bool]
    """Whether a model of class ``kind`` is of the family that the layout describes."""
    rules: Callable[[Any], tuple[Rule, ...]]
    marks: tuple[str, ...]
    unlike: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the zoo's builder that differ from the row's: what the original computes otherwise (eps, GELU)."""
    from_config: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    """More such arguments from the ``config.json`` beside the file, where there is one."""
    from_tensors: Callable[[Mapping[str, np.ndarray]], Mapping[str, Any]] | None = None
    """More such arguments from the file's own tensors: the size of the vocabulary, a part that only some files have."""
    check: Callable[[Any, Mapping[str, Any]], None] | None = None
    """Raises WeightsError where ``config.json`` tells of another model of the same shapes: of other heads."""
    prepare: Callable[[Any, Mapping[str, np.ndarray], str], Mapping[str, np.ndarray]] | None = None
    """(model, tensors, file) -> the tensors by the rules' names, where files have several names for one tensor."""
    resample: Resample | None = None
    """How the original brings position embeddings to another grid; None for layouts without them."""
    positions: str = "backbone.position.weight"
    """The leaf that ``resample`` is for, (h, w, d); "" for models of no images."""
    image_tower: str = "backbone"
    """The part of the model whose last stride is the size of the patches that ``positions`` are of."""
    image_size: Callable[[Mapping[str, np.ndarray], int], tuple[int, int] | None] | None = None
    """(leaves, patch size) -> height and width in pixels that the file's model is for, where positions do not tell."""
    tables: str = ""
    """Pattern of stacked leaves (depth, rows, columns, heads): biases by relative position inside a window."""
    resample_tables: Resample | None = None
    """How the original brings one such table to another window's (rows, columns); None where it does not."""
    first_conv: str = "backbone.patch_embed.weight"
    """The leaf whose inputs are the channels of the image; "" for models of no images."""
    classes: str = "head.linear.bias"
    """The leaf whose last axis is the number of classes; "" for models that know no classes."""
    class_layers: tuple[str, ...] = ()
    """Patterns of all leaves whose shape may depend on the number of classes, where ``model.head`` is not all."""
    computes: Callable[[Any], bool] = lambda model: True
    """Whether the original library can compute such a model, and not only hold its weights."""
    no_object: int = 0
    """How many of its outputs stand for no class: 1 in DETR."""
    kind: type = Classifier
    """The class of the models."""

    def describes(self, model: Any) -> bool:
        """Whether the layout is one of this model's."""
        return isinstance(model, self.kind) and self.fits(model)

    @property
    def last_layer(self) -> tuple[str, ...]:
        """What the names of the layer for classes begin with; empty where there is none."""
        return (self.classes.rpartition(".")[0],) if self.classes else ()

    def class_count(self, leaves: Mapping[str, Any]) -> int:
        """The number of classes that leaves by our names, arrays or shapes, are for."""
        return leaves[self.classes].shape[-1] - self.no_object

    def recognises(self, names: Collection[str]) -> bool:
        """Whether a file with these tensors is of this layout."""
        return all(_any_fits(mark, names) for mark in self.marks) and not any(
            _any_fits(pattern, names) for pattern in self.unlike
        )

    def found(self, names: Collection[str]) -> float:
        """The share of ``marks`` that the names have: how near a file is."""
        return sum(_any_fits(mark, names) for mark in self.marks) / max(len(self.marks), 1)

    def ignores(self, name: str) -> bool:
        """Whether a tensor of the file may stay unread."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.ignored)


def _any_fits(pattern: str, names: Collection[str]) -> bool:
    alternatives = pattern.split("|")
    return any(each in names or fnmatch.filter(names, each) for each in alternatives)
