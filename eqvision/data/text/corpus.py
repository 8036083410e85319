"""Texts as one long row of numbers, made once: in memory, and on disk where they are large."""

import hashlib
import io
import itertools
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt

from eqvision.data.cache import cache_file, write_whole
from eqvision.data.text.files import DocumentEnd, TextPart, documents
from eqvision.data.text.tokenizer import Tokenizer

IN_MEMORY = 32 * 2**20  # bytes of text up to which numbers are made anew at each start, in seconds
AT_ONCE = 10_000  # lines given to the tokenizer together
FOOTER = struct.Struct("<QQQ")  # numbers, lines, documents


class Corpus(NamedTuple):
    """``ids`` without any tokens around; ``lines`` and ``documents`` are where each begins, and the end of all."""

    ids: UInt[np.ndarray, " n"]
    lines: Int[np.ndarray, " l"]
    documents: Int[np.ndarray, " d"]


def make_corpus(part: TextPart, tokenizer: Tokenizer, end: DocumentEnd = "blank_line") -> Corpus:
    """The numbers of a part of a text. A part of more than 32 MiB is kept in the cache folder, by files, sizes, times
    and tokenizer, and mapped into memory. Raises ValueError where nothing is left of it, and for what is no UTF-8."""
    if part.num_bytes <= IN_MEMORY:
        buffer = io.BytesIO()
        _write(buffer.write, part, tokenizer, end)
        corpus = _read(np.frombuffer(buffer.getvalue(), np.uint8), _dtype(tokenizer))
    else:
        corpus = _from_cache(part, tokenizer, end)
    if not len(corpus.ids):
        raise ValueError(f"{part} holds no text")
    return corpus


def _from_cache(part: TextPart, tokenizer: Tokenizer, end: DocumentEnd) -> Corpus:
    file = cache_file("texts", _subject(part, tokenizer, end), ".tokens")
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, lambda f: _write(f.write, part, tokenizer, end))
    return _read(np.memmap(file, np.uint8, mode="r"), _dtype(tokenizer))


def _subject(part: TextPart, tokenizer: Tokenizer, end: DocumentEnd) -> str:
    files = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in part.files]
    words = hashlib.sha256(tokenizer.to_json().encode()).hexdigest()
    return json.dumps([files, part.first, part.last, words, end])


def _dtype(tokenizer: Tokenizer) -> type[np.uint16] | type[np.uint32]:
    return np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32


def _write(write: Callable[[bytes], object], part: TextPart, tokenizer: Tokenizer, end: DocumentEnd) -> None:
    """The numbers, where lines and documents begin, and how many there are of each."""
    lengths: list[int] = []
    counts: list[int] = []  # lines of each document
    for batch in _batched(_counted(documents(part, end), counts)):
        rows = tokenizer.ids_of(batch)
        lengths += map(len, rows)
        write(np.fromiter(itertools.chain.from_iterable(rows), _dtype(tokenizer)).tobytes())
    lines = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    starts = lines[np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)]
    write(bytes(-int(lines[-1]) * np.dtype(_dtype(tokenizer)).itemsize % 8))
    write(lines.tobytes() + starts.tobytes() + FOOTER.pack(int(lines[-1]), len(lines), len(starts)))


def _counted(found: Iterator[list[str]], counts: list[int]) -> Iterator[str]:
    for lines in found:
        counts.append(len(lines))
        yield from lines


def _batched(lines: Iterator[str]) -> Iterator[list[str]]:
    while batch := list(itertools.islice(lines, AT_ONCE)):
        yield batch


def _read(data: np.ndarray, dtype: type[np.uint16] | type[np.uint32]) -> Corpus:
    num_ids, num_lines, num_documents = FOOTER.unpack(data[-FOOTER.size :].tobytes())
    size = num_ids * np.dtype(dtype).itemsize
    lines = size + -size % 8
    starts = lines + 8 * num_lines
    return Corpus(
        data[:size].view(dtype),
        np.asarray(data[lines:starts].view(np.int64)),
        np.asarray(data[starts : starts + 8 * num_documents].view(np.int64)),
    )


def describe_tokens(corpus: Corpus, tokenizer: Tokenizer, first: int, last: int, name: Path | str) -> str:
    """Where a stretch of numbers lies and how it begins, for messages."""
    start = tokenizer.decode(np.asarray(corpus.ids[first : min(last, first + 12)], np.int64).tolist())
    return f"{name}, tokens {first}..{last - 1} ({start[:48]!r} ...)"
