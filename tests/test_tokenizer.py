"""Tokenizers of BERT, CLIP and T5: by hand, against transformers, long and empty texts, and files that do not fit."""

import gzip
import json
import struct

import numpy as np
import pytest

from eqvision import UnknownNameError
from eqvision.data.text import (
    check_ids,
    clip_bpe,
    load_tokenizer,
    train_bpe,
    train_unigram,
    train_wordpiece,
    unigram,
    wordpiece,
)
from eqvision.data.text.tokenizer import kept_lengths
from eqvision.data.text.vocabularies import byte_letters, clip_vocabulary

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "It's raining, isn't it? The dog doesn't care!",
    "She sells sea shells by the sea shore; the shells she sells are sea shells.",
    "Nun ist der Fuchs im Hühnerstall, naïve café, 1984.",
] * 3
ODD = ["", "   ", "The dog", "shells  by\n the\tsea", "☃ Ünknown 漢字 é", "it's 2024!!", "zzz" * 60, "a\u0000b"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
BERT_PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "dog", "cat", "##s", "bark", ".", "una", "##ffable"]


@pytest.fixture(scope="module")
def bert():
    return train_wordpiece(TEXTS, 150)


@pytest.fixture(scope="module")
def clip():
    return train_bpe(TEXTS, 600)


@pytest.fixture(scope="module")
def t5():
    return train_unigram(TEXTS, 150, num_sentinels=10)


@pytest.fixture
def vocab_txt(tmp_path):
    file = tmp_path / "vocab.txt"
    file.write_text("\n".join(BERT_PIECES) + "\n")
    return file


def rows(tokens):
    """The tokens of each row without what fills it up."""
    return [ids[mask].tolist() for ids, mask in zip(tokens.ids, tokens.mask, strict=True)]


# What comes out, by hand


def test_wordpiece_by_hand(vocab_txt):
    tokenizer = wordpiece(vocab_txt)
    tokens = tokenizer.encode_batch(["The dogs bark.", "dog", ""], 8, pairs=["Unaffable cat", "", "cat"])
    assert tokens.ids.tolist() == [[2, 5, 6, 8, 3, 11, 12, 3], [2, 6, 3, 3, 0, 0, 0, 0], [2, 3, 7, 3, 0, 0, 0, 0]]
    assert tokens.segments.tolist() == [[0] * 5 + [1] * 3, [0, 0, 0, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0, 0]]
    assert tokens.mask.sum(1).tolist() == [8, 4, 4]
    assert (tokens.ids.dtype, tokens.mask.dtype) == (np.int32, bool)
    assert tokenizer.special == (0, 3, 2, 1, 4)
    assert tokenizer.vocab_size == len(BERT_PIECES)
    assert tokenizer.decode_batch(tokens)[0] == "the dogs unaffable"
    assert tokenizer.decode([2, 5, 4, 3], special=True) == "[CLS] the [MASK] [SEP]"
    assert rows(tokenizer.encode_batch(["the [MASK] barks"], 8)) == [[2, 5, 4, 9, 8, 3]]


def test_clip_by_hand(tmp_path):
    """Merges in order of their rank, ends of words marked, number 0 behind."""
    merges = [("d", "o"), ("do", "g</w>"), ("c", "a")]
    vocabulary = clip_vocabulary(merges)
    assert (vocabulary["!"], vocabulary["!</w>"], vocabulary["dog</w>"], len(vocabulary)) == (0, 256, 513, 517)
    assert len(set(byte_letters())) == 256
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(pair) for pair in merges))
    tokens = clip_bpe(tmp_path).encode_batch(["Dog  cat!", "do"], 8)
    words = [vocabulary[piece] for piece in ("<|startoftext|>", "dog</w>", "ca", "t</w>", "!</w>", "<|endoftext|>")]
    assert tokens.ids.tolist() == [[*words, 0, 0], [515, vocabulary["d"], vocabulary["o</w>"], 516, 0, 0, 0, 0]]
    assert tokens.segments is None


def test_sentinels_count_down_from_the_end(t5):
    assert t5.sentinels == tuple(range(t5.vocab_size - 1, t5.vocab_size - 11, -1))
    assert t5.token_of(t5.sentinels[3]) == "<extra_id_3>"
    assert t5.id_of("<extra_id_0>") == t5.vocab_size - 1
    assert rows(t5.encode_batch(["<extra_id_1>"], 4)) == [[t5.sentinels[1], t5.special.end]]
    assert (t5.special.pad, t5.special.end, t5.special.unknown) == (0, 1, 2)


# The same texts and tokens back


@pytest.mark.parametrize("name", ["bert", "clip", "t5"])
def test_texts_come_back(request, name):
    tokenizer = request.getfixturevalue(name)
    tokens = tokenizer.encode_batch(TEXTS[:2], 128)
    expected = TEXTS[:2] if name == "t5" else [text.lower() for text in TEXTS[:2]]
    assert [text.replace(" ", "") for text in tokenizer.decode_batch(tokens)] == [
        text.replace(" ", "") for text in expected
    ]


@pytest.mark.parametrize("name", ["bert", "clip", "t5"])
def test_training_again_and_loading_what_was_saved_give_the_same(request, name, tmp_path):
    tokenizer = request.getfixturevalue(name)
    train = {"bert": train_wordpiece, "clip": train_bpe, "t5": train_unigram}[name]
    options = {"num_sentinels": 10} if name == "t5" else {}
    assert train(iter(TEXTS), 600 if name == "clip" else 150, **options).to_json() == tokenizer.to_json()
    tokenizer.save(tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert loaded.to_json() == tokenizer.to_json()
        assert loaded.special == tokenizer.special
        assert rows(loaded.encode_batch(ODD, 40)) == rows(tokenizer.encode_batch(ODD, 40))
    kind = {"bert": wordpiece, "clip": clip_bpe, "t5": unigram}
    assert kind.pop(name)(tmp_path).vocab_size == tokenizer.vocab_size
    for other in kind.values():
        with pytest.raises(ValueError, match=r"tokenizer\.json is a tokenizer of \w+; expected one of \w+"):
            other(tmp_path)


# Texts that are too long, empty, or not of this vocabulary


@pytest.mark.parametrize("name", ["bert", "clip", "t5"])
def test_long_texts_keep_the_end_token_and_empty_ones_are_the_tokens_around(request, name):
    tokenizer = request.getfixturevalue(name)
    full, cut, empty = rows(tokenizer.encode_batch([TEXTS[0], TEXTS[0], ""], 200))[0], 7, []
    for length in (cut, len(full), len(full) + 1):
        (row,), tokens = rows(tokenizer.encode_batch([TEXTS[0]], length)), tokenizer.encode_batch([TEXTS[0]], length)
        assert row == full if length >= len(full) else row == [*full[: length - 1], tokenizer.special.end]
        assert tokens.ids.shape == (1, length)
    start = [] if tokenizer.special.start is None else [tokenizer.special.start]
    assert rows(tokenizer.encode_batch(["", " \n"], 5)) == [[*start, tokenizer.special.end]] * 2
    assert tokenizer.encode_batch(empty, 5).ids.shape == (0, 5)
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_of_pairs_the_longer_loses_first(request, name):
    tokenizer = request.getfixturevalue(name)
    long, short = TEXTS[2], "dog"
    for first, second in ((long, short), (short, long)):
        (row,) = rows(tokenizer.encode_batch([first], 16, pairs=[second]))
        assert len(row) == 16
        assert row.count(tokenizer.special.end) == 2
        assert row[-1] == tokenizer.special.end
        whole = tokenizer.ids_of([short])[0]
        assert str(whole)[1:-1] in str(row)


def test_lengths_of_pairs():
    assert kept_lengths(3, 4, 7) == (3, 4)
    assert [kept_lengths(9, 2, 7), kept_lengths(2, 9, 7)] == [(5, 2), (2, 5)]
    assert [kept_lengths(9, 9, 7), kept_lengths(9, 8, 6), kept_lengths(0, 9, 6)] == [(3, 4), (3, 3), (0, 6)]


def test_every_text_is_bytes_for_clip_and_others_have_an_unknown_token(bert, clip, t5):
    assert clip.decode_batch(clip.encode_batch(["☃ 漢字 \u0101"], 64)) == ["☃ 漢字 ā"]
    for tokenizer in (bert, t5):
        (row,) = rows(tokenizer.encode_batch(["☃"], 8))
        assert tokenizer.special.unknown in row
    (row,) = rows(bert.encode_batch(["a" * 101], 8))  # as in BERT's code, words of more than 100 letters
    assert row == [bert.special.start, bert.special.unknown, bert.special.end]


def test_texts_that_are_refused(bert, clip):
    with pytest.raises(ValueError, match=r"text 1 has \d+ tokens and 6 fit .*shorten it, give a larger length, or"):
        bert.encode_batch(["dog", TEXTS[0]], 8, truncate=False)
    with pytest.raises(ValueError, match=r"length=2 holds no text: 2 tokens stand around it"):
        bert.encode_batch(["dog"], 2)
    with pytest.raises(ValueError, match=r"CLIP takes one text at a time; leave out pairs"):
        clip.encode_batch(["dog"], 8, pairs=["cat"])
    with pytest.raises(ValueError, match=r"1 second texts \(pairs\) for 2 texts"):
        bert.encode_batch(["dog", "cat"], 8, pairs=["fox"])
    with pytest.raises(ValueError, match=r"texts\[1\] holds half of a surrogate pair, which is no text: '\\ud800x'"):
        bert.encode_batch(["dog", "\ud800x"], 8)


def test_one_text_or_something_else_in_place_of_texts_is_refused(bert):
    with pytest.raises(TypeError, match=r"texts is one text; expected a list of texts"):
        bert.ids_of("dog")
    with pytest.raises(Exception, match=r"None|NoneType"):  # by beartype here, by the message in use
        bert.ids_of(["dog", None])


# The vocabulary of another model


def test_ids_of_another_vocabulary_are_refused(bert, t5):
    bert.require_fits(bert.vocab_size)
    with pytest.raises(ValueError, match=r"the tokenizer has \d+ tokens and bert_ti 100: it is of another model"):
        bert.require_fits(100, "bert_ti")
    check_ids(np.array([[0, 99]]), 100)
    with pytest.raises(ValueError, match=r"ids\[1, 0\] is 100, and the vocabulary has 100 tokens \(0\.\.99\)"):
        check_ids(np.array([[0, 99], [100, -1]]), 100)
    with pytest.raises(ValueError, match=r"tokens\[0\] is -1"):
        check_ids(np.array([-1]), 100, "tokens")
    with pytest.raises(ValueError, match=r"ids\[1\] is 900"):
        bert.decode([0, 900])
    with pytest.raises(ValueError, match=r"no token of number 900; it has \d+"):
        t5.token_of(900)
    with pytest.raises(UnknownNameError, match=r"token '\[MAKS\]' does not exist; nearest: \[MASK\]"):
        bert.id_of("[MAKS]")


# Files


def test_files_of_clip_are_read_alike(clip, tmp_path):
    model = json.loads(clip.to_json())["model"]
    merges = [" ".join(pair) for pair in model["merges"]]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    openai = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    openai.write_bytes(gzip.compress("\n".join(['"bpe_simple_vocab_16e6.txt#version: 0.2', *merges, ""]).encode()))
    for path in (tmp_path, tmp_path / "vocab.json", openai):
        read = clip_bpe(path)
        assert read.to_json() == clip.to_json()
    filled = clip_bpe(tmp_path, pad="<|endoftext|>").encode_batch(["dog"], 77)
    assert filled.ids[0, -1] == clip.special.end
    assert filled.mask.sum() == clip.encode_batch(["dog"], 77).mask.sum()


def field(number, value):
    """A field of a protocol buffer: bytes, a float or a whole number below 128."""
    if isinstance(value, bytes):
        length = len(value)
        size = bytes([length]) if length < 128 else bytes([length & 127 | 128, length >> 7])
        return bytes([number << 3 | 2]) + size + value
    kind, data = (5, struct.pack("<f", value)) if isinstance(value, float) else (0, bytes([value]))
    return bytes([number << 3 | kind]) + data


def spiece(pieces, model=1):
    """As SentencePiece writes it."""
    kinds = {"<unk>": 2, "<pad>": 3, "</s>": 3}
    parts = [field(1, piece.encode()) + field(2, score) + field(3, kinds.get(piece, 1)) for piece, score in pieces]
    return b"".join(field(1, part) for part in parts) + field(2, field(3, model)) + field(3, field(1, b"nmt_nfkc"))


def test_spiece_model_is_read_without_its_library(t5, tmp_path):
    vocabulary = json.loads(t5.to_json())["model"]["vocab"]
    pieces = [(piece, float(np.float32(score))) for piece, score in vocabulary[:-10]]
    file = tmp_path / "spiece.model"
    file.write_bytes(spiece(pieces))
    read = unigram(tmp_path, num_sentinels=10)
    assert (read.vocab_size, read.sentinels, read.special) == (t5.vocab_size, t5.sentinels, t5.special)
    assert rows(read.encode_batch(TEXTS, 64)) == rows(t5.encode_batch(TEXTS, 64))
    file.write_bytes(spiece([*pieces, ("▁<extra_id_1>", 0.0), ("▁<extra_id_0>", 0.0)]))
    assert unigram(file, num_sentinels=0).sentinels == (len(pieces) + 1, len(pieces))  # mT5's


def test_spiece_files_that_do_not_fit(tmp_path):
    file = tmp_path / "spiece.model"
    whole = spiece([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0)])
    file.write_bytes(spiece([("<unk>", 0.0)], model=2))
    with pytest.raises(ValueError, match=r"spiece\.model is a SentencePiece model of byte pairs; expected unigrams"):
        unigram(file)
    for broken in (whole[:-3], b"not a protocol buffer at all", b"\xff" * 40):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match=r"spiece\.model is no SentencePiece model"):
            unigram(file)
    file.write_bytes(spiece([("<unk>", 0.0), ("▁a", -1.0)]))
    with pytest.raises(ValueError, match=r"the vocabulary lacks <pad>, </s>, which T5 needs"):
        unigram(file)


@pytest.mark.parametrize("read", [wordpiece, clip_bpe, unigram, load_tokenizer])
def test_missing_files_are_named(read, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no vocabulary: .* holds none of .*tokenizer\.json"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no vocabulary: no file .*absent\.txt"):
        read(tmp_path / "absent.txt")


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([*BERT_PIECES, "Dog"], "has pieces with capitals, such as 'Dog', so it is of a cased model; give lowercase"),
        ([*BERT_PIECES, "cat"], "lines 8 and 14 are both 'cat'"),
        (BERT_PIECES[5:], r"the vocabulary lacks \[PAD\], \[SEP\], \[CLS\], \[UNK\], \[MASK\], which BERT needs"),
    ],
)
def test_vocabularies_that_do_not_fit(pieces, message, tmp_path):
    file = tmp_path / "vocab.txt"
    file.write_text("\n".join(pieces))
    with pytest.raises(ValueError, match=message):
        wordpiece(file)


def test_a_cased_vocabulary(tmp_path):
    file = tmp_path / "vocab.txt"
    file.write_text("\n".join([*BERT_PIECES, "Dog"]))
    assert rows(wordpiece(file, lowercase=False).encode_batch(["Dog dog"], 8)) == [[2, 13, 6, 3]]


def test_files_that_are_no_vocabulary(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer\.json"):
        load_tokenizer(file)
    (tmp_path / "vocab.json").write_text("[]")
    with pytest.raises(ValueError, match=r"vocab\.json: expected pieces with their numbers"):
        clip_bpe(tmp_path / "vocab.json")
    (tmp_path / "vocab.json").write_text(json.dumps(clip_vocabulary([])))
    (tmp_path / "merges.txt").write_text("a b c\n")
    with pytest.raises(ValueError, match=r"merges\.txt: expected two pieces in each line of merges, got 'a b c'"):
        clip_bpe(tmp_path / "vocab.json")
    (tmp_path / "merges.txt").write_text("a b\n")
    with pytest.raises(ValueError, match=r"vocab\.json: the merges do not fit the vocabulary"):
        clip_bpe(tmp_path / "vocab.json")
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"vocab\.txt is no vocabulary in UTF-8"):
        wordpiece(tmp_path / "vocab.txt")


def test_what_no_vocabulary_can_be_made_of():
    for train in (train_wordpiece, train_bpe, train_unigram):
        with pytest.raises(ValueError, match=r"there are no texts to make a vocabulary of"):
            train(["", " "], 600)
    with pytest.raises(
        ValueError, match=r"size=10 has no room for the characters of these texts, which take \d+ tokens"
    ):
        train_wordpiece(TEXTS, 10)
    with pytest.raises(ValueError, match=r"size=100; 514 tokens stand for bytes, start and end"):
        train_bpe(TEXTS, 100)
    with pytest.raises(ValueError, match=r"size=110 has no room|no vocabulary of 110 tokens can be made"):
        train_unigram(TEXTS, 110)


# Against transformers


@pytest.mark.parity
def test_equal_to_transformers(bert, clip, t5, tmp_path):
    """Single texts, pairs, cut and whole, odd ones; vocabularies as they are published."""
    from transformers import BertTokenizer, CLIPTokenizer, T5Tokenizer

    model = {name: json.loads(t.to_json())["model"] for name, t in (("bert", bert), ("clip", clip), ("t5", t5))}
    merges = [tuple(pair) for pair in model["clip"]["merges"]]
    theirs = {
        "bert": BertTokenizer(vocab=model["bert"]["vocab"]),
        "clip": CLIPTokenizer(vocab=model["clip"]["vocab"], merges=merges),
        "t5": T5Tokenizer(vocab=[tuple(row) for row in model["t5"]["vocab"]], extra_ids=10),
    }
    (tmp_path / "vocab.txt").write_text("\n".join(sorted(model["bert"]["vocab"], key=model["bert"]["vocab"].get)))
    ours = {"bert": wordpiece(tmp_path / "vocab.txt"), "clip": clip, "t5": t5}
    # T5 there knows no normalisation unless a file gives one, ours is trained with NFKC: equal texts for both
    texts = [*TEXTS[:4], *ODD, "[MASK] the <extra_id_3> dog</s> <|endoftext|> x"]
    for name, other in theirs.items():
        for length in (77, 9):
            expected = other(texts, truncation=True, max_length=length)["input_ids"]
            assert rows(ours[name].encode_batch(texts, length)) == expected, (name, length)
    for name in ("bert", "t5"):
        for length in (77, 16, 9):
            other = theirs[name](texts, texts[::-1], truncation=True, max_length=length)
            found = ours[name].encode_batch(texts, length, pairs=texts[::-1])
            assert rows(found) == other["input_ids"], (name, length)
            if name == "bert":
                segments = [row[mask].tolist() for row, mask in zip(found.segments, found.mask, strict=True)]
                assert segments == other["token_type_ids"]
    for name, other in theirs.items():
        ids = rows(ours[name].encode_batch(TEXTS[:4], 200))
        assert [ours[name].decode(row) for row in ids] == [other.decode(row, skip_special_tokens=True) for row in ids]
