"""A folder with one percent of corrupt images of every kind (R8): checking it, and training on it by each policy."""

import os
import re
import shutil

import numpy as np
import pytest
from images import assert_same, noise, take, truncate, write_folder
from PIL import Image

from eqvision.cli import main
from eqvision.data import (
    CorruptImageError,
    ImageFolder,
    Mixture,
    Subset,
    check_data,
    exclude,
    read_bad_files,
    train_stream,
    write_array_record,
)
from eqvision.data.check import examine, table, write_report
from eqvision.recipes import DataConfig, TrainConfig
from eqvision.setup import load_source

KINDS = ("truncated", "empty", "text", "cmyk", "wide", "palette", "rotated", "tiny")
PER_CLASS = 100


def spoil(kind, path):
    if kind == "truncated":
        truncate(path)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("<html>404 not found</html>")
    elif kind == "cmyk":
        Image.fromarray(noise((20, 24, 3), 901)).convert("CMYK").save(path)
    elif kind == "wide":
        wide = np.arange(480, dtype=np.uint16).reshape(20, 24) * 130
        Image.fromarray(wide + len(path.parent.name)).save(path, "PNG")
    elif kind == "palette":
        Image.fromarray(noise((20, 24, 3), 902)).quantize(8).save(path, "PNG")
    elif kind == "rotated":
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(noise((24, 20, 3), 903)).save(path, exif=exif)
    elif kind == "tiny":
        Image.new("RGB", (1, 1)).save(path)


@pytest.fixture(scope="module")
def spoilt_once(tmp_path_factory):
    """200 images in train, two of them (one percent) spoilt in each of the eight ways; 4 good ones in test."""
    root = tmp_path_factory.mktemp("spoilt")
    write_folder(root / "train", classes=("a", "bb"), per_class=PER_CLASS)
    write_folder(root / "test", classes=("a", "bb"), per_class=2, suffix=".png")
    for number, kind in enumerate(KINDS):
        for name in ("a", "bb"):
            spoil(kind, root / "train" / name / f"{10 * number + 5}.jpg")
    return root


@pytest.fixture
def spoilt(spoilt_once, tmp_path):
    return shutil.copytree(spoilt_once, tmp_path / "set")


def spoilt_paths(root, *kinds):
    return [str(root / "train" / name / f"{10 * KINDS.index(k) + 5}.jpg") for k in kinds for name in ("a", "bb")]


def config_of(path, **data):
    return TrainConfig(data=DataConfig(kind="folder", path=str(path), **data))


BAD = ("truncated", "empty", "text")  # what no decoder can read


def run_check(*arguments):
    """The exit code of ``eqvision data check``."""
    try:
        main(["data", "check", *map(str, arguments)])
    except SystemExit as stop:
        return stop.code
    return 0


# The command


def test_check_finds_every_kind(spoilt, tmp_path, capsys):
    assert run_check(spoilt, "-j", 2, "--out", tmp_path / "out") == 1
    listed = read_bad_files(tmp_path / "out" / "bad_files.txt")
    assert listed.root == str(spoilt)
    assert listed.splits["test"] == []
    reasons = {entry.name: entry.reason for entry in listed.splits["train"]}
    assert sorted(reasons) == sorted(spoilt_paths(spoilt, *BAD, "tiny"))
    for kind, reason in (
        ("truncated", "image file is truncated"),
        ("empty", r"the file is empty \(0 bytes\)"),
        ("text", "cannot identify image file: it begins with b'<html>404"),
        ("tiny", "1 x 1 pixels, less than 2"),
    ):
        for path in spoilt_paths(spoilt, kind):
            assert re.search(reason, reasons[path])
    notes = {entry.name: entry.reason for entry in read_bad_files(tmp_path / "out" / "notes.txt").splits["train"]}
    for kind, note in (
        ("cmyk", "CMYK"),
        ("wide", "16 bit; PNG, named .jpg"),
        ("palette", "palette; PNG, named .jpg"),
        ("rotated", "EXIF rotation"),
    ):
        assert all(notes[path].startswith(note) for path in spoilt_paths(spoilt, kind))
    printed = capsys.readouterr().out
    assert f"204 images in {spoilt} (folder)" in printed
    assert "train: 200 images, 8 bad" in printed
    assert re.search(r"bad +2  truncated", printed)
    assert re.search(r"note +2  CMYK", printed)
    assert "test: 4 images, 0 bad" in printed
    assert f"--data.exclude {tmp_path / 'out' / 'bad_files.txt'}" in printed


def test_index_holds_the_good_images(spoilt, tmp_path):
    run_check(spoilt, "--out", tmp_path / "out", "--min-size", 1)
    source = ImageFolder(spoilt, "train")
    bad = {i for i in range(200) if source.describe(i) in spoilt_paths(spoilt, *BAD)}
    with np.load(tmp_path / "out" / "index.npz") as index:
        indices = index["train/indices"]
        assert indices.tolist() == [i for i in range(200) if i not in bad]
        np.testing.assert_array_equal(index["train/labels"], source.labels[indices])
        assert index["train/names"].tolist() == [source.describe(i) for i in indices.tolist()]
        pairs = np.stack([index["train/heights"], index["train/widths"]], axis=1).tolist()
        sizes = dict(zip(index["train/names"].tolist(), pairs, strict=True))
        assert index["class_names"].tolist() == ["a", "bb"]
        assert len(index["test/names"]) == 4
    assert sizes[spoilt_paths(spoilt, "tiny")[0]] == [1, 1]
    assert sizes[spoilt_paths(spoilt, "rotated")[0]] == [20, 24]  # upright


def test_a_clean_set_exits_with_0(tmp_path, capsys):
    write_folder(tmp_path / "set")
    assert run_check(tmp_path / "set", "--out", tmp_path / "out") == 0
    printed = capsys.readouterr()
    assert "all: 6 images, 0 bad" in printed.out
    assert "exclude" not in printed.out
    assert "6/6" in printed.err  # the bar


def test_duplicates_are_notes(tmp_path):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "test", per_class=1, suffix=".png")
    shutil.copy(tmp_path / "train" / "cat" / "0.jpg", tmp_path / "train" / "cat" / "9.jpg")
    shutil.copy(tmp_path / "train" / "cat" / "1.jpg", tmp_path / "train" / "dog" / "9.jpg")
    shutil.copy(tmp_path / "train" / "dog" / "0.jpg", tmp_path / "test" / "dog" / "9.jpg")
    report = check_data(tmp_path, kind="folder", num_threads=2)
    notes = {
        report.sources[split].describe(i): found.notes
        for split, findings in report.findings.items()
        for i, found in enumerate(findings)
        if found.notes
    }
    train, test = tmp_path / "train", tmp_path / "test"
    assert notes == {
        f"{train}/cat/9.jpg": (f"duplicate: {train}/cat/0.jpg",),
        f"{train}/dog/9.jpg": (f"duplicate with another label: {train}/cat/1.jpg",),
        f"{test}/dog/9.jpg": (f"duplicate in another split: {train}/dog/0.jpg",),
    }
    assert report.num_bad == 0
    assert "note        1  duplicate in another split" in table(report)


def test_unreadable_files_are_listed_and_the_rest_goes_on(tmp_path):
    source = ImageFolder(write_folder(tmp_path))
    os.unlink(tmp_path / "cat" / "1.jpg")
    os.symlink(tmp_path / "nowhere", tmp_path / "cat" / "1.jpg")
    findings = [examine(source, index, min_size=2) for index in range(6)]
    assert [f.problem for f in findings] == ["", "cannot be read: No such file or directory", "", "", "", ""]


def test_check_of_array_records_and_mistakes(spoilt, tmp_path, capsys):
    pytest.importorskip("array_record", reason="extra [records]")
    write_array_record(ImageFolder(spoilt, "train"), tmp_path / "records", "train")
    assert run_check(tmp_path / "records", "--out", tmp_path / "out") == 1
    index_of_5 = sorted(f"{i}.jpg" for i in range(PER_CLASS)).index("5.jpg")
    names = sorted(
        entry.name
        for entry in read_bad_files(tmp_path / "out" / "bad_files.txt").splits["train"]
        if "(5.jpg)" in entry.name
    )
    assert len(names) == 2
    assert names[1] == f"{tmp_path}/records/train-00000-of-00001.array_record::{index_of_5} (5.jpg)"
    assert run_check(tmp_path / "missing") == 2
    assert "missing does not exist" in capsys.readouterr().err
    assert run_check(spoilt, "--split", "val") == 2
    assert "has no split 'val'; it has: train, test" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["data", "chekc", "x"])
    assert "data command 'chekc' does not exist; nearest: check" in capsys.readouterr().err


# Training on it: raise, skip, exclude


def one_epoch(source, num_threads):
    return take(
        train_stream(source, batch_size=20, seed=0, transform=shrink, num_threads=num_threads), len(source) // 20
    )


def shrink(image, rng):
    """Images differ in size: any crop to one size will do."""
    return np.resize(image, (4, 4, 3)) + rng.integers(2, dtype=np.uint8)


def test_raise_names_the_absolute_path(spoilt, monkeypatch):
    monkeypatch.chdir(spoilt.parent)
    source = ImageFolder("set", "train")
    for path in spoilt_paths(spoilt, *BAD):
        index = [source.describe(i) for i in range(200)].index(path)
        with pytest.raises(CorruptImageError, match=re.escape(f"corrupt image {path}: ")):
            source[index]
    for kind in set(KINDS) - {*BAD}:  # the other kinds are images, whatever their mode
        for path in spoilt_paths(spoilt, kind):
            index = [source.describe(i) for i in range(200)].index(path)
            assert source[index].image.shape == ((1, 1, 3) if kind == "tiny" else (20, 24, 3))
    with pytest.raises(CorruptImageError, match=rf"corrupt image {spoilt}/train/"):
        one_epoch(source, 2)


def test_skip_logs_each_once_counts_and_keeps_the_order(spoilt, caplog):
    runs = []
    for num_threads in (0, 0, 3):
        source = ImageFolder(spoilt, "train", on_corrupt="skip")
        caplog.clear()
        runs.append(one_epoch(source, num_threads) + one_epoch(source, num_threads))
        assert source.num_skipped == 6
        assert caplog.text.count("skipped (weight 0)") == 6
        assert all(path in caplog.text for path in spoilt_paths(spoilt, *BAD))
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])
    assert sum((batch.weights == 0).sum() for batch in runs[0]) == 12


def test_excluded_images_never_appear(spoilt, tmp_path):
    run_check(spoilt, "--out", tmp_path / "out")
    config = config_of(spoilt, exclude=str(tmp_path / "out" / "bad_files.txt"))
    source = load_source(config, "train", train=True)
    assert len(source) == 192
    seen = [take(train_stream(source, batch_size=24, seed=0, transform=shrink, num_threads=n), 16) for n in (0, 3)]
    assert_same(*seen)
    names = {source.describe(int(i)) for batch in seen[0] for i in batch.indices}
    assert len(names) == 192
    assert not names & set(spoilt_paths(spoilt, *BAD, "tiny"))
    assert all(batch.weights.all() for batch in seen[0])
    assert len(load_source(config, "train")) == 200  # evaluation leaves nothing out
    # The order is a function of what remains: a folder without these files gives the same stream.
    for path in spoilt_paths(spoilt, *BAD, "tiny"):
        os.unlink(path)
    assert_same(seen[0], take(train_stream(ImageFolder(spoilt, "train"), batch_size=24, seed=0, transform=shrink), 16))


def test_the_list_follows_a_moved_data_set(spoilt, tmp_path, caplog):
    run_check(spoilt, "--out", tmp_path / "out")
    file = tmp_path / "out" / "bad_files.txt"
    moved = shutil.move(spoilt, tmp_path / "elsewhere")
    assert len(exclude(ImageFolder(moved, "train"), file, moved, "train")) == 192
    os.unlink(tmp_path / "elsewhere" / "train" / "a" / "5.jpg")
    assert len(exclude(ImageFolder(moved, "train"), file, moved, "train")) == 192
    assert "names 8 images, 1 of them are no longer in the data" in caplog.text
    assert len(exclude(ImageFolder(moved, "test"), file, moved, "test")) == 4


def test_lists_that_do_not_fit(spoilt, tmp_path):
    run_check(spoilt, "--out", tmp_path / "out", "--split", "train")
    file = tmp_path / "out" / "bad_files.txt"
    other = ImageFolder(write_folder(tmp_path / "other" / "train"))
    with pytest.raises(ValueError, match=r"none of the 8 images in .*bad_files\.txt \(split 'train'\) is in the data"):
        exclude(other, file, tmp_path / "other", "train")
    with pytest.raises(ValueError, match=r"is no list for split 'test' of .*; it has: train"):
        exclude(ImageFolder(spoilt, "test"), file, spoilt, "test")
    with pytest.raises(FileNotFoundError, match="eqvision data check PATH writes such a file"):
        exclude(other, tmp_path / "missing.txt", spoilt)
    (tmp_path / "list.txt").write_text("a.jpg\nb.jpg\n")
    with pytest.raises(ValueError, match=r"list\.txt begins with 'a\.jpg'; expected bad_files\.txt"):
        exclude(other, tmp_path / "list.txt", spoilt)


def test_list_with_all_images_and_odd_names(tmp_path):
    write_folder(tmp_path / "set", per_class=1)
    for name in ("cat", "dog"):
        (tmp_path / "set" / name / "0.jpg").write_bytes(b"")
    odd = tmp_path / "set" / "cat" / "tab\there\\n\nend \u2028.jpg"
    odd.write_bytes(b"text")
    report = check_data(tmp_path / "set", kind="folder")
    write_report(report, tmp_path / "out")
    file = tmp_path / "out" / "bad_files.txt"
    assert str(odd) in {entry.name for entry in read_bad_files(file).splits[""]}
    with pytest.raises(ValueError, match="names all 3 images: none is left"):
        exclude(ImageFolder(tmp_path / "set"), file, tmp_path / "set")


# The configuration


def test_load_source_mixes_paths(spoilt, tmp_path):
    run_check(spoilt, "--out", tmp_path / "out")
    write_folder(tmp_path / "more" / "train", classes=("a", "bb"))
    mixture = {str(tmp_path / "more"): 1.0, str(spoilt): 3.0}
    config = config_of(spoilt, mixture=mixture, exclude=str(tmp_path / "out" / "bad_files.txt"))
    source = load_source(config, "train", train=True)
    assert isinstance(source, Mixture)
    assert (len(source), source.weights) == (6 + 192, (0.25, 0.75))
    assert isinstance(source.sources[1], Subset)
    assert len(load_source(config, "test")) == 4
    config = config_of("", mixture={str(tmp_path / "more"): 1.0})
    assert len(load_source(config, "train", train=True)) == 6
    with pytest.raises(ValueError, match=r"needs a path for the split 'test': --data\.path .*serves training only"):
        load_source(config, "test")
    config = config_of("", mixture={str(tmp_path / "more"): 1.0}, exclude=str(tmp_path / "out" / "bad_files.txt"))
    with pytest.raises(ValueError, match=rf"is the list of {spoilt}, which is no path of data\.mixture"):
        load_source(config, "train", train=True)
