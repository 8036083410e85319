"""StableHLO programs by ``jax.export``: ``images -> logits`` with the parameters inside, for any batch size."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from eqvision.data import normalize as normalize_pixels
from eqvision.export.card import Card, ModelFile
from eqvision.export.files import refuse_existing, write_whole
from eqvision.names import nearest
from eqvision.recipes import from_dict, to_dict

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
LIMIT = 2**31 - 2**24  # bytes of parameters: jax.export writes flatbuffers, whose offsets end at 2 GiB


@dataclass(frozen=True)
class Program:
    """What a StableHLO file takes and gives; written beside it as JSON, together with the card."""

    card: Card
    normalize: bool
    """True: takes uint8 pixels 0..255 and normalises them. False: takes floats, normalised by mean and std already."""
    input: str
    """Type and shape of the images; ``b`` is any number from 1."""
    output: str
    """Type and shape of the outputs: logits, before softmax or sigmoid."""
    platforms: tuple[str, ...]
    """Where the program runs: cpu, cuda, rocm, tpu."""
    sha256: str
    """Digest of the StableHLO file."""


@dataclass(frozen=True)
class ExportedModel:
    """A StableHLO file, callable: ``images -> outputs``, compiled once for each batch size."""

    program: Program
    function: Callable[[Array], Array]

    def __call__(self, images: Shaped[np.ndarray, "..."] | Shaped[Array, "..."]) -> Float[Array, "b k"]:
        """Raises ValueError, saying what was expected, for images of another type or shape."""
        card, kind = self.program.card, "uint8" if self.program.normalize else "float32"
        expected = (*card.image_size, card.in_channels)
        if images.dtype != kind or images.ndim != 4 or images.shape[1:] != expected or not len(images):
            what = "pixels 0..255" if self.program.normalize else "normalised images, (pixels / 255 - mean) / std"
            raise ValueError(
                f"this program takes {self.program.input}, {what}; got {images.dtype}{list(images.shape)}. "
                "Prepare the images so, or export again with another --image-size or --normalize/--no-normalize"
            )
        return self.function(jnp.asarray(images))


def sidecar(file: str | Path) -> Path:
    """The JSON beside a StableHLO file."""
    return Path(f"{file}.json")


def export_stablehlo(
    source: ModelFile,
    file: str | Path,
    *,
    normalize: bool = True,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    force: bool = False,
) -> Program:
    """Write ``images -> logits`` with the parameters inside, for any batch size, and its JSON; see ``load_exported``.

    Height and width are those of the card. ``normalize``: uint8 pixels in; else floats that are normalised already.
    Raises FileExistsError unless ``force``, ValueError for an unknown platform and for parameters of over 2 GiB, and
    ImportError without flatbuffers, which ``jax.export`` needs to write a file.
    """
    file = Path(file)
    refuse_existing(file, sidecar(file), force=force)
    exported = _exported(source, normalize, _checked_platforms(platforms))
    try:
        content = bytes(exported.serialize())
    except ImportError as error:
        raise ImportError(f"StableHLO files need flatbuffers: pip install 'eqvision[export]' ({error})") from error
    program = Program(
        card=source.card,
        normalize=normalize,
        input=_text(exported.in_avals[0]),
        output=_text(exported.out_avals[0]),
        platforms=tuple(exported.platforms),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    write_whole(file, lambda path: path.write_bytes(content))
    write_whole(sidecar(file), lambda path: path.write_text(json.dumps(to_dict(program), indent=2) + "\n"))
    return program


def _exported(source: ModelFile, normalize: bool, platforms: tuple[str, ...]) -> Any:
    from jax import export

    model, state, card = source
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((model, state)))
    if size > LIMIT:
        raise ValueError(
            f"{card.model} has {size / 2**30:.1f} GiB of parameters, and a StableHLO file holds 2 GiB; "
            "export it with --format safetensors"
        )

    def run(images: Shaped[Array, "b h w c"]) -> Float[Array, "b k"]:
        pixels = normalize_pixels(images, card.mean, card.std) if normalize else images
        return model(jnp.asarray(pixels), state)[0]

    height, width = card.image_size
    shape = export.symbolic_shape(f"b, {height}, {width}, {card.in_channels}")
    images = jax.ShapeDtypeStruct(shape, jnp.uint8 if normalize else jnp.float32)
    return export.export(jax.jit(run), platforms=platforms)(images)


def _checked_platforms(platforms: Sequence[str]) -> tuple[str, ...]:
    for platform in platforms:
        if platform not in PLATFORMS:
            raise nearest(platform, list(PLATFORMS), "platform")
    if not platforms:
        raise ValueError(f"no platform to export for; name one or more of {', '.join(PLATFORMS)}")
    return tuple(dict.fromkeys(platforms))


def _text(aval: Any) -> str:
    return f"{aval.dtype}[{', '.join(map(str, aval.shape))}]"


def load_exported(file: str | Path) -> ExportedModel:
    """The program of a StableHLO file and what its JSON says. Needs no eqvision model and no checkpoint.

    Raises FileNotFoundError where one of the two is missing, ValueError where they are damaged or do not belong
    together. A file runs on the platforms it was exported for; JAX refuses others by name.
    """
    from jax import export

    program = _read_program(sidecar(file))
    content = Path(file).read_bytes()
    if hashlib.sha256(content).hexdigest() != program.sha256:
        raise ValueError(
            f"{file} is damaged, or {sidecar(file)} belongs to another file: the SHA-256 differs; export it again"
        )
    return ExportedModel(program, jax.jit(export.deserialize(bytearray(content)).call))


def _read_program(file: Path) -> Program:
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist; eqvision export writes it beside the program, keep them together"
        )
    try:
        return from_dict(Program, json.loads(file.read_bytes()))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}; export it again") from error
