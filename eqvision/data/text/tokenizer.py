"""Texts to numbers of a vocabulary and back, by the ``tokenizers`` library (extra [text])."""

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from jaxtyping import Int

from eqvision.names import nearest
from eqvision.types import TextTokens

SENTINEL = "<extra_id_{}>"  # of T5: what stands for the first, second ... span that was taken out


class SpecialTokens(NamedTuple):
    """Tokens that are no text. ``pad`` fills texts up behind (None: number 0); of the others None is what a kind does
    not have."""

    pad: str | None
    end: str
    start: str | None = None
    unknown: str | None = None
    mask: str | None = None


class SpecialIds(NamedTuple):
    """The numbers of ``SpecialTokens``."""

    pad: int
    end: int
    start: int | None
    unknown: int | None
    mask: int | None


class Dialect(NamedTuple):
    """What a kind of tokenizer puts around texts. ``pairs``: it takes two texts at once; ``segments``: it numbers
    them."""

    name: str
    special: SpecialTokens
    pairs: bool
    segments: bool
    word_end: str = ""


BERT = Dialect("BERT", SpecialTokens("[PAD]", "[SEP]", "[CLS]", "[UNK]", "[MASK]"), pairs=True, segments=True)
# OpenAI's code fills with number 0, which is "!" there; Hugging Face's with the end token. A mask hides either.
CLIP = Dialect(
    "CLIP", SpecialTokens(None, "<|endoftext|>", "<|startoftext|>"), pairs=False, segments=False, word_end="</w>"
)
T5 = Dialect("T5", SpecialTokens("<pad>", "</s>", unknown="<unk>"), pairs=True, segments=False)
DIALECTS = {"WordPiece": BERT, "BPE": CLIP, "Unigram": T5}


class Tokenizer:
    """Texts to ``TextTokens`` and back, as BERT, CLIP or T5 was trained with.

    BERT: ``[CLS] text [SEP]``, of pairs ``[CLS] text [SEP] text [SEP]``, with segments. CLIP: ``<|startoftext|> text
    <|endoftext|>``. T5: ``text </s>``. Tokens that are no text, such as ``[MASK]``, are understood inside texts.
    Characters that the vocabulary lacks become the unknown token (CLIP has every byte). Made by the functions beside
    it. Raises ValueError for a backend that is none of these, or lacks a special token.
    """

    def __init__(self, backend: Any, *, pad: str | None = None):
        """``backend`` is a ``tokenizers.Tokenizer``; ``pad`` names another token to fill texts up with."""
        kind = type(backend.model).__name__
        if kind not in DIALECTS:
            raise ValueError(f"a tokenizer of kind {kind}; expected {', '.join(DIALECTS)} (BERT, CLIP, T5)")
        self._backend, self.dialect = backend, DIALECTS[kind]
        if self.dialect is CLIP and backend.model.end_of_word_suffix != CLIP.word_end:
            raise ValueError(
                f"byte pairs whose words end in {backend.model.end_of_word_suffix!r} are not those of CLIP, which end "
                f"in {CLIP.word_end!r}; vocabularies of GPT and its kin do not fit"
            )
        backend.no_truncation()
        backend.no_padding()
        special = self.dialect.special
        self.special = self._numbers(special if pad is None else special._replace(pad=pad))

    def _numbers(self, tokens: SpecialTokens) -> SpecialIds:
        missing = [token for token in tokens if token is not None and self._backend.token_to_id(token) is None]
        if missing:
            raise ValueError(
                f"the vocabulary lacks {', '.join(missing)}, which {self.dialect.name} needs; is it of another model?"
            )
        found: list[Any] = [None if token is None else self._backend.token_to_id(token) for token in tokens]
        return SpecialIds(found[0] or 0, *found[1:])

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest number: the rows that a model's embedding needs at least."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def sentinels(self) -> tuple[int, ...]:
        """T5: the numbers that stand for the first, second ... span that was taken out; of others none."""
        found: list[int] = []
        while (number := self._sentinel(len(found))) is not None:
            found.append(number)
        return tuple(found)

    def _sentinel(self, place: int) -> int | None:
        names = (SENTINEL.format(place), "▁" + SENTINEL.format(place))  # the second is mT5's
        return next((n for n in map(self._backend.token_to_id, names) if n is not None), None)

    def id_of(self, token: str) -> int:
        """The number of a token. Raises UnknownNameError with the nearest tokens."""
        number = self._backend.token_to_id(token)
        if number is None:
            raise nearest(token, list(self._backend.get_vocab(with_added_tokens=True)), "token")
        return number

    def token_of(self, number: int) -> str:
        """The token of a number. Raises ValueError for one that the vocabulary does not have."""
        token = self._backend.id_to_token(int(number)) if number >= 0 else None
        if token is None:
            raise ValueError(f"the vocabulary has no token of number {number}; it has {self.vocab_size}")
        return token

    def ids_of(self, texts: Sequence[str]) -> list[list[int]]:
        """The numbers of whole texts, with nothing put around them. Raises as ``encode_batch``."""
        _check_texts(texts, "texts")
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_batch(
        self, texts: Sequence[str], length: int, *, pairs: Sequence[str] | None = None, truncate: bool = True
    ) -> TextTokens:
        """Numpy arrays of ``length`` columns: texts that are too long lose their end but keep the end token, others
        are filled up behind. ``pairs`` are the second texts of BERT or T5, of which the longer loses first.

        An empty text is the tokens around it alone. Raises ValueError where ``truncate`` is off and a text is too long
        (naming it), for a length that holds no text, and for pairs that do not fit; TypeError for what is no text.
        """
        first = self.ids_of(texts)
        second = [None] * len(first) if pairs is None else self._seconds(pairs, len(first))
        room = length - self._num_around(pairs is not None)
        if room < 1:
            raise ValueError(f"length={length} holds no text: {length - room} tokens stand around it; give more")
        rows = [self._cut(a, b, room, truncate, index) for index, (a, b) in enumerate(zip(first, second, strict=True))]
        return self._filled([self._assembled(a, b) for a, b in rows], length)

    def _seconds(self, pairs: Sequence[str], count: int) -> list[list[int]]:
        if not self.dialect.pairs:
            raise ValueError(f"{self.dialect.name} takes one text at a time; leave out pairs")
        if len(pairs) != count:
            raise ValueError(f"{len(pairs)} second texts (pairs) for {count} texts; expected one for each")
        return self.ids_of(pairs)

    def _num_around(self, pair: bool) -> int:
        return (self.special.start is not None) + 1 + pair

    def _cut(
        self, first: list[int], second: list[int] | None, room: int, truncate: bool, index: int
    ) -> tuple[list[int], list[int] | None]:
        total = len(first) + len(second or ())
        if total > room and not truncate:
            raise ValueError(
                f"text {index} has {total} tokens and {room} fit (without those around it): shorten it, give a larger "
                "length, or truncate=True"
            )
        if second is None:
            return first[:room], None
        keep, other = kept_lengths(len(first), len(second), room)
        return first[:keep], second[:other]

    def _assembled(self, first: list[int], second: list[int] | None) -> tuple[list[int], int]:
        """The tokens of a row, and how many of them are of the first text."""
        start = [] if self.special.start is None else [self.special.start]
        ids = [*start, *first, self.special.end]
        return (ids, len(ids)) if second is None else ([*ids, *second, self.special.end], len(ids))

    def _filled(self, rows: list[tuple[list[int], int]], length: int) -> TextTokens:
        ids = np.full((len(rows), length), self.special.pad, np.int32)
        mask, segments = np.zeros(ids.shape, bool), np.zeros(ids.shape, np.int32)
        for row, (numbers, first) in enumerate(rows):
            ids[row, : len(numbers)], mask[row, : len(numbers)] = numbers, True
            segments[row, first : len(numbers)] = 1
        columns: tuple[Any, ...] = (ids, mask, segments if self.dialect.segments else None)
        return TextTokens(*columns)

    def decode(self, ids: Sequence[int] | Int[np.ndarray, " n"], *, special: bool = False) -> str:
        """The text of numbers, as far as the vocabulary kept it (case, spaces); ``special`` shows the tokens that are
        no text. Raises ValueError for numbers that the vocabulary does not have."""
        numbers = [int(number) for number in np.asarray(ids)]
        check_ids(np.array(numbers, np.int64), self.vocab_size, "ids")
        text = self._backend.decode(numbers, skip_special_tokens=not special)
        return text.replace(self.dialect.word_end, " ").strip() if self.dialect.word_end else text

    def decode_batch(self, tokens: TextTokens, *, special: bool = False) -> list[str]:
        """The text of each row, without what fills it up."""
        ids, mask = np.asarray(tokens.ids), np.asarray(tokens.mask)
        return [self.decode(row[real], special=special) for row, real in zip(ids, mask, strict=True)]

    def require_fits(self, vocab_size: int, model: str = "the model") -> None:
        """Raise ValueError where the vocabulary has numbers that the model's embedding has no rows for."""
        if self.vocab_size > vocab_size:
            raise ValueError(
                f"the tokenizer has {self.vocab_size} tokens and {model} {vocab_size}: it is of another model; take "
                "the vocabulary that belongs to the weights, or a model with as many rows"
            )

    def save(self, path: str | os.PathLike) -> None:
        """Write one ``tokenizer.json``, which ``load_tokenizer`` and other libraries read."""
        from eqvision.data.cache import write_whole

        write_whole(Path(path), lambda file: file.write(self.to_json().encode()))

    def to_json(self) -> str:
        """What ``save`` writes; equal for tokenizers that do the same."""
        return cast(str, self._backend.to_str(pretty=True))


def check_ids(ids: Int[np.ndarray, "*n"], vocab_size: int, what: str = "ids") -> None:
    """Raise ValueError for numbers outside 0..vocab_size - 1, which JAX would take for the nearest in silence."""
    wrong = np.argwhere((ids < 0) | (ids >= vocab_size))
    if len(wrong):
        place = tuple(wrong[0].tolist())
        raise ValueError(
            f"{what}{list(place)} is {ids[place]}, and the vocabulary has {vocab_size} tokens (0..{vocab_size - 1}): "
            "the text was encoded with the vocabulary of another model"
        )


def kept_lengths(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of each of two texts fit into ``room``: the longer loses first, as in Hugging Face's library."""
    if first + second <= room:
        return first, second
    short = min(first, second)
    long = max(short, room - short)
    if short + long > room:
        short, long = room // 2, room - room // 2
    return (short, long) if first <= second else (long, short)


def _check_texts(texts: Sequence[str], what: str) -> None:
    if isinstance(texts, (str, bytes)):
        raise TypeError(f"{what} is one text; expected a list of texts")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{what}[{index}] is {type(text).__name__} {str(text)[:40]!r}; expected a text (str)")
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"{what}[{index}] holds half of a surrogate pair, which is no text: {text[:40]!a}")
