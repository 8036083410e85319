"""StableHLO programs by ``jax.export``, with the parameters inside, for any batch size.

Classifiers: ``images -> logits``. Detectors: ``images, size -> boxes, scores, labels``, all but DETR one image after
the other; masks are left out.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from eqvision.data import normalize as normalize_pixels
from eqvision.data.detection import normalize_padded
from eqvision.detectors import DETR, find_objects
from eqvision.export.card import Card, ModelFile
from eqvision.export.files import refuse_existing, write_whole
from eqvision.names import nearest
from eqvision.recipes import from_dict, to_dict
from eqvision.types import Detections, PaddedImages

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
LIMIT = 2**31 - 2**24  # bytes of parameters: jax.export writes flatbuffers, whose offsets end at 2 GiB


@dataclass(frozen=True)
class Program:
    """What a StableHLO file takes and gives; written beside it as JSON, together with the card."""

    card: Card
    normalize: bool
    """True: takes uint8 pixels 0..255 and normalises them. False: takes floats, normalised by mean and std already."""
    input: str
    """Type and shape of the images; ``b`` is any number from 1. Detectors: also of their sizes, height and width of the
    part that is image and no padding."""
    output: str
    """Type and shape of the outputs: logits, before softmax or sigmoid. Detectors: boxes xyxy in pixels of the images,
    scores and labels, best first."""
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
        _check_images(self.program, images)
        return self.function(jnp.asarray(images))


@dataclass(frozen=True)
class ExportedDetector:
    """A StableHLO file, callable: ``images, size -> Detections``, compiled once for each batch size."""

    program: Program
    function: Callable[[Array, Array], tuple[Array, Array, Array]]

    def __call__(
        self,
        images: Shaped[np.ndarray, "..."] | Shaped[Array, "..."],
        size: Int[np.ndarray, "b 2"] | Int[Array, "b 2"],
    ) -> Detections:
        """Raises ValueError, saying what was expected, for images of another type or shape.

        ``size`` is height and width of the part of each image that is no padding, in whose pixels the boxes are.
        """
        _check_images(self.program, images)
        boxes, scores, labels = self.function(jnp.asarray(images), jnp.asarray(size, jnp.int32))
        return Detections(boxes, scores, labels, scores > 0)  # R-CNN and CenterNet fill up with rows of score 0


def _check_images(program: Program, images: Any) -> None:
    card, kind = program.card, "uint8" if program.normalize else "float32"
    expected = (*card.image_size, card.in_channels)
    if images.dtype != kind or images.ndim != 4 or images.shape[1:] != expected or not len(images):
        what = "pixels 0..255" if program.normalize else "normalised images, (pixels / 255 - mean) / std"
        raise ValueError(
            f"this program takes {program.input}, {what}; got {images.dtype}{list(images.shape)}. "
            "Prepare the images so, or export again with another --image-size or --normalize/--no-normalize"
        )


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
    """Write a program with the parameters inside, for any batch size, and its JSON; see ``load_exported``.

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
        input=", ".join(map(_text, exported.in_avals)),
        output=", ".join(map(_text, exported.out_avals)),
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

    height, width = card.image_size
    shape = export.symbolic_shape(f"b, {height}, {width}, {card.in_channels}")
    images = jax.ShapeDtypeStruct(shape, jnp.uint8 if normalize else jnp.float32)
    if card.task == "detection":
        size = jax.ShapeDtypeStruct((shape[0], 2), jnp.int32)
        return export.export(jax.jit(_detect(source, normalize)), platforms=platforms)(images, size)
    return export.export(jax.jit(_classify(source, normalize)), platforms=platforms)(images)


def _classify(source: ModelFile, normalize: bool) -> Callable[..., Array]:
    model, state, card = source

    def run(images: Shaped[Array, "b h w c"]) -> Float[Array, "b k"]:
        pixels = normalize_pixels(images, card.mean, card.std) if normalize else images
        return model(jnp.asarray(pixels), state)[0]

    return run


def _detect(source: ModelFile, normalize: bool) -> Callable[..., tuple[Array, Array, Array]]:
    model, state, card = source

    def run(images: Shaped[Array, "b h w c"], size: Int[Array, "b 2"]) -> tuple[Array, Array, Array]:
        inputs = normalize_padded(images, size, card.mean, card.std) if normalize else PaddedImages(images, size)
        found = find_objects(model, inputs, state, size, softmax=isinstance(model, DETR))
        return found.boxes, found.scores, found.labels

    return run if isinstance(model, DETR) else _one_by_one(run)


def _one_by_one(run: Callable[..., tuple[Array, Array, Array]]) -> Callable[..., tuple[Array, Array, Array]]:
    """One image after the other: deformable sampling, proposals and peaks need a batch whose size is known when it is
    exported."""

    def mapped(images: Shaped[Array, "b h w c"], size: Int[Array, "b 2"]) -> tuple[Array, Array, Array]:
        return lax.map(lambda each: jax.tree.map(lambda x: x[0], run(each[0][None], each[1][None])), (images, size))

    return mapped


def _checked_platforms(platforms: Sequence[str]) -> tuple[str, ...]:
    for platform in platforms:
        if platform not in PLATFORMS:
            raise nearest(platform, list(PLATFORMS), "platform")
    if not platforms:
        raise ValueError(f"no platform to export for; name one or more of {', '.join(PLATFORMS)}")
    return tuple(dict.fromkeys(platforms))


def _text(aval: Any) -> str:
    return f"{aval.dtype}[{', '.join(map(str, aval.shape))}]"


def load_exported(file: str | Path) -> ExportedModel | ExportedDetector:
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
    kind = ExportedDetector if program.card.task == "detection" else ExportedModel
    return kind(program, jax.jit(export.deserialize(bytearray(content)).call))


def _read_program(file: Path) -> Program:
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist; eqvision export writes it beside the program, keep them together"
        )
    try:
        return from_dict(Program, json.loads(file.read_bytes()))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}; export it again") from error
