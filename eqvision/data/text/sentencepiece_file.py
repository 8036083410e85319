"""Vocabularies of SentencePiece (``spiece.model``), read without its library: a small file of protocol buffers."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MODELS = {1: "unigram", 2: "byte pairs", 3: "words", 4: "characters"}
UNIGRAM, UNKNOWN = 1, 2
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # how a field is stored


class Pieces(NamedTuple):
    """A unigram vocabulary: pieces with their log probabilities in order of their numbers, the number of the unknown
    piece, and the table by which characters are normalised (empty: none), as the ``tokenizers`` library takes it."""

    pieces: tuple[tuple[str, float], ...]
    unknown: int
    normalizer: bytes


def read_pieces(path: Path) -> Pieces:
    """Raises ValueError for a file that is no SentencePiece model, or not of unigrams, as T5's are."""
    try:
        fields = list(_fields(path.read_bytes()))
        pieces = [_piece(value) for number, value in fields if number == 1 and isinstance(value, bytes)]
        trained, normalized = _section(fields, 2), _section(fields, 3)
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no SentencePiece model, or is cut off: {error}") from error
    unknown = [number for number, (_, _, kind) in enumerate(pieces) if kind == UNKNOWN]
    model = trained.get(3, UNIGRAM)
    if model != UNIGRAM:
        raise ValueError(f"{path} is a SentencePiece model of {MODELS.get(int(model), model)}; expected unigrams")
    if len(unknown) != 1:
        raise ValueError(f"{path} is no SentencePiece model: {len(pieces)} pieces, {len(unknown)} of them unknown")
    table = normalized.get(2, b"")
    words = tuple((text, score) for text, score, _ in pieces)
    return Pieces(words, unknown[0], table if isinstance(table, bytes) else b"")


Value = int | bytes


def _section(fields: list[tuple[int, Value]], wanted: int) -> dict[int, Value]:
    """The fields of a message inside the message; empty where there is none."""
    found = [value for number, value in fields if number == wanted and isinstance(value, bytes)]
    return dict(_fields(found[0])) if found else {}


def _piece(data: bytes) -> tuple[str, float, int]:
    fields = dict(_fields(data))
    text, score = fields.get(1, b""), fields.get(2, b"\0\0\0\0")
    if not isinstance(text, bytes) or not isinstance(score, bytes):
        raise IndexError("a piece is stored as something else")
    return text.decode(), struct.unpack("<f", score)[0], int(fields.get(3, 1))


def _fields(data: bytes) -> Iterator[tuple[int, Value]]:
    """Number and value of each field of a message: whole numbers, or bytes for all else."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        if tag & 7 == VARINT:
            value, place = _varint(data, place)
            yield tag >> 3, value
            continue
        size, place = _size(data, tag & 7, place)
        if place + size > len(data):
            raise IndexError(f"a field at byte {place} says {size} bytes, and {len(data) - place} are left")
        yield tag >> 3, data[place : place + size]
        place += size


def _size(data: bytes, wire: int, place: int) -> tuple[int, int]:
    """Bytes of a field that is no whole number, and where they begin."""
    if wire == BYTES:
        return _varint(data, place)
    if wire not in (FIXED32, FIXED64):
        raise IndexError(f"a field of kind {wire} at byte {place}")
    return (4 if wire == FIXED32 else 8), place


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """A whole number in groups of seven bits, the lowest first, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise IndexError(f"a number at byte {place - 10} does not end")
