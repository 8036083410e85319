"""What language models are trained on, example by example: each a pure function of its place and a generator.

``MaskedExamples`` for BERT, ``SpanExamples`` for T5, ``CausalExamples`` for models that write on.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from eqvision.data.text.corpus import Corpus, describe_tokens
from eqvision.data.text.spans import corrupt_spans, corrupted_lengths, noise_mask, num_noise_and_spans, text_length
from eqvision.data.text.tokenizer import Tokenizer
from eqvision.types import LanguageBatch, TextTokens

FOLLOWS, RANDOM = 0, 1  # classes of BERT's second task, as published


class TextExample(NamedTuple):
    """A row of a ``LanguageBatch``; what is shorter than the batch's rows is filled up there."""

    ids: list[int]
    targets: list[int]
    second: int | None = None
    """Where the second text begins; None for single texts."""
    positions: list[int] | None = None
    next_sentence: int | None = None


@runtime_checkable
class TextExamples(Protocol):
    """A source of the loop's: examples by index."""

    def __len__(self) -> int: ...

    def example(self, index: int, rng: np.random.Generator) -> TextExample: ...

    def collate(self, examples: list[TextExample], indices: list[int], num_rows: int) -> LanguageBatch:
        """Arrays of ``num_rows``; rows behind the examples have weight 0 and index -1."""
        ...

    def describe(self, index: int) -> str: ...


class MaskedExamples:
    """BERT's (Devlin et al. 2019, 3.1 and A.1): of each text 15 % of the tokens are to be told; 80 % of these are
    hidden by ``[MASK]``, 10 % are another token of the vocabulary, 10 % stay.

    With ``next_sentence`` an example is two texts: lines of a document up to ``length`` tokens, cut at one of them;
    half of the time the second is a stretch of the text from elsewhere. ``short`` is the share of examples of random
    smaller lengths. Without it an example is ``length`` tokens of the text, ends of documents disregarded (RoBERTa's).
    Raises ValueError for a tokenizer without ``[MASK]`` and a length without room.
    """

    num_skipped, class_names = 0, ()

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        *,
        length: int,
        share: float = 0.15,
        next_sentence: bool = True,
        short: float = 0.1,
        name: str = "text",
    ):
        special, around = tokenizer.special, 3 if next_sentence else 2
        if special.mask is None or special.start is None:
            raise ValueError(f"hidden words need a tokenizer of BERT; this one is of {tokenizer.dialect.name}")
        if not 0 < share < 1 or not 0 <= short <= 1:
            raise ValueError(f"share={share}, short={short}; expected shares of tokens and of examples, below 1")
        if length < around + 4:
            raise ValueError(f"length={length} has no room for texts: {around} tokens stand around them")
        self._corpus, self._tokenizer, self._length, self._share = corpus, tokenizer, length, share
        self._next, self._short, self._name = next_sentence, short, name
        self._start, self._end, self._mask = special.start, special.end, special.mask
        self._room = length - around
        self._chunks = line_chunks(corpus, self._room) if next_sentence else windows(len(corpus.ids), self._room)
        self.num_positions = max(1, round(self._room * share))

    def __len__(self) -> int:
        return len(self._chunks)

    def describe(self, index: int) -> str:
        first, last = self._chunks[index].tolist()
        return describe_tokens(self._corpus, self._tokenizer, first, last, self._name)

    def example(self, index: int, rng: np.random.Generator) -> TextExample:
        if self._next:
            first, second, label = self._pair(index, rng)
        else:
            (first, second), label = (self._stretch(*self._chunks[index].tolist()), None), None
        ids = [self._start, *first, self._end, *([] if second is None else [*second, self._end])]
        text = [*range(1, 1 + len(first)), *range(2 + len(first), len(ids) - 1)]
        hidden, positions, targets = self._hide(ids, text, rng)
        return TextExample(hidden, targets, None if second is None else 2 + len(first), positions, label)

    def _pair(self, index: int, rng: np.random.Generator) -> tuple[list[int], list[int], int]:
        """Both kinds of second texts end where a chunk ends, and are about as long: neither tells which it is."""
        first, last = self._chunks[index].tolist()
        most = int(rng.integers(2, self._room + 1)) if rng.random() < self._short else self._room
        if last > first + most:
            last = self._line_before(first, first + most)
        cut = self._cut(first, last, rng)
        start = self._stretch(first, cut)
        if cut < last and rng.random() < 0.5:
            return start, self._stretch(cut, last), FOLLOWS
        return start, self._elsewhere(index, max(last - cut, 1), most - len(start), rng), RANDOM

    def _line_before(self, first: int, last: int) -> int:
        """The last line that begins behind ``first`` and not behind ``last``; ``last`` where there is none."""
        line = int(self._corpus.lines[np.searchsorted(self._corpus.lines, last, side="right") - 1])
        return line if line > first else last

    def _cut(self, first: int, last: int, rng: np.random.Generator) -> int:
        """A line that begins inside, or any token where none does; ``last`` where there is a single token."""
        begin, end = np.searchsorted(self._corpus.lines, [first + 1, last])
        if begin < end:
            return int(self._corpus.lines[rng.integers(begin, end)])
        return int(rng.integers(first + 1, last)) if last - first > 1 else last

    def _elsewhere(self, index: int, wanted: int, most: int, rng: np.random.Generator) -> list[int]:
        """The last lines of another chunk, about as many tokens as ``wanted``; of a text that has a single chunk, of
        that."""
        other = int(rng.integers(len(self) - 1)) if len(self) > 1 else 0
        first, last = self._chunks[other + (other >= index and len(self) > 1)].tolist()
        begin, end = np.searchsorted(self._corpus.lines, [max(first, last - most), last])
        lines = self._corpus.lines[begin:end]
        if not len(lines):
            return self._stretch(max(first, last - wanted), last)
        return self._stretch(int(lines[np.argmin(np.abs(lines - (last - wanted)))]), last)

    def _stretch(self, first: int, last: int) -> list[int]:
        return self._corpus.ids[first:last].tolist()

    def _hide(
        self, ids: list[int], text: list[int], rng: np.random.Generator
    ) -> tuple[list[int], list[int], list[int]]:
        """What the model sees, which places it is asked for, and what stood there."""
        count = min(max(1, round(len(text) * self._share)), self.num_positions)
        positions = sorted(rng.choice(len(text), count, replace=False).tolist())
        positions = [text[place] for place in positions]
        fates, others = rng.random(count), rng.integers(self._tokenizer.vocab_size, size=count)
        hidden = list(ids)
        for place, fate, other in zip(positions, fates.tolist(), others.tolist(), strict=True):
            hidden[place] = self._mask if fate < 0.8 else other if fate < 0.9 else ids[place]
        return hidden, positions, [ids[place] for place in positions]

    def collate(self, examples: list[TextExample], indices: list[int], num_rows: int) -> LanguageBatch:
        text = _texts([e.ids for e in examples], num_rows, self._length, self._tokenizer.special.pad)
        segments = np.zeros(text.ids.shape, np.int32)
        for row, example in enumerate(examples):
            if example.second is not None:
                segments[row, example.second : len(example.ids)] = 1
        asked = [example.positions or [] for example in examples]
        positions = _texts(asked, num_rows, self.num_positions, 0).ids
        labels = np.zeros(num_rows, np.int32)
        labels[: len(examples)] = [example.next_sentence or 0 for example in examples]
        targets = _texts([e.targets for e in examples], num_rows, self.num_positions, 0)
        text = text._replace(segments=segments)
        return _batch(
            text, targets, indices, num_rows, positions=positions, next_sentence=labels if self._next else None
        )


class SpanExamples:
    """T5's: ``length`` tokens of source, end token included, from as much text as gives so many; see ``spans.py``.

    Ends of documents are disregarded; the last example may be shorter. Raises ValueError for a tokenizer without
    sentinels or with too few.
    """

    num_skipped, class_names = 0, ()

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        *,
        length: int,
        share: float = 0.15,
        mean: float = 3.0,
        name: str = "text",
    ):
        if not 0 < share < 1 or mean < 1 or length < 4:
            raise ValueError(
                f"length={length}, share={share}, mean={mean}; expected 4 tokens or more, a share of them below 1, and "
                "spans of 1 token or more"
            )
        self._corpus, self._tokenizer, self._name = corpus, tokenizer, name
        self._length, self._share, self._mean = length, share, mean
        room = text_length(length, share=share, mean=mean)
        self.target_length = corrupted_lengths(room, share=share, mean=mean)[1]
        spans, known = num_noise_and_spans(room, share=share, mean=mean)[1], len(tokenizer.sentinels)
        if spans > known:
            raise ValueError(
                f"length={length} has {spans} spans, and the tokenizer ({tokenizer.dialect.name}) has {known} "
                "sentinels such as <extra_id_0>; take shorter texts, or a tokenizer of T5 with as many"
            )
        self._chunks = windows(len(corpus.ids), room)

    def __len__(self) -> int:
        return len(self._chunks)

    def describe(self, index: int) -> str:
        first, last = self._chunks[index].tolist()
        return describe_tokens(self._corpus, self._tokenizer, first, last, self._name)

    def example(self, index: int, rng: np.random.Generator) -> TextExample:
        first, last = self._chunks[index].tolist()
        ids = np.asarray(self._corpus.ids[first:last], np.int64)
        mask = noise_mask(len(ids), rng, share=self._share, mean=self._mean)
        source, target = corrupt_spans(ids, mask, self._tokenizer.sentinels, self._tokenizer.special.end)
        return TextExample(source.tolist(), target.tolist())

    def collate(self, examples: list[TextExample], indices: list[int], num_rows: int) -> LanguageBatch:
        pad = self._tokenizer.special.pad
        text = _texts([e.ids for e in examples], num_rows, self._length, pad)
        targets = _texts([e.targets for e in examples], num_rows, self.target_length, pad)
        return _batch(text, targets, indices, num_rows)


class CausalExamples:
    """Of models that write on: ``length`` tokens, and for each the one that follows it. All tokens but the text's first
    are a target once; ends of documents are disregarded."""

    num_skipped, class_names = 0, ()

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, *, length: int, name: str = "text"):
        if length < 1:
            raise ValueError(f"length={length}; expected 1 token or more")
        self._corpus, self._tokenizer, self._length, self._name = corpus, tokenizer, length, name
        self._chunks = windows(len(corpus.ids) - 1, length, least=1)

    def __len__(self) -> int:
        return len(self._chunks)

    def describe(self, index: int) -> str:
        first, last = self._chunks[index].tolist()
        return describe_tokens(self._corpus, self._tokenizer, first, last, self._name)

    def example(self, index: int, rng: np.random.Generator) -> TextExample:
        first, last = self._chunks[index].tolist()
        ids = self._corpus.ids[first : last + 1].tolist()
        return TextExample(ids[:-1], ids[1:])

    def collate(self, examples: list[TextExample], indices: list[int], num_rows: int) -> LanguageBatch:
        pad = self._tokenizer.special.pad
        text = _texts([e.ids for e in examples], num_rows, self._length, pad)
        targets = _texts([e.targets for e in examples], num_rows, self._length, pad)
        return _batch(text, targets, indices, num_rows)


# Where examples begin and end


def windows(total: int, length: int, *, least: int = 2) -> Int[np.ndarray, "k 2"]:
    """First and last (exclusive) of stretches one behind the other; a rest of fewer than ``least`` is left out."""
    first = np.arange(0, max(total - least + 1, 0), length, dtype=np.int64)
    return np.stack([first, np.minimum(first + length, total)], axis=1)


def line_chunks(corpus: Corpus, room: int) -> Int[np.ndarray, "k 2"]:
    """Stretches of as many whole lines of a document as fit into ``room`` tokens; longer lines are cut."""
    bounds = np.union1d(corpus.lines, corpus.documents)
    chunks: list[tuple[int, int]] = []
    for start, stop in zip(corpus.documents[:-1].tolist(), corpus.documents[1:].tolist(), strict=True):
        while start < stop:
            end = min(start + room, stop)
            if end < stop:
                line = int(bounds[np.searchsorted(bounds, end, side="right") - 1])
                end = line if line > start else end
            chunks.append((start, end))
            start = end
    return np.array(chunks, np.int64).reshape(-1, 2)


# Batches


def _texts(rows: list[list[int]], num_rows: int, length: int, pad: int) -> TextTokens:
    ids = np.full((num_rows, length), pad, np.int32)
    mask = np.zeros(ids.shape, bool)
    for row, numbers in enumerate(rows):
        ids[row, : len(numbers)], mask[row, : len(numbers)] = numbers, True
    columns: tuple[Any, ...] = (ids, mask)
    return TextTokens(*columns)


def _batch(
    text: TextTokens,
    targets: TextTokens,
    indices: list[int],
    num_rows: int,
    *,
    positions: Any = None,
    next_sentence: Any = None,
) -> LanguageBatch:
    places = np.full(num_rows, -1, np.int32)
    places[: len(indices)] = indices
    weights = (places >= 0).astype(np.float32)
    columns: tuple[Any, ...] = (text, targets.ids, targets.mask, positions, next_sentence, weights, places)
    return LanguageBatch(*columns)
