"""Tokenizers made from texts. The same texts give the same one (of unigrams, but for rare changes by rounding)."""

import collections
import json
from collections.abc import Iterable
from typing import Any

from eqvision.data.text.tokenizer import Tokenizer
from eqvision.data.text.vocabularies import (
    byte_letters,
    clip_backend,
    clip_preparation,
    clip_vocabulary,
    library,
    unigram_backend,
    unigram_spaces,
    wordpiece_backend,
)

MOST_LETTERS = 1000  # of BERT: rarer ones, such as a few Chinese characters, are unknown
STEP = 1e-4  # by which the library tells letters apart that are no piece by merit


def train_wordpiece(texts: Iterable[str], size: int, *, lowercase: bool = True) -> Tokenizer:
    """BERT's kind with at most ``size`` tokens: special ones, characters (the 1,000 most frequent), pieces that come
    twice or more. Raises ValueError for no texts, and for a size without room for the characters."""
    texts = _some(texts)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    like = wordpiece_backend({token: number for number, token in enumerate(special)}, lowercase=lowercase)
    letters = _alphabet(like.normalizer, texts)
    trained = _trained((like.normalizer, like.pre_tokenizer), texts, size, special, letters, prefix="##")
    vocabulary = _model(trained)["vocab"]
    _check_size(len(vocabulary), size)
    return Tokenizer(wordpiece_backend(vocabulary, lowercase=lowercase))


def train_bpe(texts: Iterable[str], size: int) -> Tokenizer:
    """CLIP's kind with at most ``size`` tokens: bytes, bytes at the end of a word, merges that come twice or more,
    start and end, in this order. Every text can be encoded. Raises ValueError for no texts, and for a size of less than
    2 * 256 + 2."""
    letters = byte_letters()
    least = 2 * len(letters) + 2
    if size < least:
        raise ValueError(f"size={size}; {least} tokens stand for bytes, start and end: give more")
    trained = _trained(clip_preparation(), _some(texts), size, [], letters, suffix="</w>")
    merges = [(first, second) for first, second in _model(trained)["merges"]][: size - least]
    return Tokenizer(clip_backend(clip_vocabulary(merges), merges))


def _alphabet(normalizer: Any, texts: list[str]) -> list[str]:
    """The characters of the texts, in an order that nothing but the texts decides."""
    counts = collections.Counter()
    for text in texts:
        counts.update(normalizer.normalize_str(text))
    frequent = sorted((-count, letter) for letter, count in counts.items() if not letter.isspace())
    return sorted(letter for _, letter in frequent[:MOST_LETTERS])


def _trained(
    preparation: tuple[Any, Any],
    texts: list[str],
    size: int,
    special: list[str],
    letters: list[str],
    *,
    prefix: str = "",
    suffix: str = "",
) -> Any:
    """Byte pairs; WordPiece is trained as such, too. ``preparation`` makes texts equal and cuts them into words.

    Trained twice: the library numbers letters inside (or at the end of) words in an order that changes from process
    to process, and the numbers decide between pairs that come equally often. So the letters are found first, and then
    given in an order of our own.
    """
    backend = library().Tokenizer(library().models.BPE())
    backend.normalizer, backend.pre_tokenizer = preparation

    def train(size: int, special: list[str]) -> None:
        trainer = library().trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=special,
            initial_alphabet=letters,
            limit_alphabet=len(letters),
            continuing_subword_prefix=prefix,
            end_of_word_suffix=suffix,
            min_frequency=2,
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)

    train(0, special)
    found = _model(backend)["vocab"]
    train(size, [*special, *sorted(token for token in found if token not in special and token not in letters)])
    return backend


def train_unigram(texts: Iterable[str], size: int, *, num_sentinels: int = 100) -> Tokenizer:
    """T5's kind with at most ``size`` tokens: ``<pad>``, ``</s>``, ``<unk>``, pieces with their probabilities, and
    behind them the sentinels, ``<extra_id_0>`` last. Characters are normalised by NFKC. Raises ValueError for no texts,
    and for a size without room for the characters."""
    texts = _some(texts)
    t = library()
    special = ["<pad>", "</s>", "<unk>"]
    backend = t.Tokenizer(t.models.Unigram())
    backend.normalizer, (backend.pre_tokenizer, _) = t.normalizers.NFKC(), unigram_spaces()
    trainer = t.trainers.UnigramTrainer(
        vocab_size=size - num_sentinels, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    try:
        backend.train_from_iterator(texts, trainer)
    except Exception as error:  # the library raises nothing more special
        raise ValueError(f"no vocabulary of {size} tokens can be made of these texts: {error}") from error
    pieces = [(piece, score) for piece, score in _model(backend)["vocab"]]
    _check_size(len(pieces) + num_sentinels, size)
    made = unigram_backend(_settled(pieces, special), special.index("<unk>"), num_sentinels=num_sentinels)
    made.normalizer = t.normalizers.NFKC()
    return Tokenizer(made)


def _settled(pieces: list[tuple[str, float]], special: list[str]) -> list[tuple[str, float]]:
    """In an order that their scores decide. Letters that are no piece by merit get, in an order that changes from
    process to process, scores a little above the lowest: here they all get the lowest. Scores are rounded, as their
    sums are added in a changing order, too."""
    ranked = [(piece, score) for piece, score in pieces if piece not in special]
    lowest = min(score for _, score in ranked)
    near = lowest + STEP * (1 + sum(len(piece) == 1 for piece, _ in ranked))
    even = [(piece, lowest if len(piece) == 1 and score < near else score) for piece, score in ranked]
    rounded = sorted((-round(score, 6), piece) for piece, score in even)
    return [*((token, 0.0) for token in special), *((piece, -score) for score, piece in rounded)]


def _some(texts: Iterable[str]) -> list[str]:
    if isinstance(texts, (str, bytes)):
        raise TypeError("texts is one text; expected a list or a stream of texts")
    texts = list(texts)
    if not any(text.strip() for text in texts):
        raise ValueError("there are no texts to make a vocabulary of")
    return texts


def _model(backend: Any) -> dict[str, Any]:
    return json.loads(backend.to_str())["model"]


def _check_size(found: int, size: int) -> None:
    if found > size:
        raise ValueError(f"size={size} has no room for the characters of these texts, which take {found} tokens")
