"""Text files, their numbers, hidden words and spans: cut at lines, reconstructed, in published shares, resumable."""

import dataclasses

import jax
import numpy as np
import pytest

import eqvision.data.text.corpus as corpus_module
from eqvision.data.text import (
    CausalExamples,
    MaskedExamples,
    SpanExamples,
    corrupt_spans,
    documents,
    fill_spans,
    find_texts,
    make_corpus,
    noise_mask,
    sample_text,
    split_text,
    text_eval_stream,
    text_length,
    text_lines,
    text_train_stream,
    train_bpe,
    train_unigram,
    train_wordpiece,
)
from eqvision.data.text.corpus import Corpus
from eqvision.data.text.examples import FOLLOWS, RANDOM, line_chunks, windows
from eqvision.data.text.spans import corrupted_lengths, num_noise_and_spans, random_parts

WORDS = [
    "the",
    "dog",
    "cat",
    "fox",
    "sun",
    "moon",
    "sea",
    "sells",
    "shells",
    "by",
    "shore",
    "quick",
    "brown",
    "lazy",
    "jumps",
    "over",
]


def speech(rng, lines=6):
    return "\n".join(" ".join(rng.choice(WORDS, rng.integers(2, 9))) + "." for _ in range(lines))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Two files of speeches, in which blank lines end documents."""
    folder, rng = tmp_path_factory.mktemp("text"), np.random.default_rng(0)
    for name in ("b.txt", "a.txt"):
        (folder / name).write_text("\n\n".join(speech(rng) for _ in range(30)) + "\n")
    (folder / "notes.md").write_text("not read")
    return folder


@pytest.fixture(scope="module")
def bert(text):
    return train_wordpiece(text_lines(find_texts(text)), 120)


@pytest.fixture(scope="module")
def t5(text):
    return train_unigram(text_lines(find_texts(text)), 120, num_sentinels=40)


@pytest.fixture(scope="module")
def words(text, bert):
    return make_corpus(find_texts(text), bert)


@pytest.fixture(scope="module")
def pieces(text, t5):
    return make_corpus(find_texts(text), t5)


# Files


def test_the_files_of_a_folder_are_one_text_in_order_of_their_names(text):
    whole = find_texts(text)
    assert [file.name for file in whole.files] == ["a.txt", "b.txt"]
    lines = [line for line in text_lines(whole) if line]
    assert lines == [
        line for name in ("a.txt", "b.txt") for line in (text / name).read_text().splitlines() if line.strip()
    ]
    assert [sum(map(len, document)) for document in documents(whole, "file")] == [
        sum(len(line) for line in (text / name).read_text().splitlines()) for name in ("a.txt", "b.txt")
    ]
    assert len(list(documents(whole))) == 60


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.501, 0.9])
def test_parts_are_contiguous_and_together_the_whole(text, share):
    """Lines are in one part each, whatever the share; the second has about the share of the bytes."""
    whole = find_texts(text)
    first, second = split_text(whole, share)
    assert [*filter(None, text_lines(first)), *filter(None, text_lines(second))] == [*filter(None, text_lines(whole))]
    assert (first.first, first.last, second.last) == (whole.first, second.first, whole.last)
    assert abs(second.num_bytes / whole.num_bytes - share) < 0.02


def test_letters_of_several_bytes_and_odd_files(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffäöü ☃\r\nzwei\r\n\r\n  drei  ".encode())
    (tmp_path / "b.txt").write_text("")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.txt").write_text("vier\nfünf\n")
    whole = find_texts(tmp_path)
    assert list(documents(whole)) == [["äöü ☃", "zwei"], ["drei"], ["vier", "fünf"]]
    assert list(documents(whole, "file")) == [["äöü ☃", "zwei", "drei"], ["vier", "fünf"]]
    for share in np.linspace(0.2, 0.8, 13):
        parts = split_text(whole, float(share))
        assert [line for part in parts for line in text_lines(part) if line] == [
            *("äöü ☃", "zwei", "drei", "vier", "fünf")
        ]


def test_a_sample_is_evenly_spread_whole_lines(text):
    whole = find_texts(text)
    assert sample_text(whole, 10**9) == [whole]
    parts = sample_text(whole, 3000)
    assert 2000 < sum(part.num_bytes for part in parts) < 7000
    lines = set(text_lines(whole))
    assert all(line in lines for part in parts for line in text_lines(part))


def test_texts_that_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no text at .*: expected a file, or a folder with \*\.txt"):
        find_texts(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no text at .*absent"):
        find_texts(tmp_path / "absent")
    file = tmp_path / "a.txt"
    file.write_text("")
    with pytest.raises(ValueError, match="holds no text: 1 empty files"):
        find_texts(file)
    file.write_text("one line")
    with pytest.raises(ValueError, match="is too short to hold 10% of it back: there is no line to cut at"):
        split_text(find_texts(file), 0.1)
    with pytest.raises(ValueError, match=r"share=1\.5; expected the share of the text that is held back"):
        split_text(find_texts(file), 1.5)
    file.write_bytes(b"fine\nnot \xff fine\n")
    with pytest.raises(ValueError, match=r"a\.txt is no UTF-8 at byte 9 \(0xff\); convert it"):
        list(text_lines(find_texts(file)))


def test_numbers_are_those_of_the_lines(text, bert, words, tmp_path, monkeypatch):
    whole = find_texts(text)
    lines = bert.ids_of([line for line in text_lines(whole) if line])
    assert words.ids.tolist() == [number for line in lines for number in line]
    assert np.diff(words.lines).tolist() == [len(line) for line in lines]
    assert set(words.documents) <= set(words.lines)
    assert (len(words.documents), words.documents[-1]) == (61, len(words.ids))
    monkeypatch.setenv("EQVISION_CACHE", str(tmp_path))
    monkeypatch.setattr(corpus_module, "IN_MEMORY", 0)
    monkeypatch.setattr(corpus_module, "AT_ONCE", 7)
    for _ in range(2):  # made, and read
        jax.tree.map(np.testing.assert_array_equal, make_corpus(whole, bert), words)
        monkeypatch.setattr(corpus_module, "_write", None)


def test_a_text_of_spaces_is_refused(tmp_path, bert):
    (tmp_path / "a.txt").write_text(" \n \n")
    with pytest.raises(ValueError, match=r"a\.txt, bytes 0\.\.3 holds no text"):
        make_corpus(find_texts(tmp_path), bert)


# Where examples begin and end


def test_windows():
    assert windows(10, 4).tolist() == [[0, 4], [4, 8], [8, 10]]
    assert windows(9, 4).tolist() == [[0, 4], [4, 8]]
    assert windows(1, 4).shape == (0, 2)


def test_chunks_are_whole_lines_of_one_document_and_cover_the_text():
    corpus = Corpus(np.arange(40, dtype=np.uint16), np.array([0, 3, 6, 9, 25, 28, 40]), np.array([0, 9, 28, 40]))
    assert line_chunks(corpus, 7).tolist() == [
        *([0, 6], [6, 9]),  # two lines of three fit
        *([9, 16], [16, 23], [23, 28]),  # a line of sixteen is cut, and the next fits to its rest
        *([28, 35], [35, 40]),
    ]


# Spans


def test_lengths_are_those_of_the_published_code():
    assert text_length(512) == 568
    assert corrupted_lengths(568) == (512, 114)
    assert num_noise_and_spans(568) == (85, 28)
    assert [num_noise_and_spans(length) for length in (2, 3, 10)] == [(1, 1), (1, 1), (2, 1)]


@pytest.mark.parametrize(("share", "mean"), [(0.15, 3.0), (0.5, 1.0), (0.9, 3.0)])
def test_source_and_target_reconstruct_the_text(share, mean):
    for seed in range(200):
        rng = np.random.default_rng(seed)
        length = int(rng.integers(2, 80))
        ids, sentinels = rng.integers(2, 900, length), tuple(range(999, 899, -1))
        mask = noise_mask(length, rng, share=share, mean=mean)
        source, target = corrupt_spans(ids, mask, sentinels, 1)
        assert fill_spans(source, target, sentinels, 1) == ids.tolist()
        assert (len(source), len(target)) == corrupted_lengths(length, share=share, mean=mean)
        noise, spans = num_noise_and_spans(length, share=share, mean=mean)
        assert mask.sum() == noise
        for row in (source, target):  # sentinels once each, counting down from the end of the vocabulary
            assert [token for token in row.tolist() if token >= 900] == list(sentinels[:spans])
            assert row[-1] == 1
        assert target[0] == sentinels[0]
        assert source[0] == ids[0]


def test_random_parts_are_equally_likely():
    counts: dict[tuple, int] = {}
    rng = np.random.default_rng(0)
    for _ in range(6000):
        parts = tuple(random_parts(5, 3, rng).tolist())
        counts[parts] = counts.get(parts, 0) + 1
    assert len(counts) == 6
    assert all(sum(parts) == 5 and min(parts) > 0 for parts in counts)
    assert max(counts.values()) < 1.15 * min(counts.values())


def test_more_spans_than_sentinels(pieces, t5, bert, words):
    with pytest.raises(ValueError, match="2 spans and 1 sentinels in the vocabulary; take shorter texts"):
        corrupt_spans(np.arange(4), np.array([False, True, False, True]), [9], 1)
    with pytest.raises(ValueError, match=r"length=2000 has \d+ spans, and the tokenizer \(T5\) has 40 sentinels"):
        SpanExamples(pieces, t5, length=2000)
    with pytest.raises(ValueError, match=r"length=64 has \d+ spans, and the tokenizer \(BERT\) has 0 sentinels"):
        SpanExamples(words, bert, length=64)


def test_span_examples_are_the_text_again(pieces, t5):
    examples = SpanExamples(pieces, t5, length=32)
    found = [examples.example(index, np.random.default_rng(index)) for index in range(len(examples))]
    texts = [fill_spans(np.array(e.ids), np.array(e.targets), t5.sentinels, t5.special.end) for e in found]
    flat = [token for text in texts for token in text]
    assert flat == pieces.ids[: len(flat)].tolist()
    assert len(pieces.ids) - len(flat) <= 1
    batch = examples.collate(found[:3], [0, 1, 2], 5)
    assert batch.text.ids.shape == (5, 32)
    assert batch.text.mask[:3].all()  # no padding but in the last example
    assert batch.targets.shape == (5, corrupted_lengths(text_length(32))[1])
    assert batch.indices.tolist() == [0, 1, 2, -1, -1]
    assert batch.weights.tolist() == [1, 1, 1, 0, 0]
    assert not batch.target_mask[3:].any()


# Hidden words


@pytest.mark.parametrize("pairs", [True, False])
def test_hidden_words_come_back_and_have_the_published_shares(words, bert, pairs):
    examples = MaskedExamples(words, bert, length=40, next_sentence=pairs)
    fates, asked, total, labels, lengths = np.zeros(3), 0, 0, [], []
    around = {bert.special.start, bert.special.end}
    for index in range(len(examples)):
        for seed in range(12):
            example = examples.example(index, np.random.default_rng([index, seed]))
            original = list(example.ids)
            for place, target in zip(example.positions, example.targets, strict=True):
                original[place] = target
                fate = example.ids[place]
                fates += [fate == bert.special.mask, fate == target, fate not in (target, bert.special.mask)]
            inside = [place for place, token in enumerate(original) if token not in around]
            assert set(example.positions) <= set(inside)
            assert example.positions == sorted(set(example.positions))
            assert len(original) - len(inside) == (3 if pairs else 2)
            asked, total = asked + len(example.positions), total + len(inside)
            labels.append(example.next_sentence)
            lengths.append(len(original))
            if not pairs:
                assert original[1:-1] == words.ids[index * 38 : index * 38 + 38].tolist()
    assert asked / total == pytest.approx(0.15, abs=0.01)
    assert fates / fates.sum() == pytest.approx([0.8, 0.1, 0.1], abs=0.02)
    assert max(lengths) == 40
    if pairs:
        assert np.mean(labels) == pytest.approx(0.5, abs=0.1)
        assert set(labels) == {FOLLOWS, RANDOM}
    else:
        assert set(labels) == {None}


def test_second_texts_follow_or_come_from_elsewhere(words, bert):
    """Whole texts again: with label 0 a stretch of the text as it stands, cut at a line where there is one."""
    examples = MaskedExamples(words, bert, length=40, short=0.0)
    text, lines = words.ids.tolist(), set(words.lines.tolist())
    chunks = line_chunks(words, 37).tolist()
    for index, (first, last) in enumerate(chunks):
        example = examples.example(index, np.random.default_rng(index))
        for place, target in zip(example.positions, example.targets, strict=True):
            example.ids[place] = target
        start, second = example.ids[1 : example.second - 1], example.ids[example.second : -1]
        assert start == text[first : first + len(start)]
        cut = first + len(start)
        assert cut in lines or not any(first < line < last for line in lines)
        if example.next_sentence == FOLLOWS:
            assert second == text[cut:last]
        else:
            assert any(second == text[b - len(second) : b] for other, (_, b) in enumerate(chunks) if other != index)


def test_lengths_do_not_tell_what_follows(words, bert):
    """Texts of both kinds are about as long; with texts that always fill the room, length would be the answer."""
    examples = MaskedExamples(words, bert, length=40)
    lengths = {FOLLOWS: [], RANDOM: []}
    for index in range(len(examples)):
        for seed in range(20):
            example = examples.example(index, np.random.default_rng([index, seed]))
            lengths[example.next_sentence].append(len(example.ids))
    follows, random = (np.array(lengths[label]) for label in (FOLLOWS, RANDOM))
    assert abs(follows.mean() - random.mean()) < 2.5
    assert max(follows.max(), random.max()) <= 40


def test_batches_of_hidden_words(words, bert):
    examples = MaskedExamples(words, bert, length=24)
    found = [examples.example(index, np.random.default_rng(0)) for index in (4, 2)]
    batch = examples.collate(found, [4, 2], 3)
    assert batch.text.ids.shape == batch.text.segments.shape == (3, 24)
    assert batch.positions.shape == batch.targets.shape == (3, examples.num_positions)
    for row, example in enumerate(found):
        assert batch.text.ids[row][batch.text.mask[row]].tolist() == example.ids
        segments = batch.text.segments[row][: len(example.ids)]
        assert segments.tolist() == [int(place >= example.second) for place in range(len(example.ids))]
        assert batch.targets[row][batch.target_mask[row]].tolist() == example.targets
        assert batch.positions[row][batch.target_mask[row]].tolist() == example.positions
    assert batch.next_sentence[:2].tolist() == [example.next_sentence for example in found]
    assert not batch.text.mask[2].any()


def test_every_token_but_the_first_is_a_target_once(pieces, t5):
    examples = CausalExamples(pieces, t5, length=30)
    found = [examples.example(index, np.random.default_rng(0)) for index in range(len(examples))]
    assert [token for e in found for token in e.targets] == pieces.ids[1:].tolist()
    assert [token for e in found for token in e.ids] == pieces.ids[:-1].tolist()


def test_one_document_of_one_token(bert):
    corpus = Corpus(np.array([7], np.uint16), np.array([0, 1]), np.array([0, 1]))
    examples = MaskedExamples(corpus, bert, length=16)
    example = examples.example(0, np.random.default_rng(0))
    assert len(examples) == 1
    assert len(example.ids) == 5
    assert len(example.positions) == 1


def test_options_that_do_not_fit(words, bert, pieces, t5, text):
    with pytest.raises(ValueError, match=r"hidden words need a tokenizer of BERT; this one is of T5"):
        MaskedExamples(pieces, t5, length=32)
    with pytest.raises(ValueError, match=r"length=5 has no room for texts: 3 tokens stand around them"):
        MaskedExamples(words, bert, length=5)
    with pytest.raises(ValueError, match=r"share=15\.0, short=0\.1; expected shares"):
        MaskedExamples(words, bert, length=32, share=15.0)
    with pytest.raises(ValueError, match=r"length=0; expected 1 token or more"):
        CausalExamples(words, bert, length=0)
    with pytest.raises(ValueError, match=r"length=32, share=0\.15, mean=0\.5; expected"):
        SpanExamples(pieces, t5, length=32, mean=0.5)
    clip = train_bpe(text_lines(find_texts(text)), 520)
    with pytest.raises(ValueError, match=r"hidden words need a tokenizer of BERT; this one is of CLIP"):
        MaskedExamples(words, clip, length=32)


# Streams


@pytest.fixture(scope="module", params=["masked", "span", "causal"])
def source(request, words, bert, pieces, t5):
    return {
        "masked": lambda: MaskedExamples(words, bert, length=24),
        "span": lambda: SpanExamples(pieces, t5, length=48),
        "causal": lambda: CausalExamples(pieces, t5, length=24),
    }[request.param]()


def taken(stream, count):
    batches = [next(stream) for _ in range(count)]
    stream.close()
    return batches


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_stream_begins_at_any_step_and_is_the_same_on_any_hosts_and_threads(source):
    options = {"batch_size": 6, "seed": 5}
    whole = taken(text_train_stream(source, num_threads=0, **options), 40)
    assert_same(taken(text_train_stream(source, num_threads=2, start_step=37, **options), 3), whole[37:])
    hosts = [text_train_stream(source, num_threads=0, process_index=n, process_count=2, **options) for n in (0, 1)]
    parts = [taken(host, 3) for host in hosts]
    assert_same(
        [jax.tree.map(lambda *rows: np.concatenate(rows), *pair) for pair in zip(*parts, strict=True)], whole[:3]
    )
    seen = np.concatenate([batch.indices for batch in whole])[: len(source)]
    assert sorted(seen.tolist()) == list(range(len(source)))  # each once in an epoch


def test_seeds_and_epochs_hide_other_words(source):
    """Of models that write on nothing is hidden: only the order differs."""
    size = len(source)
    one, other = (taken(text_train_stream(source, batch_size=size, seed=s, num_threads=0), 2) for s in (0, 1))
    assert one[0].indices.tolist() != other[0].indices.tolist() != one[1].indices.tolist()
    sorted_rows = [dataclasses.astuple(_Rows.of(batch)) for batch in (one[0], one[1], other[0])]
    same = [sorted_rows[0] == rows for rows in sorted_rows[1:]]
    assert same == [isinstance(source, CausalExamples)] * 2


@dataclasses.dataclass
class _Rows:
    ids: list
    targets: list

    @classmethod
    def of(cls, batch):
        order = np.argsort(batch.indices)
        return cls(batch.text.ids[order].tolist(), batch.targets[order].tolist())


def test_evaluation_sees_each_example_once_and_always_the_same(source):
    one, other = ([*text_eval_stream(source, batch_size=7, num_threads=n)] for n in (0, 2))
    assert_same(one, other)
    indices = np.concatenate([batch.indices for batch in one])
    assert indices[indices >= 0].tolist() == list(range(len(source)))
    assert len(indices) == 7 * -(-len(source) // 7)
    smaller = [*text_eval_stream(source, batch_size=3, num_threads=0)]
    assert smaller[0].targets.tolist() == one[0].targets[:3].tolist()


def test_streams_that_do_not_fit(source):
    with pytest.raises(ValueError, match=r"start_step=-1, seed=0; expected start_step >= 0"):
        text_train_stream(source, batch_size=2, seed=0, start_step=-1)
    with pytest.raises(ValueError, match=r"batch_size=3 is global; expected a positive multiple of process_count=2"):
        text_eval_stream(source, batch_size=3, process_count=2)


def test_examples_are_named_by_their_words(source):
    assert source.describe(0).startswith("text, tokens 0..")
