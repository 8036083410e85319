"""safetensors files: parameters and statistics by name, with the card and a SHA-256 of it all in the header."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import equinox as eqx
import numpy as np

from eqvision.export.card import Card, ModelFile, with_tensors
from eqvision.export.files import refuse_existing, write_whole
from eqvision.pretrained.leaf_names import named_tensors
from eqvision.recipes import from_dict, to_dict

TEXTS = ("model", "task", "interpolation", "origin")  # fields of the card that are text; the others are written as JSON


def export_safetensors(source: ModelFile, file: str | Path, *, force: bool = False) -> Card:
    """Write parameters by dotted name, running statistics under ``stats.`` and the card; see ``load_safetensors``.

    Raises FileExistsError unless ``force``.
    """
    from safetensors.numpy import save_file

    file = Path(file)
    refuse_existing(file, force=force)
    tensors = named_tensors(source.model, source.state)
    header = {n: value if n in TEXTS else json.dumps(value) for n, value in to_dict(source.card).items()}
    header["sha256"] = _digest(tensors, header)
    write_whole(file, lambda path: save_file(tensors, path, header))
    return source.card


def load_safetensors(file: str | Path) -> tuple[Any, eqx.nn.State]:
    """The model and its statistics, as ``eqvision.create`` would give them.

    Raises FileNotFoundError, and ValueError where the file is damaged, not written by eqvision, or where its tensors
    are not exactly those of the model that it names. ``read_card`` tells the preprocessing.
    """
    header, tensors = _open(file)
    card = _card(file, header)
    model, state, _ = with_tensors(card, tensors, str(file))
    _check_digest(file, header, tensors)
    return model, state


def has_card(file: str | Path) -> bool:
    """Whether a safetensors file has a card in its header: it is one of ours. Raises as ``load_safetensors``."""
    header, _ = _open(file, tensors=False)
    return all(name in header for name in TEXTS)


def read_checked_card(file: str | Path, tensors: dict[str, np.ndarray]) -> Card:
    """The card, after a check that the file's ``tensors`` and header are as they were written."""
    header, _ = _open(file, tensors=False)
    card = _card(file, header)
    _check_digest(file, header, tensors)
    return card


def _check_digest(file: str | Path, header: dict[str, str], tensors: dict[str, np.ndarray]) -> None:
    rest = {name: value for name, value in header.items() if name != "sha256"}
    if header.get("sha256", "") != _digest(tensors, rest):
        raise ValueError(f"{file} is damaged: its contents do not have the SHA-256 that was written with them")


def read_card(file: str | Path) -> Card:
    """The card in the header of a safetensors file. Raises as ``load_safetensors``."""
    return _card(file, _open(file, tensors=False)[0])


def _open(file: str | Path, *, tensors: bool = True) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    from safetensors import SafetensorError, safe_open

    if not Path(file).is_file():
        raise FileNotFoundError(f"no safetensors file at {file}")
    try:
        with safe_open(file, framework="numpy") as opened:
            names = opened.keys() if tensors else ()
            return opened.metadata() or {}, {name: opened.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged, or no safetensors file: {error}") from error


def _card(file: str | Path, header: dict[str, str]) -> Card:
    fields = dataclasses.fields(Card)
    needed = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
    missing = [name for name in needed if name not in header]
    if missing:
        raise ValueError(
            f"{file} was not written by eqvision export: its header lacks {', '.join(missing)}. "
            "Published weights of other projects are not read by this function"
        )
    try:
        names = [field.name for field in fields if field.name in header]
        return from_dict(Card, {n: header[n] if n in TEXTS else json.loads(header[n]) for n in names})
    except ValueError as error:
        raise ValueError(f"the header of {file} is damaged: {error}") from error


def _digest(tensors: dict[str, np.ndarray], header: dict[str, str]) -> str:
    """SHA-256 of all that the file says: names, types, shapes, values, and the header but for this digest."""
    whole = hashlib.sha256(json.dumps(sorted(header.items())).encode())
    for name in sorted(tensors):
        tensor = np.ascontiguousarray(tensors[name])
        whole.update(f"{name} {tensor.dtype}{list(tensor.shape)}".encode())
        whole.update(tensor.reshape(-1).view(np.uint8).data)
    return whole.hexdigest()
