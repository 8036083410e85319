"""Images with captions: folders, COCO's captions, captioned digits, streams, and what is refused."""

import json

import numpy as np
import pytest
from pairs_files import ToyPairs, WordTokenizer, jsonl, write_images, write_lines

from eqvision.data import CorruptImageError
from eqvision.data.pairs import (
    SENTENCES,
    TEMPLATES,
    CaptionedDigits,
    PairSource,
    TextEncoder,
    all_captions,
    captioned_folder,
    coco_captions,
    count_cut,
    digit_captions,
    drawn_caption,
    pairs_eval_stream,
    pairs_train_stream,
    text_gallery,
)

WORDS = WordTokenizer("image", "text", *map(str, range(40)))


def names_of(source):
    return [source.describe(index).rpartition("/")[2] for index in range(len(source))]


def captions_of(source):
    return [source.captions(index) for index in range(len(source))]


# Folders


def write_three(folder, kind):
    """The same images and captions, each kind in its own way."""
    write_images(folder, ["b.png", "sub/a.jpg", "c.png"])
    if kind == "txt":
        write_lines(folder / "b.txt", "a cat", "eine Katze, süß")
        write_lines(folder / "sub/a.txt", "  a dog ", "")
    elif kind == "tsv":
        lines = ("image\tcaption", "b.png\ta cat", "sub/a.jpg\ta dog", "b.png\teine Katze, süß")
        write_lines(folder / "captions.tsv", *lines)
    else:
        rows = (
            jsonl(image="b.png", caption="a cat"),
            "",
            jsonl(file_name="sub/a.jpg", text="a dog"),
            jsonl(file="b.png", captions=["eine Katze, süß"]),
        )
        write_lines(folder / f"{kind}.jsonl", *rows)


@pytest.mark.parametrize("kind", ["captions", "metadata", "tsv", "txt"])
def test_captions_of_a_folder(tmp_path, kind):
    write_three(tmp_path / "train", kind)
    source = captioned_folder(tmp_path, "train")
    assert isinstance(source, PairSource)
    assert names_of(source) == ["b.png", "a.jpg"]
    assert captions_of(source) == [("a cat", "eine Katze, süß"), ("a dog",)]
    assert (source.class_names, source.labels.tolist(), source.num_skipped) == ((), [-1, -1], 0)
    example = source[-2]
    assert example.image.shape == (6, 8, 3)
    assert example.captions == ("a cat", "eine Katze, süß")
    assert (example.index, example.weight) == (0, 1.0)
    assert captioned_folder(tmp_path / "train", in_channels=1)[1].image.shape == (6, 8, 1)


def test_empty_captions_are_left_out_and_counted(tmp_path, caplog):
    write_images(tmp_path, ["a.png", "b.png", "c.png"])
    rows = [("b.png", "  "), ("a.png", ""), ("a.png", "a tree\u00a0"), ("c.png", "\t \n")]
    write_lines(tmp_path / "captions.jsonl", *(jsonl(image=name, caption=text) for name, text in rows))
    source = captioned_folder(tmp_path)
    assert (captions_of(source), source.num_empty) == ([("a tree",)], 3)
    expected = "3 empty captions are left out, and 2 images that have no other (the first is of b.png)"
    assert expected in caplog.text


def test_half_characters_do_not_stop_a_run(tmp_path):
    write_images(tmp_path, ["a.png"])
    write_lines(tmp_path / "captions.jsonl", '{"image": "a.png", "caption": "smile \\ud83d"}')
    assert captions_of(captioned_folder(tmp_path)) == [("smile ?",)]


def test_corrupt_images(tmp_path):
    write_three(tmp_path, "tsv")
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(CorruptImageError, match=r"b\.png"):
        captioned_folder(tmp_path)[0]
    source = captioned_folder(tmp_path, on_corrupt="skip")
    assert (source[0].weight, source[0].captions[0], source.num_skipped) == (0.0, "a cat", 1)


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("captions.jsonl", "{image}", r"captions\.jsonl:2: not JSON: .* \(column 2\)"),
        ("captions.jsonl", '["a.png"]', r"captions\.jsonl:2: expected an object with one of the keys .*got list"),
        ("captions.jsonl", '{"image": "a.png"}', r":2: .* keys caption, captions, text, title, got 'image'"),
        ("captions.jsonl", '{"image": "a.png", "caption": 3}', r":2: expected text, got 3"),
        ("captions.tsv", "a.png a tree", r"captions\.tsv:2: no tab in 'a\.png a tree'; expected FILE, a tab"),
    ],
)
def test_lines_that_cannot_be_read_are_named(tmp_path, name, line, message):
    write_images(tmp_path, ["a.png"])
    good = "a.png\tgood" if name.endswith("tsv") else jsonl(image="a.png", caption="good")
    write_lines(tmp_path / name, good, line)
    with pytest.raises(ValueError, match=message):
        captioned_folder(tmp_path)


def test_what_is_missing_in_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train is no folder; .*Expected ROOT/SPLIT/captions\.jsonl"):
        captioned_folder(tmp_path, "train")
    write_images(tmp_path, ["a.png"])
    with pytest.raises(FileNotFoundError, match=r"no captions in .*expected ROOT/SPLIT/captions\.jsonl"):
        captioned_folder(tmp_path)
    write_lines(tmp_path / "captions.tsv", "a.png\t ")
    with pytest.raises(ValueError, match=r"captions\.tsv has no captions; expected a text about at least one image"):
        captioned_folder(tmp_path)
    write_lines(tmp_path / "captions.tsv", "a.png\tone", "x.png\ttwo")
    with pytest.raises(FileNotFoundError, match=r"1 of 2 images named in .*captions\.tsv do not exist: .*x\.png"):
        captioned_folder(tmp_path)
    write_lines(tmp_path / "captions.jsonl", jsonl(image="a.png", caption="one"))
    with pytest.raises(ValueError, match=r"has captions in captions\.jsonl, captions\.tsv; keep one of them"):
        captioned_folder(tmp_path)
    (tmp_path / "captions.jsonl").unlink()
    (tmp_path / "captions.tsv").write_bytes("a.png\tsüß".encode("latin-1"))
    with pytest.raises(ValueError, match=r"captions\.tsv is not UTF-8"):
        captioned_folder(tmp_path)


# COCO


def write_coco(root, images=None, annotations=None, split="train2017"):
    write_images(root / split, ["1.png", "2.png", "3.png"])
    names = [{"id": n, "file_name": f"{n}.png"} for n in (3, 1, 2)]
    rows = [(1, "one"), (3, "three"), (1, "uno\n"), (3, "")]
    content = {
        "images": names if images is None else images,
        "annotations": [{"id": i, "image_id": n, "caption": text} for i, (n, text) in enumerate(rows)]
        if annotations is None
        else annotations,
    }
    write_lines(root / "annotations" / f"captions_{split}.json", json.dumps(content))
    return root


def test_captions_of_coco(tmp_path):
    """By split, or by file; instances beside them are no captions."""
    write_coco(tmp_path)
    write_coco(tmp_path, split="val2017")
    write_lines(tmp_path / "annotations/instances_train2017.json", "{}")
    for source in (coco_captions(tmp_path, "train"), coco_captions(tmp_path / "annotations/captions_train2017.json")):
        assert names_of(source) == ["1.png", "3.png"]
        assert captions_of(source) == [("one", "uno"), ("three",)]
        assert source.num_empty == 1
    moved = coco_captions(tmp_path, "train", images=tmp_path / "val2017")
    assert "val2017" in moved.describe(0)


@pytest.mark.parametrize(
    ("images", "annotations", "message"),
    [
        ({}, None, r"has no list 'images'; expected lists \"images\" \(id, file_name\)"),
        ([{"id": 1}], None, r"images\[0\] is .*expected id and file_name"),
        ([{"id": 1, "file_name": "1.png"}] * 2, None, r"images\[1\] has the id 1, which another image has, too"),
        (None, [{"image_id": 1, "bbox": []}], r"annotations\[0\] has no .*it is of objects, not of captions"),
        (None, [{"image_id": 9, "caption": "a"}], r"annotations\[0\] is of image 9, which is not in 'images'"),
        (None, [], r"has no captions"),
    ],
)
def test_wrong_captions_files_are_refused(tmp_path, images, annotations, message):
    with pytest.raises(ValueError, match=message):
        coco_captions(write_coco(tmp_path, images, annotations), "train")


def test_captions_files_that_are_not_found(tmp_path):
    write_coco(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no captions of split 'val' in .*has annotations/captions_train2017"):
        coco_captions(tmp_path, "val")
    write_coco(tmp_path, split="val2017")
    with pytest.raises(ValueError, match=r"has several captions files: annotations/.*choose a split"):
        coco_captions(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist"):
        coco_captions(tmp_path / "nowhere")
    (tmp_path / "x.json").write_text("[1")
    with pytest.raises(ValueError, match=r"x\.json: not JSON"):
        coco_captions(tmp_path / "x.json")


# Digits


def test_captioned_digits():
    train, test = CaptionedDigits("train"), CaptionedDigits("test", channels=3)
    assert isinstance(train, PairSource)
    assert (len(train), len(test)) == (1437, 360)
    assert (train[0].image.shape, test[0].image.shape) == ((8, 8, 1), (8, 8, 3))
    assert train.captions(5) == digit_captions(int(train.labels[5])) == train[5].captions
    assert train.class_names[3] == "three"
    assert "the digit three" in digit_captions(3)
    assert "this is a 3" in digit_captions(3)
    assert len(CaptionedDigits("test", length=7).labels) == 7
    with pytest.raises(ValueError, match="length=0; the split 'test' has 1 to 360 images"):
        CaptionedDigits("test", length=0)


def test_prompts_are_no_captions_and_have_no_new_words():
    said = {text for digit in range(10) for text in digit_captions(digit)}
    asked = {template.format(word) for template in TEMPLATES for word in CaptionedDigits.class_names}
    assert len(said) == 10 * len(SENTENCES)
    assert not said & asked
    words = {word.strip(",") for text in said for word in text.split()}
    assert {word for text in asked for word in text.split()} <= words


def test_equal_texts_are_one_row_of_the_gallery():
    test = CaptionedDigits("test", length=40)
    texts, pairs = text_gallery(test)
    assert len(texts) == len(set(texts)) == 8 * len(set(test.labels.tolist()))
    assert len(pairs) == 40 * 8 == len(list(all_captions(test)))
    assert all(texts[text] in test.captions(int(image)) for image, text in pairs)


# Streams


def taken(stream, count):
    batches = [next(stream) for _ in range(count)]
    stream.close()
    return batches


def train_stream(source, **options):
    given = {"length": 8, "batch_size": 6, "seed": 3, "num_threads": 0, "transform": shifted} | options
    return pairs_train_stream(source, WORDS, **given)


def shifted(image, rng):
    return image + rng.integers(1, 200, dtype=np.uint8)


def flat(batch):
    return [batch.images, batch.text.ids, batch.text.mask, batch.weights, batch.indices]


def assert_equal(one, other):
    for a, b in zip(flat(one), flat(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_stream_goes_on_from_any_step_with_any_threads_and_hosts():
    source = ToyPairs(13)
    whole = taken(train_stream(source), 5)
    for batch, later in zip(whole[3:], taken(train_stream(source, start_step=3, num_threads=2), 2), strict=True):
        assert_equal(batch, later)
    hosts = [taken(train_stream(source, process_index=i, process_count=2), 2) for i in (0, 1)]
    for number in (0, 1):
        parts = zip(*(flat(host[number]) for host in hosts), strict=True)
        for joined, expected in zip(parts, flat(whole[number]), strict=True):
            np.testing.assert_array_equal(np.concatenate(joined), expected)


def read_back(batch):
    words = {number: word for word, number in WORDS.ids.items()}
    return [" ".join(words[number] for number in row if number > 3) for row in batch.text.ids.tolist()]


def test_each_image_comes_once_in_an_epoch_with_a_caption_of_its_own():
    source, seen = ToyPairs(12), []
    for batch in taken(train_stream(source), 4):
        assert (batch.images.shape, batch.text.ids.shape) == ((6, 4, 5, 1), (6, 8))
        assert batch.weights.tolist() == [1.0] * 6
        for index, text in zip(batch.indices.tolist(), read_back(batch), strict=True):
            assert text in source.captions(index)
            seen.append((index, text))
    for epoch in (0, 1):
        assert sorted(index for index, _ in seen[12 * epoch : 12 * epoch + 12]) == list(range(12))
    assert len({text for _, text in seen}) > 12  # other captions in the second epoch


def test_captions_are_drawn_from_seed_epoch_and_index_alone():
    """Another batch size moves rows, and changes no caption."""
    source = ToyPairs(12)
    small = taken(train_stream(source), 4)
    large = taken(train_stream(source, batch_size=12), 2)
    rows = [
        [pair for batch in batches for pair in zip(batch.indices.tolist(), read_back(batch), strict=True)]
        for batches in (small, large)
    ]
    assert rows[0] == rows[1]
    captions = source.captions(0)
    drawn = [drawn_caption(captions, 1, epoch, 7) for epoch in range(60)]
    assert drawn == [drawn_caption(captions, 1, epoch, 7) for epoch in range(60)]
    assert {captions.index(text) for text in drawn} == {0, 1, 2}


def test_evaluation_sees_each_image_once_in_order():
    """With its first caption. Rows that fill up hold a real text, for attention has to have something to see."""
    source = ToyPairs(8, corrupt=(2,))
    batches = list(pairs_eval_stream(source, WORDS, length=8, batch_size=3, num_threads=0))
    assert [batch.indices.tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5], [6, 7, -1]]
    assert batches[0].weights.tolist() == [1.0, 1.0, 0.0]
    assert batches[2].weights.tolist() == [1.0, 1.0, 0.0]
    assert read_back(batches[2]) == ["image 6 text 0", "image 7 text 0", "image 0 text 0"]
    assert not batches[2].images[2].any()
    last = pairs_eval_stream(ToyPairs(2), WORDS, length=8, batch_size=4, process_index=1, process_count=2)
    assert next(last).indices.tolist() == [-1, -1]


def test_texts_that_are_cut_are_counted():
    texts = ["image", "image text", "image text 1", ""]
    assert isinstance(WORDS, TextEncoder)
    assert [count_cut(texts, WORDS, length) for length in (5, 4, 3)] == [0, 1, 2]
    assert count_cut([], WORDS, 4) == 0
    cut = next(train_stream(ToyPairs(3), length=4)).text
    assert (cut.ids.shape, cut.mask.all()) == ((6, 4), True)


def test_streams_refuse_what_does_not_fit():
    with pytest.raises(
        ValueError, match=r"differ in shape: toy \d is \(\d, 5, 1\), toy \d is \(\d, 5, 1\) \(after the"
    ):
        next(train_stream(ToyPairs(6, sizes=((4, 5), (3, 5))), transform=lambda image, rng: image, seed=0))
    with pytest.raises(ValueError, match="length=0; expected the tokens of a text, 1 or more"):
        train_stream(ToyPairs(3), length=0)
    with pytest.raises(ValueError, match="batch_size=5 is global"):
        train_stream(ToyPairs(3), batch_size=5, process_count=2)
    with pytest.raises(ValueError, match="start_step=-1"):
        train_stream(ToyPairs(3), start_step=-1)
