"""Tokenizers from vocabulary files, as they are published with BERT, CLIP and T5."""

import gzip
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from eqvision.data.text.sentencepiece_file import read_pieces
from eqvision.data.text.tokenizer import BERT, CLIP, SENTINEL, T5, Dialect, Tokenizer

PathLike = str | os.PathLike
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
OPENAI_MERGES = 49152 - 256 - 2  # of the lines in OpenAI's file, the rest of which is not used


def library() -> ModuleType:
    """The ``tokenizers`` library. Raises ImportError that says how to install it."""
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise ImportError("texts need the tokenizers library: pip install 'eqvision[text]'") from error
    return tokenizers


def load_tokenizer(path: PathLike, *, pad: str | None = None) -> Tokenizer:
    """A ``tokenizer.json``, or the folder with it: what ``Tokenizer.save`` and Hugging Face's libraries write.

    ``pad`` names the token that texts are filled up with, where it is not the usual one (SigLIP: ``</s>``). Raises
    FileNotFoundError, and ValueError for a file that is no tokenizer, or none of BERT, CLIP or T5.
    """
    file = _find(path, ("tokenizer.json",))
    try:
        backend = library().Tokenizer.from_str(file.read_text("utf-8"))
    except Exception as error:  # the library raises nothing more special
        raise ValueError(f"{file} is no tokenizer.json: {error}") from error
    return _named(file, backend, pad)


def wordpiece(path: PathLike, *, lowercase: bool = True) -> Tokenizer:
    """BERT's: ``vocab.txt`` with a piece in each line, ``tokenizer.json``, or a folder with either.

    ``lowercase`` (vocab.txt only) also strips accents, as in the uncased models. Raises FileNotFoundError, and
    ValueError for a vocabulary that does not fit.
    """
    file = _find(path, ("vocab.txt", "tokenizer.json"))
    if file.suffix == ".json":
        return _of(BERT, load_tokenizer(file), file)
    return _named(file, wordpiece_backend(_vocabulary(file, lowercase), lowercase=lowercase))


def wordpiece_backend(vocabulary: dict[str, int], *, lowercase: bool) -> Any:
    """A ``tokenizers.Tokenizer`` that does what BERT's own code does."""
    t = library()
    backend = t.Tokenizer(t.models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    backend.normalizer = t.normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = t.pre_tokenizers.BertPreTokenizer()
    backend.decoder = t.decoders.WordPiece(prefix="##")
    return _with_special(backend, [token for token in BERT.special if token is not None])


def clip_bpe(path: PathLike, *, pad: str | None = None) -> Tokenizer:
    """CLIP's: ``vocab.json`` with ``merges.txt`` beside it, OpenAI's ``bpe_simple_vocab_16e6.txt`` (or ``.gz``),
    ``tokenizer.json``, or a folder with these.

    Texts are made lower case and spaces are joined; OpenAI's code also mends broken Unicode and HTML (``&amp;``), which
    Hugging Face's and this do not. ``pad`` as in ``load_tokenizer``: OWL-ViT and OpenAI take number 0, the default,
    Hugging Face's CLIP ``<|endoftext|>``; the mask hides either. Raises FileNotFoundError, and ValueError for files
    that do not fit.
    """
    names = ("vocab.json", "bpe_simple_vocab_16e6.txt.gz", "bpe_simple_vocab_16e6.txt", "tokenizer.json")
    file = _find(path, names)
    if file.name == "tokenizer.json":
        return _of(CLIP, load_tokenizer(file, pad=pad), file)
    vocabulary, merges = _from_json(file) if file.suffix == ".json" else _from_openai(file)
    try:
        backend = clip_backend(vocabulary, merges)
    except Exception as error:  # the library raises nothing more special; such as a merge of unknown pieces
        raise ValueError(f"{file}: the merges do not fit the vocabulary: {error}") from error
    return _named(file, backend, pad)


def clip_backend(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Any:
    """A ``tokenizers.Tokenizer`` that does what CLIP's code does, but for broken Unicode and HTML."""
    t = library()
    backend = t.Tokenizer(
        t.models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix=CLIP.word_end, unk_token=CLIP.special.end)
    )
    backend.normalizer, backend.pre_tokenizer = clip_preparation()
    backend.decoder = t.decoders.ByteLevel()
    return _with_special(backend, [token for token in CLIP.special if token is not None])


def clip_preparation() -> tuple[Any, Any]:
    """How texts are made equal, and cut into words."""
    t = library()
    n = t.normalizers
    normalizer = n.Sequence([n.NFC(), n.Replace(t.Regex(r"\s+"), " "), n.Lowercase()])
    words = t.pre_tokenizers.Split(t.Regex(CLIP_WORDS), behavior="removed", invert=True)
    return normalizer, t.pre_tokenizers.Sequence([words, t.pre_tokenizers.ByteLevel(add_prefix_space=False)])


def unigram(path: PathLike, *, num_sentinels: int = 100, pad: str | None = None) -> Tokenizer:
    """T5's: ``tokenizer.json``, SentencePiece's ``spiece.model``, or a folder with either.

    ``num_sentinels`` (spiece.model only) such as ``<extra_id_0>`` are put behind the pieces, counting down, as T5 does;
    0 for mT5, whose pieces have them. Raises FileNotFoundError, and ValueError for files that do not fit.
    """
    file = _find(path, ("tokenizer.json", "spiece.model"))
    if file.suffix == ".json":
        return _of(T5, load_tokenizer(file, pad=pad), file)
    found = read_pieces(file)
    backend = unigram_backend([*found.pieces], found.unknown, num_sentinels=num_sentinels)
    if found.normalizer:
        backend.normalizer = library().normalizers.Precompiled(found.normalizer)
    return _named(file, backend, pad)


def unigram_backend(pieces: list[tuple[str, float]], unknown: int, *, num_sentinels: int) -> Any:
    """A ``tokenizers.Tokenizer`` that does what SentencePiece does for T5, but for the normalisation."""
    t = library()
    sentinels = [SENTINEL.format(number) for number in reversed(range(num_sentinels))]
    backend = t.Tokenizer(t.models.Unigram([*pieces, *((name, 0.0) for name in sentinels)], unknown, False))
    backend.pre_tokenizer, backend.decoder = unigram_spaces()
    special = [token for token in T5.special if token is not None and backend.token_to_id(token) is not None]
    inside = [name for name, _ in pieces if name.lstrip("▁").startswith("<extra_id_")]  # mT5's
    return _with_special(backend, [*special, *sentinels, *inside])


def unigram_spaces() -> tuple[Any, Any]:
    """How texts are cut into words, whose first piece begins with a low line, and put together again."""
    t = library()
    p = t.pre_tokenizers
    cut = p.Sequence([p.WhitespaceSplit(), p.Metaspace(replacement="▁", prepend_scheme="always")])
    return cut, t.decoders.Metaspace(replacement="▁", prepend_scheme="always")


# Files


def _find(path: PathLike, names: tuple[str, ...]) -> Path:
    """The file itself, or the first of ``names`` in a folder."""
    path = Path(path).expanduser()
    files = [path / name for name in names] if path.is_dir() else [path]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        looked = (
            f"{path.absolute()} holds none of {', '.join(names)}" if path.is_dir() else f"no file {path.absolute()}"
        )
        raise FileNotFoundError(f"no vocabulary: {looked}")
    return found


def _named(file: Path, backend: Any, pad: str | None = None) -> Tokenizer:
    try:
        return Tokenizer(backend, pad=pad)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _of(dialect: Dialect, tokenizer: Tokenizer, file: Path) -> Tokenizer:
    if tokenizer.dialect is not dialect:
        raise ValueError(f"{file} is a tokenizer of {tokenizer.dialect.name}; expected one of {dialect.name}")
    return tokenizer


def _with_special(backend: Any, tokens: list[str]) -> Any:
    """Tokens that are in the vocabulary already are found whole inside texts, before anything else."""
    t = library()
    known = [token for token in tokens if backend.token_to_id(token) is not None]
    backend.add_special_tokens([t.AddedToken(token, special=True, normalized=False) for token in known])
    return backend


def _vocabulary(file: Path, lowercase: bool) -> dict[str, int]:
    """Pieces by line number. Raises ValueError for pieces that come twice or cannot come at all."""
    pieces = _text(file).removesuffix("\n").split("\n")
    numbers = {piece: number for number, piece in enumerate(pieces)}
    twice = next((n for n, piece in enumerate(pieces) if numbers[piece] != n), None)
    if twice is not None:
        raise ValueError(f"{file}: lines {twice + 1} and {numbers[pieces[twice]] + 1} are both {pieces[twice]!r}")
    capital = next((p for p in pieces if not p.startswith("[") and any("A" <= letter <= "Z" for letter in p)), None)
    if lowercase and capital is not None:
        raise ValueError(
            f"{file} has pieces with capitals, such as {capital!r}, so it is of a cased model; give lowercase=False"
        )
    return numbers


def _from_json(file: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    try:
        vocabulary = json.loads(_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(vocabulary, dict) or not all(isinstance(number, int) for number in vocabulary.values()):
        raise ValueError(f"{file}: expected pieces with their numbers, such as {{'!': 0}}")
    merges = _find(file.with_name("merges.txt"), ())
    lines = [line for line in _text(merges).splitlines() if line and not line.startswith("#version")]
    return vocabulary, _merges(lines, merges)


def _from_openai(file: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Of OpenAI's file only the merges are taken; the vocabulary follows from them."""
    lines = _text(file).split("\n")[1 : 1 + OPENAI_MERGES]
    merges = _merges([line for line in lines if line], file)
    return clip_vocabulary(merges), merges


def clip_vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    """Numbers of the pieces: bytes, bytes at the end of a word, merges in their order, start and end."""
    letters = byte_letters()
    pieces = [*letters, *(letter + CLIP.word_end for letter in letters), *(first + second for first, second in merges)]
    special = [token for token in (CLIP.special.start, CLIP.special.end) if token is not None]
    return {piece: number for number, piece in enumerate([*pieces, *special])}


def byte_letters() -> list[str]:
    """The letter that stands for each byte, in the order of OpenAI's vocabularies: bytes that can be printed are
    themselves and come first, the others are letters from number 256 on."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printed]
    return [*map(chr, printed), *(chr(256 + place) for place in range(len(rest)))]


def _merges(lines: list[str], file: Path) -> list[tuple[str, str]]:
    pairs = [tuple(line.split()) for line in lines]
    wrong = next((line for line, pair in zip(lines, pairs, strict=True) if len(pair) != 2), None)
    if wrong is not None:
        raise ValueError(f"{file}: expected two pieces in each line of merges, got {wrong[:60]!r}")
    return [(pair[0], pair[1]) for pair in pairs]


def _text(file: Path) -> str:
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        return data.decode("utf-8")
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no vocabulary in UTF-8: {error}") from error
