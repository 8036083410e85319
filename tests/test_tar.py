"""Tar shards: labels, splits, the index, damage, and reading by threads and processes."""

import gzip
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from images import assert_same, noise, take
from PIL import Image

from eqvision.data import CorruptImageError, EncodedSource, TarShards, check_labels, decode_bytes, train_stream


def png(seed, shape=(6, 5, 3)):
    stream = io.BytesIO()
    Image.fromarray(noise(shape, seed)).save(stream, "PNG")
    return stream.getvalue()


def write_tar(path, members, old=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    if old:  # as a data set that was not written a moment ago
        os.utime(path, (1_000_000, 1_000_000))
    return path


def numbered_members(first, count, classes=3):
    members = {}
    for i in range(first, first + count):
        members |= {f"{i:04d}.png": png(i), f"{i:04d}.cls": str(i % classes).encode()}
    return members


def write_shards(root, counts=(4, 3), name="train"):
    first = 0
    for number, count in enumerate(counts):
        write_tar(root / f"{name}-{number:03d}.tar", numbered_members(first, count))
        first += count
    return root


# What is read


def test_images_labels_and_names(tmp_path):
    source = TarShards(write_shards(tmp_path), "train")
    assert isinstance(source, EncodedSource)
    assert (len(source), source.class_names) == (7, ("0", "1", "2"))
    np.testing.assert_array_equal(source.labels, np.arange(7) % 3)
    for index in (0, 3, 4, 6):
        assert source.encoded(index) == png(index)
        np.testing.assert_array_equal(source[index].image, noise((6, 5, 3), index))
    assert source[-1].index == 6
    assert source.describe(5) == f"{tmp_path}/train-001.tar::0005.png"
    with pytest.raises(IndexError):
        source[7]


def test_labels_from_names_json_and_folders(tmp_path):
    texts = {"a.png": png(0), "a.cls": b"dog\n", "b.png": png(1), "b.cls": b"cat"}
    source = TarShards(write_tar(tmp_path / "text.tar", texts))
    assert (source.class_names, source.labels.tolist()) == (("cat", "dog"), [1, 0])

    as_json = {"x/a.png": png(0), "x/a.json": json.dumps({"label": 4}).encode()}
    source = TarShards(write_tar(tmp_path / "json.tar", as_json))
    assert (source.class_names, source.labels.tolist()) == (tuple("01234"), [4])

    folders = {"set/10/a.1.png": png(0), "set/2/b.JPG": png(1), "set/2/._b.jpg": b"macOS"}
    source = TarShards(write_tar(tmp_path / "folder.tar", folders))
    assert (source.class_names, source.labels.tolist()) == (("10", "2"), [0, 1])
    np.testing.assert_array_equal(source[0].image, noise((6, 5, 3), 0))

    source = TarShards(tmp_path / "text.tar", class_names=("owl", "cat", "dog"))
    assert source.labels.tolist() == [2, 1]
    with pytest.raises(ValueError, match=r"class cat is not among the 2 class_names; nearest: cats"):
        TarShards(tmp_path / "text.tar", class_names=("cats", "dog"))


def test_the_number_decides_before_the_description(tmp_path):
    members = {"a.json": b'{"caption": "x"}', "a.png": png(0), "a.cls": b"3", "a.mask.png": png(1)}
    source = TarShards(write_tar(tmp_path / "a.tar", members))
    assert (len(source), source.labels.tolist()) == (1, [3])  # the mask accompanies the image


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": b"x"}, r'a\.tar::a\.png has no label; expected a\.cls, a\.json with a "label", or a class folder'),
        ({"a.png": b"x", "a.cls": b" "}, r"a\.cls is empty"),
        ({"a.png": b"x", "a.json": b"{"}, r"a\.json is no JSON"),
        ({"a.png": b"x", "a.json": b'{"caption": 1, "url": 2}'}, r'has the keys caption, url; expected "label"'),
        ({"a.png": b"x", "a.json": b'{"label": [1]}'}, r'"label": \[1\]; expected a class number or name'),
        ({"a.png": b"x", "a.jpg": b"x", "a.cls": b"1"}, r"two images a\.png and a\.jpg"),
        ({"a.txt": b"x"}, r"no images in .*a\.tar"),
        (
            {"a.png": b"x", "a.cls": b"1", "cat/b.png": b"x"},
            r"a\.png has its label from a \.cls file; .*cat/b\.png has its label from its folder",
        ),
    ],
)
def test_labels_that_are_missing_or_unclear(tmp_path, members, message):
    path = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(ValueError, match=message):
        TarShards(path)


def test_too_large_a_number_is_found_by_the_label_check(tmp_path):
    source = TarShards(write_tar(tmp_path / "a.tar", numbered_members(0, 3)), class_names=("a", "b"))
    with pytest.raises(ValueError, match=r"label 2 in .*a\.tar::0002\.png but the head has 2 classes"):
        check_labels(source, 2)


# Splits and patterns


def test_splits_by_name_folder_and_pattern(tmp_path):
    write_shards(tmp_path / "names", (2, 2), "imagenet-train")
    write_shards(tmp_path / "names", (3,), "imagenet-validation")
    assert len(TarShards(tmp_path / "names", "train")) == 4
    assert len(TarShards(tmp_path / "names", "val")) == 3
    assert len(TarShards(tmp_path / "names" / "*train-00[01].tar")) == 4
    assert len(TarShards(tmp_path / "names" / "imagenet-train-{000..001}.tar", "train")) == 4
    write_shards(tmp_path / "folders" / "test", (3,), "x")
    assert len(TarShards(tmp_path / "folders", "test")) == 3
    with pytest.raises(ValueError, match=r"shards of the splits train, val; choose one: split='train'"):
        TarShards(tmp_path / "names")
    with pytest.raises(FileNotFoundError, match=r"no shard of split 'test' in .*as a word in the names"):
        TarShards(tmp_path / "names", "test")
    with pytest.raises(FileNotFoundError, match=r"no shard matches .*train-002\.tar.*did you mean"):
        TarShards(tmp_path / "names" / "imagenet-train-{000..002}.tar")
    with pytest.raises(FileNotFoundError, match=r"no shards \*\.tar in .*; it contains: names, other|folders, names"):
        TarShards(tmp_path)
    with pytest.raises(ValueError, match="unknown split 'tran'"):
        TarShards(tmp_path / "names", "tran")


def test_splits_share_their_classes(tmp_path):
    write_tar(tmp_path / "train.tar", {"cat/a.png": png(0), "dog/b.png": png(1)})
    write_tar(tmp_path / "test.tar", {"dog/a.png": png(0), "owl/b.png": png(1)})
    with pytest.raises(ValueError, match=r"only in 'test': owl; only in 'train': cat"):
        TarShards(tmp_path, "test")
    # Numbers need no agreement: the largest of any split counts.
    write_tar(tmp_path / "n" / "train.tar", numbered_members(0, 5, classes=5))
    write_tar(tmp_path / "n" / "test.tar", numbered_members(0, 2, classes=2))
    assert TarShards(tmp_path / "n", "test").class_names == tuple("01234")


# The index


def scan_forbidden(shard):
    raise AssertionError(f"{shard} was read again")


def test_index_is_kept_and_follows_changes(tmp_path, monkeypatch):
    first = TarShards(write_shards(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr("eqvision.data.tar_index._members_of_shard", scan_forbidden)
        again = TarShards(tmp_path)
    assert [again.describe(i) for i in range(7)] == [first.describe(i) for i in range(7)]
    assert [again.encoded(i) for i in range(7)] == [first.encoded(i) for i in range(7)]
    np.testing.assert_array_equal(again.labels, first.labels)
    write_tar(tmp_path / "train-001.tar", numbered_members(4, 5))
    assert len(TarShards(tmp_path)) == 9  # other size, same time stamp
    os.utime(tmp_path / "train-001.tar", (2_000_000, 2_000_000))
    monkeypatch.setattr("eqvision.data.tar_index._members_of_shard", scan_forbidden)
    with pytest.raises(AssertionError, match="was read again"):
        TarShards(tmp_path)


def test_damaged_index_is_reported_and_replaced(tmp_path, caplog):
    write_shards(tmp_path)
    TarShards(tmp_path)
    folder = os.path.join(os.environ["EQVISION_CACHE"], "tar")
    (stored,) = os.listdir(folder)
    with open(os.path.join(folder, stored), "r+b") as f:
        f.truncate(100)
    assert len(TarShards(tmp_path)) == 7
    assert caplog.text.count("ignored the unreadable index") == 1
    assert len(TarShards(tmp_path)) == 7
    assert caplog.text.count("ignored the unreadable index") == 1


def test_fresh_shards_are_not_kept(tmp_path):
    TarShards(write_tar(tmp_path / "a.tar", numbered_members(0, 2), old=False))
    assert not os.listdir(os.environ["EQVISION_CACHE"])


# Damage


def test_truncated_shard_names_the_last_good_member(tmp_path):
    path = write_tar(tmp_path / "a.tar", numbered_members(0, 4))
    with tarfile.open(path) as archive:
        third = archive.getmember("0002.png")
    whole = path.read_bytes()
    for length, good in (
        (third.offset_data + 10, "0001.cls"),  # within the data of a member
        (third.offset + 100, "0001.cls"),  # within a header
        (third.offset, "0001.cls"),  # between two members
        (100, None),
    ):
        path.write_bytes(whole[:length])
        expected = f"the last good member is {good}" if good else "it has no good member"
        with pytest.raises(
            ValueError, match=rf"tar shard {path} \({length} bytes\) is truncated or damaged: {expected}"
        ):
            TarShards(path)


def test_damaged_headers_and_joined_archives(tmp_path):
    path = write_tar(tmp_path / "a.tar", numbered_members(0, 4))
    with tarfile.open(path) as archive:
        offset = archive.getmember("0002.png").offset
    whole = bytearray(path.read_bytes())
    damaged = whole.copy()
    damaged[offset] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(
        ValueError, match=rf"last good member is 0001\.cls; then: the header at byte {offset} is damaged"
    ):
        TarShards(path)
    path.write_bytes(whole + whole)
    with pytest.raises(ValueError, match="more bytes, which readers of tar ignore"):
        TarShards(path)
    path.write_bytes(gzip.compress(whole))
    with pytest.raises(ValueError, match=r"is compressed \(gzip\).*Store a plain \.tar"):
        TarShards(path)


def test_corrupt_image_raises_or_weighs_nothing(tmp_path, caplog):
    members = numbered_members(0, 3) | {"0001.png": png(1)[:60]}
    path = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(CorruptImageError, match=rf"corrupt image {path}::0001\.png: .*\(index 1\).*on_corrupt='skip'"):
        TarShards(path)[1]
    source = TarShards(path, on_corrupt="skip")
    assert [source[i].weight for i in (0, 1, 2, 1)] == [1, 0, 1, 0]
    assert (source[1].image.shape, source[1].image.any()) == ((6, 5, 3), False)
    assert (source.num_skipped, caplog.text.count("skipped (weight 0)")) == (1, 1)


def test_shard_that_changes_under_a_source(tmp_path):
    path = write_tar(tmp_path / "a.tar", numbered_members(0, 3))
    source = TarShards(path)
    write_tar(path, numbered_members(5, 4), old=False)
    with pytest.raises(OSError, match=r"a\.tar has changed since this source was made; make it again"):
        source[0]


# Threads and processes


def test_threads_read_the_right_bytes(tmp_path):
    source = TarShards(write_shards(tmp_path, (20, 20)))
    wanted = [source.encoded(i) for i in range(40)]
    order = np.random.default_rng(0).integers(40, size=2000).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.encoded, order)) == [wanted[i] for i in order]


def test_more_shards_than_may_be_open(tmp_path, monkeypatch):
    source = TarShards(write_shards(tmp_path, (1,) * 140))
    open_before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert [source.encoded(i) for i in range(140)] == [png(i) for i in range(140)]
    assert len(os.listdir("/proc/self/fd")) - open_before <= 128


def test_a_pickled_source_reads_in_another_process(tmp_path):
    source = TarShards(write_shards(tmp_path))
    source[0]
    sent = pickle.dumps(source)
    assert len(sent) < 4000
    code = "import pickle, sys; s = pickle.load(sys.stdin.buffer); sys.stdout.buffer.write(s.encoded(5))"
    result = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, check=True)
    np.testing.assert_array_equal(decode_bytes(result.stdout, name="5"), noise((6, 5, 3), 5))


def test_stream_is_the_same_for_any_threads(tmp_path):
    source = TarShards(write_shards(tmp_path))
    runs = [take(train_stream(source, batch_size=3, seed=0, num_threads=n), 5) for n in (0, 3)]
    assert_same(*runs)
