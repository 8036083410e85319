"""ArrayRecord, TFDS, Hugging Face, mixtures and subsets: the same images as the folder they were made from."""

import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from images import assert_same, noise, numbered, take, truncate, write_folder
from PIL import Image

from eqvision.data import (
    ArrayRecords,
    Arrays,
    CorruptImageError,
    EncodedSource,
    HuggingFaceImages,
    ImageFolder,
    Mixture,
    Source,
    Subset,
    TfdsImages,
    check_data,
    eval_stream,
    guess_kind,
    open_source,
    steps_per_epoch,
    train_stream,
    write_array_record,
)
from eqvision.data.mixture import shuffled_indices


def assert_same_examples(source, folder):
    assert isinstance(source, EncodedSource)
    assert len(source) == len(folder)
    assert source.class_names == folder.class_names
    np.testing.assert_array_equal(source.labels, folder.labels)
    assert source.labels.dtype == np.int32
    for index in range(len(folder)):
        assert source.encoded(index) == folder.encoded(index)
        np.testing.assert_array_equal(source[index].image, folder[index].image)
        assert (source[index].label, source[index].index) == (folder.labels[index], index)


def checked(path):
    """What ``eqvision data check`` covers: images in each split, all of them good."""
    report = check_data(path, kind=guess_kind(path))
    assert report.num_bad == 0
    return {split: len(findings) for split, findings in report.findings.items()}


def assert_threads_and_pickles(source):
    wanted = [source.encoded(i) for i in range(len(source))]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(source.encoded, [*range(len(source))] * 20)) == wanted * 20
    sent = pickle.dumps(source)
    assert len(sent) < 4000
    code = "import pickle, sys; s = pickle.load(sys.stdin.buffer); sys.stdout.buffer.write(s.encoded(2))"
    result = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, check=True)
    assert result.stdout == wanted[2]


def test_the_folder_itself(tmp_path):
    folder = ImageFolder(write_folder(tmp_path))
    assert_same_examples(folder, folder)
    assert_threads_and_pickles(folder)


def test_file_names_that_are_no_text(tmp_path):
    write_folder(tmp_path)
    os.rename(tmp_path / "cat" / "0.jpg", os.fsencode(tmp_path / "cat") + b"/\xff\xfe.jpg")
    source = pickle.loads(pickle.dumps(ImageFolder(tmp_path)))
    assert sorted(os.path.basename(source.describe(i)) for i in range(3)) == ["1.jpg", "2.jpg", "\udcff\udcfe.jpg"]
    assert source[2].image.shape == (20, 24, 3)


# ArrayRecord


@pytest.fixture
def records(tmp_path):
    pytest.importorskip("array_record", reason="extra [records]")
    folder = ImageFolder(write_folder(tmp_path / "folder"))
    write_array_record(folder, tmp_path / "records", "train", shard_size=4)
    return folder, tmp_path / "records"


def test_array_record_round_trip(records):
    folder, path = records
    source = ArrayRecords(path, "train")
    assert_same_examples(source, folder)
    assert_threads_and_pickles(source)
    assert source.describe(5) == f"{path}/train-00001-of-00002.array_record::1 (2.jpg)"
    assert guess_kind(path) == "array_record"
    assert checked(path) == {"train": 6}
    with pytest.raises(FileExistsError, match=r"train-00000-of-00002\.array_record exists already"):
        write_array_record(folder, path, "train")
    with pytest.raises(ValueError, match="expected 3; the first that differs is number 2: none, expected owl"):
        ArrayRecords(path, "train", class_names=("cat", "dog", "owl"))


def test_array_record_of_another_origin(records):
    from array_record.python.array_record_module import ArrayRecordWriter

    _, path = records
    writer = ArrayRecordWriter(str(path / "other.array_record"), "group_size:1")
    writer.write(b"\n\x00tf.train.Example")
    writer.close()
    with pytest.raises(ValueError, match=r"other\.array_record has no table of labels .*use the kind 'tfds'"):
        ArrayRecords(path / "other.array_record")
    (path / "half.array_record").write_bytes((path / "train-00000-of-00002.array_record").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"half\.array_record is no whole ArrayRecord file"):
        ArrayRecords(path / "half.array_record")


def test_array_record_with_a_flipped_bit(tmp_path):
    pytest.importorskip("array_record", reason="extra [records]")
    folder = ImageFolder(write_folder(tmp_path / "folder", per_class=2, shape=(200, 200, 3)))
    (file,) = write_array_record(folder, tmp_path / "records")
    content = bytearray(file.read_bytes())
    place = content.find(folder.encoded(1)[5000:5100])
    content[place] ^= 1
    file.write_bytes(content)
    source = ArrayRecords(file, on_corrupt="skip")
    assert [source[i].weight for i in range(4)] == [1, 0, 1, 1]
    with pytest.raises(CorruptImageError, match=rf"corrupt image {file}::1 \(1\.jpg\): .*index 1"):
        ArrayRecords(file)[1]


def test_array_record_keeps_rows_of_labels(tmp_path):
    pytest.importorskip("array_record", reason="extra [records]")
    folder = ImageFolder(write_folder(tmp_path / "folder"))
    folder.labels = np.eye(6, 2, dtype=np.float32)
    write_array_record(folder, tmp_path / "records", shard_size=5)
    source = ArrayRecords(tmp_path / "records")
    np.testing.assert_array_equal(source.labels, np.eye(6, 2))
    assert source.labels.dtype == np.float32


# TFDS


@pytest.fixture
def prepared(tmp_path):
    """A data set that the real package prepares, without TensorFlow."""
    tfds = pytest.importorskip("tensorflow_datasets", reason="extra [tfds]")
    folder = ImageFolder(write_folder(tmp_path / "folder", suffix=".png"))

    class Pets(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=["cat", "dog"])}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(6), "validation": self._generate_examples(2)}

        def _generate_examples(self, count):
            for i in range(count):
                yield i, {"image": folder.describe(i), "label": int(folder.labels[i])}

    Pets(data_dir=tmp_path / "tfds", file_format="array_record").download_and_prepare()
    for file in (tmp_path / "tfds" / "pets" / "1.0.0").iterdir():
        os.utime(file, (1_000_000, 1_000_000))
    return folder, tmp_path / "tfds" / "pets"


def test_tfds_without_tensorflow(prepared, monkeypatch):
    folder, path = prepared
    source = TfdsImages(path, "train")
    assert "tensorflow" not in sys.modules
    # TFDS shuffles what it writes.
    place = {folder.encoded(i): i for i in range(6)}
    order = [place[source.encoded(i)] for i in range(6)]
    assert sorted(order) == list(range(6))
    np.testing.assert_array_equal(source.labels, folder.labels[order])
    np.testing.assert_array_equal(source[4].image, folder[order[4]].image)
    assert_threads_and_pickles(source)
    assert source.class_names == ("cat", "dog")
    assert source.describe(3) == f"{path}/1.0.0/train[3]"
    assert (len(TfdsImages(path, "val")), len(TfdsImages(path, "train[:50%]"))) == (2, 3)
    assert guess_kind(path) == guess_kind(path / "1.0.0") == "tfds"
    assert checked(path) == {"train": 6, "validation": 2}
    monkeypatch.setattr(TfdsImages, "_scan_labels", lambda self: pytest.fail("the labels were read again"))
    np.testing.assert_array_equal(TfdsImages(path, "train").labels, source.labels)


def test_tfds_mistakes(prepared, tmp_path):
    _, path = prepared
    with pytest.raises(ValueError, match=r"has no split 'test'; it has: train, validation"):
        TfdsImages(path, "test")
    with pytest.raises(
        ValueError, match=r"no column 'mask' of type Image; it has: image \(Image\), label \(ClassLabel\)"
    ):
        TfdsImages(path, "train", image_column="mask")
    with pytest.raises(
        FileNotFoundError, match=r"folder has no dataset_info\.json; expected a folder DATA_DIR/NAME/VE"
    ):
        TfdsImages(tmp_path / "folder", "train")


def test_missing_packages_name_the_extra(tmp_path, monkeypatch):
    for module in ("tensorflow_datasets", "datasets", "array_record.python.array_record_module"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / "never_seen.array_record").write_text("{}")
    for source, extra in ((TfdsImages, "tfds"), (HuggingFaceImages, "hf"), (ArrayRecords, "records")):
        with pytest.raises(ImportError, match=rf"pip install eqvision\[{extra}\]"):
            source(tmp_path)


# Hugging Face


@pytest.fixture
def saved(tmp_path):
    datasets = pytest.importorskip("datasets", reason="extra [hf]")
    folder = ImageFolder(write_folder(tmp_path / "folder"))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {
        "image": [{"bytes": folder.encoded(i), "path": None} for i in range(6)],
        "label": folder.labels.tolist(),
    }
    table = datasets.Dataset.from_dict(rows, features=features)
    both = datasets.DatasetDict({"train": table, "validation": table.select([4, 1])})
    both.save_to_disk(tmp_path / "hf")
    return folder, tmp_path / "hf"


def test_hugging_face(saved):
    folder, path = saved
    source = HuggingFaceImages(path, "train")
    assert_same_examples(source, folder)
    assert_threads_and_pickles(source)
    assert source.describe(2) == f"{path}/train[2]"
    val = HuggingFaceImages(path, "val")
    np.testing.assert_array_equal(val.labels, folder.labels[[4, 1]])
    assert val.encoded(1) == folder.encoded(1)
    assert len(HuggingFaceImages(path / "validation")) == 2
    assert guess_kind(path) == guess_kind(path / "train") == "huggingface"
    assert checked(path) == {"train": 6, "validation": 2}
    assert checked(path / "train") == {"": 6}


def test_hugging_face_names_and_mistakes(saved, tmp_path):
    import datasets

    folder, path = saved
    features = datasets.Features(
        {"img": datasets.Image(), "fine": datasets.ClassLabel(names=["a"]), "x": datasets.Image()}
    )
    rows = {"img": [folder.describe(0)], "fine": [None], "x": [folder.describe(1)]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"several columns of type Image; it has: fine \(ClassLabel\), img \(Image\), x"
    ):
        HuggingFaceImages(tmp_path / "other")
    source = HuggingFaceImages(tmp_path / "other", image_column="x")
    assert (source.encoded(0), source.labels.tolist()) == (folder.encoded(1), [-1])
    with pytest.raises(ValueError, match="has no split 'test'; it has: train, validation"):
        HuggingFaceImages(path, "test")
    with pytest.raises(FileNotFoundError, match="no data set written by datasets' save_to_disk"):
        HuggingFaceImages(tmp_path / "folder", "train")


def test_kinds(tmp_path):
    write_folder(tmp_path / "train")
    assert guess_kind(tmp_path) == "folder"
    assert len(open_source("folder", tmp_path, "train")) == 6
    with pytest.raises(ValueError, match="data kind 'fodler' does not exist; nearest: folder"):
        open_source("fodler", tmp_path)


# Mixtures


def parts():
    return numbered(23), numbered(7), numbered(40)


def same_classes(*sources):
    names = tuple(map(str, range(40)))
    return [Arrays(s.images, s.labels, names) for s in sources]


def test_mixture_is_all_examples_one_behind_the_other():
    sources = same_classes(*parts())
    mixture = Mixture(sources, (1, 1, 2))
    assert isinstance(mixture, Source)
    assert not isinstance(mixture, EncodedSource)
    assert (len(mixture), mixture.weights) == (70, (0.25, 0.25, 0.5))
    np.testing.assert_array_equal(mixture.labels, np.concatenate([s.labels for s in sources]))
    for index, (part, inside) in {0: (0, 0), 22: (0, 22), 23: (1, 0), 30: (2, 0), 69: (2, 39), -1: (2, 39)}.items():
        np.testing.assert_array_equal(mixture[index].image, sources[part].images[inside])
        assert mixture[index].index == index % 70
    assert mixture.describe(23) == "row 0 of arrays"
    batches = take(eval_stream(mixture, batch_size=16, num_threads=2), 5)
    np.testing.assert_array_equal(np.concatenate([b.indices for b in batches])[:70], np.arange(70))
    assert steps_per_epoch(mixture, 16) == 4


def order_of(mixture, count):
    order = shuffled_indices(mixture, seed=5)
    return np.array([order[position] for position in range(count)])


@pytest.mark.parametrize("weights", [(1, 1, 1), (0.7, 0.2, 0.1), (1, 1.00999, 3), (1e-3, 1, 1)])
def test_each_source_gives_its_share_of_every_stretch(weights):
    mixture = Mixture(same_classes(*parts()), weights)
    source = np.searchsorted([23, 30], order_of(mixture, 1000), side="right")
    taken = np.cumsum(source[:, None] == np.arange(3), axis=0)
    expected = np.arange(1, 1001)[:, None] * np.array(weights) / sum(weights)
    assert np.abs(taken - expected).max() < 3


def test_each_source_is_reshuffled_when_it_is_used_up():
    order = order_of(Mixture(same_classes(*parts()), (0.5, 0.3, 0.2)), 400)
    for start, stop in ((0, 23), (23, 30), (30, 70)):
        mine = order[(order >= start) & (order < stop)]
        epochs = mine[: len(mine) // (stop - start) * (stop - start)].reshape(-1, stop - start)
        np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(start, stop), (len(epochs), 1)))
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_mixture_resumes_at_any_step_at_once_and_for_any_threads():
    mixture = Mixture(same_classes(*parts()), (0.5, 0.3, 0.2))
    options = {"batch_size": 6, "seed": 3}
    whole = take(train_stream(mixture, num_threads=0, **options), 20)
    for start, threads in ((0, 3), (7, 0), (13, 2)):
        assert_same(
            whole[start:], take(train_stream(mixture, num_threads=threads, start_step=start, **options), 20 - start)
        )
    (far,) = take(train_stream(mixture, num_threads=0, start_step=10**12, **options), 1)
    assert far.indices.shape == (6,)
    halves = [
        take(train_stream(mixture, num_threads=0, process_index=i, process_count=2, **options), 20) for i in (0, 1)
    ]
    for batch, first, second in zip(whole, *halves, strict=True):
        np.testing.assert_array_equal(batch.indices, np.concatenate([first.indices, second.indices]))


def test_a_source_alone_is_ordered_as_before_and_seeds_differ():
    mixture = Mixture(same_classes(*parts()), (1, 1, 1))
    (one,) = take(train_stream(mixture, batch_size=60, seed=0, num_threads=0), 1)
    (two,) = take(train_stream(mixture, batch_size=60, seed=1, num_threads=0), 1)
    assert one.indices.tolist() != two.indices.tolist()


def test_mixture_of_kinds_pickles_and_counts(tmp_path):
    folder = ImageFolder(write_folder(tmp_path / "a"), on_corrupt="skip")
    write_folder(tmp_path / "b", per_class=1)
    truncate(tmp_path / "b" / "dog" / "0.jpg")
    mixture = Mixture([folder, ImageFolder(tmp_path / "b", on_corrupt="skip")], (3, 1))
    assert isinstance(mixture, EncodedSource)
    copy = pickle.loads(pickle.dumps(mixture))
    assert copy.encoded(6) == (tmp_path / "b" / "cat" / "0.jpg").read_bytes()
    assert copy.describe(7) == str(tmp_path / "b" / "dog" / "0.jpg")
    assert (copy[7].weight, copy[7].index, copy.num_skipped) == (0.0, 7, 1)


def test_mixture_mistakes():
    one, two = numbered(3), numbered(4)
    with pytest.raises(
        ValueError, match=r"classes differ: only with row 0 of arrays: nothing; only with row 0 of arrays: 3"
    ):
        Mixture([one, two], (1, 1))
    named = [Arrays(one.images, one.labels, names) for names in (("a", "b", "c"), ("b", "a", "c"))]
    with pytest.raises(ValueError, match="the order differs"):
        Mixture(named, (1, 1))
    for weights in ((1, 0), (1, -1), (1, float("nan"))):
        with pytest.raises(ValueError, match="expected positive numbers"):
            Mixture([one, one], weights)
    with pytest.raises(ValueError, match="2 sources and 1 weights"):
        Mixture([one, one], (1,))
    rows = Arrays(one.images, np.eye(3), one.class_names)
    with pytest.raises(ValueError, match="a mixture needs the same kind of labels"):
        Mixture([one, rows], (1, 1))


# Subsets


def test_subset(tmp_path):
    source = numbered(10)
    subset = Subset(source, np.array([7, 2, 5]))
    assert not isinstance(subset, EncodedSource)
    np.testing.assert_array_equal(subset.labels, [7, 2, 5])
    assert [subset[i].label for i in range(3)] == [7, 2, 5]
    assert [subset[i].index for i in (0, 1, -1)] == [0, 1, 2]
    assert subset.describe(0) == "row 7 of arrays"
    with pytest.raises(IndexError):
        subset[3]
    with pytest.raises(TypeError, match="take subsets of its sources"):
        Subset(Mixture([source], (1,)), np.arange(3))
    folder = Subset(ImageFolder(write_folder(tmp_path)), np.array([4, 0]))
    assert isinstance(folder, EncodedSource)
    assert pickle.loads(pickle.dumps(folder)).encoded(0) == (tmp_path / "dog" / "1.jpg").read_bytes()


def test_open_source_hands_its_options_on(tmp_path):
    write_folder(tmp_path / "train", suffix=".png")
    source = open_source("folder", tmp_path, "train", in_channels=1, class_names=("dog", "cat"))
    assert source[0].image.shape == (20, 24, 1)
    assert source.labels[0] == 1
    with pytest.raises(ValueError, match="on_corrupt='ignore'"):
        open_source("folder", tmp_path, "train", on_corrupt="ignore")
    Image.fromarray(noise((4, 4, 3))).save(tmp_path / "train" / "cat" / "new.png")
    assert len(open_source("folder", tmp_path, "train")) == 7
