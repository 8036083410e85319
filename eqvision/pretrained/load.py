"""``eqvision.load``: published weights by name."""

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
from jaxtyping import PRNGKeyArray

from eqvision.classifiers import Classifier
from eqvision.layers import Implementation, Remat
from eqvision.names import nearest
from eqvision.pretrained.assemble import Sizes, assemble
from eqvision.pretrained.errors import WeightsError, listed
from eqvision.pretrained.files import read_config, read_tensors
from eqvision.pretrained.layout import Layout
from eqvision.pretrained.layouts import LAYOUTS
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
) -> tuple[Classifier, eqx.nn.State]:
    """The zoo's model ``name`` with published weights, and its state.

    ``source`` is a file, a folder, ``hf:organisation/repository``, or None for the known published location; a file
    that is there is never asked for on the network. ``num_classes``, ``image_size`` and ``in_channels`` are those of
    the file where they are None. Another number of classes gives a fresh last layer (from ``key``), another size
    resampled positions as the original library does it. The layout is recognised from the names in the file unless
    it is given. The options from ``dropout`` on are those of ``create``.

    Raises UnknownNameError for name or layout, FileNotFoundError with what to download and where to put it, and
    WeightsError with the first names where file and model do not agree to the last tensor.
    """
    location = locate(name, source)
    tensors, config = read_tensors(location.path), read_config(location.path)
    options = {"dropout": dropout, "drop_path": drop_path, "remat": remat, "unroll": unroll, "attention": attention}
    given = {option: value for option, value in options.items() if value is not None}
    chosen = choose_layout(name, tensors, layout, where=str(location.path))
    build = builder(name, {**layout_options(chosen, config), **given})
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    wanted = Sizes(num_classes, size, in_channels)
    key = jax.random.key(0) if key is None else key
    return assemble(build, tensors, chosen, wanted, where=str(location.path), key=key)


def layout_options(layout: Layout, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """What models of the layout compute otherwise than the zoo's row, from the layout and from ``config.json``."""
    extra = layout.from_config(config) if layout.from_config and config is not None else {}
    return {**layout.options, **extra}


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
    fitting = [each for each in recognised if each.fits(model)]
    if len(fitting) == 1:
        return fitting[0]
    first = listed(names)
    if fitting:
        several = ", ".join(each.name for each in fitting)
        raise WeightsError(f"{where} fits several layouts ({several}); choose one with layout=...; it holds:{first}")
    if recognised:
        others = ", ".join(f"{each.name} ({each.source})" for each in recognised)
        raise WeightsError(f"{where} is of layout {others}, which {name} is not a model of; it holds:{first}")
    near = sorted((each for each in LAYOUTS.values() if each.fits(model)), key=lambda each: -each.found(names))[:3]
    raise WeightsError(
        f"{where} is of no known layout for {name}; nearest: "
        f"{', '.join(f'{each.name} ({each.source})' for each in near) or 'none for this family'}; it holds:{first}"
    )
