"""``eqvision.load``: published weights by name."""

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from eqvision.layers import Implementation, Remat
from eqvision.names import nearest
from eqvision.pretrained.assemble import Sizes, assemble
from eqvision.pretrained.errors import WeightsError, listed
from eqvision.pretrained.files import read_config, read_tensors
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts import LAYOUTS, own
from eqvision.pretrained.locate import locate
from eqvision.zoo import builder

log = logging.getLogger("eqvision.pretrained")


def load(
    name: str,
    source: str | Path | None = None,
    *,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    in_channels: int | None = None,
    layout: str | None = None,
    dropout: float | None = None,
    drop_path: float | None = None,
    remat: Remat | None = None,
    unroll: int | None = None,
    attention: Implementation | None = None,
    key: PRNGKeyArray | None = None,
) -> tuple[Any, eqx.nn.State]:
    """The zoo's model ``name`` with published weights, and its state.

    ``source`` is a file, a folder, ``hf:organisation/repository``, a URL, the tag of a card (``eqvision info NAME``
    lists them), or None for the first card; a file that is there is never asked for on the network. ``num_classes``,
    ``image_size`` and ``in_channels`` are those of the file where they are None. Another number of classes gives a
    fresh last layer (from ``key``), another size resampled positions as the original library does it. A model of
    text has the file's vocabulary and number of positions. The layout is recognised from the names in the file unless
    it is given. The options from ``dropout`` on are those of ``create``.

    Raises UnknownNameError for name or layout, FileNotFoundError with what to download and where to put it, and
    WeightsError with the first names where file and model do not agree to the last tensor.
    """
    options = {"dropout": dropout, "drop_path": drop_path, "remat": remat, "unroll": unroll, "attention": attention}
    given = {option: value for option, value in options.items() if value is not None}
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    wanted = Sizes(num_classes, size, in_channels)
    loaded = read_model(name, source, wanted, layout=layout, options=given, key=key)
    return loaded.model, loaded.state


class Loaded(NamedTuple):
    """A model with published weights, and what was found out about their file."""

    model: Any  # a Model; of which class, the name says
    state: eqx.nn.State
    layout: Layout
    options: dict[str, Any]
    """Arguments of the zoo's builder that the layout and the file set."""
    path: Path
    """The file, or the folder that it is in."""
    config: Mapping[str, Any] | None
    """``config.json`` beside it."""


def read_model(
    name: str,
    source: str | Path | None,
    wanted: Sizes,
    *,
    layout: str | None = None,
    options: Mapping[str, Any] | None = None,
    key: PRNGKeyArray | None = None,
) -> Loaded:
    """What ``load`` does, with what it found out; ``options`` are arguments of the zoo's builder. Raises alike."""
    location = locate(name, source)
    path = location.path
    tensors, config = read_tensors(path), read_config(path)
    chosen = choose_layout(name, tensors, layout or location.layout, where=str(path))
    differences = layout_options(chosen, config, tensors)
    _check_asked(options or {}, chosen, tensors, str(path))
    if chosen.name == own.LAYOUT.name:
        chosen, wanted, differences = _own(name, path, tensors, chosen, wanted)
    build = builder(name, {**differences, **(options or {})})
    key = jax.random.key(0) if key is None else key
    model, state = assemble(build, tensors, chosen, wanted, where=str(path), key=key)
    if chosen.check is not None and config is not None:
        chosen.check(model, config)
    return Loaded(model, state, chosen, differences, path, config)


def _check_asked(options: Mapping[str, Any], layout: Layout, tensors: Mapping[str, np.ndarray], where: str) -> None:
    """Raises WeightsError where another vocabulary, or whatever else the file decides, is asked for."""
    found = {} if layout.from_tensors is None else layout.from_tensors(tensors)
    other = [
        f"{name} is {value} in the file, and {options[name]} is asked for"
        for name, value in found.items()
        if options.get(name, value) != value
    ]
    if other:
        raise WeightsError(f"{where} is of another model (read as layout {layout.name}):{listed(other)}")


def _own(
    name: str, path: Path, tensors: dict[str, np.ndarray], layout: Layout, wanted: Sizes
) -> tuple[Layout, Sizes, dict[str, Any]]:
    """The header of a file of ours: its sizes, unless others are wished, and its options.

    Raises WeightsError for a file of another model, ValueError for a header that is missing or damaged.
    """
    from eqvision.export.tensors import read_checked_card  # export comes after this room

    card = read_checked_card(path / "model.safetensors" if path.is_dir() else path, tensors)
    if card.model != name:
        raise WeightsError(f"{path} holds the model {card.model}, and {name} is asked for; give its name")
    sizes = Sizes(
        wanted.num_classes or card.num_classes,
        wanted.image_size or card.image_size,
        wanted.in_channels or card.in_channels,
    )
    model = eqx.filter_eval_shape(lambda: builder(name, {})(key=jax.random.key(0)))
    family = next((each for each in LAYOUTS.values() if each is not layout and each.describes(model)), None)
    return (layout if family is None else own.like(layout, family)), sizes, dict(card.options)


def layout_options(
    layout: Layout, config: Mapping[str, Any] | None, tensors: Mapping[str, np.ndarray] | None = None
) -> dict[str, Any]:
    """What models of the layout have otherwise than the zoo's row: from the layout, ``config.json`` and the tensors."""
    extra = layout.from_config(config) if layout.from_config and config is not None else {}
    found = layout.from_tensors(tensors) if layout.from_tensors and tensors is not None else {}
    return {**layout.options, **extra, **found}


def choose_layout(name: str, names: Collection[str], layout: str | None, *, where: str) -> Layout:
    """The layout called so, or the one that the names are of, among those of the model's family.

    Raises UnknownNameError for a layout that does not exist, WeightsError where none or several fit.
    """
    if layout is not None:
        if layout not in LAYOUTS:
            raise nearest(layout, list(LAYOUTS), "layout")
        return LAYOUTS[layout]
    recognised = [each for each in LAYOUTS.values() if each.recognises(names)]
    model = eqx.filter_eval_shape(lambda: builder(name, {})(key=jax.random.key(0)))
    fitting = [each for each in recognised if each.describes(model)]
    if len(fitting) == 1:
        return fitting[0]
    first = listed(names)
    if fitting:
        several = ", ".join(each.name for each in fitting)
        raise WeightsError(f"{where} fits several layouts ({several}); choose one with layout=...; it holds:{first}")
    if recognised:
        others = ", ".join(f"{each.name} ({each.source})" for each in recognised)
        raise WeightsError(f"{where} is of layout {others}, which {name} is not a model of; it holds:{first}")
    near = sorted((each for each in LAYOUTS.values() if each.describes(model)), key=lambda each: -each.found(names))[:3]
    raise WeightsError(
        f"{where} is of no known layout for {name}; nearest: "
        f"{', '.join(f'{each.name} ({each.source})' for each in near) or 'none for this family'}; it holds:{first}"
    )
