"""The cache of frozen features: reused where everything is the same, and never for another model or other data."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from toy import NAMES, toy_config, toy_images, toy_labels, with_loop, write_folder, write_npz

from eqvision import create
from eqvision.data import Arrays, ImageFolder, Mixture
from eqvision.evaluators import cached_features, extract_features, source_fingerprint


@pytest.fixture
def one_device():
    return Mesh(np.array(jax.devices()[:1]), ("data",))


@pytest.fixture
def config(tmp_path):
    return toy_config(tmp_path / "run", write_npz(tmp_path / "toy.npz"))


def model_of(config, seed=0, num_classes=3):
    return create(config.model.name, num_classes=num_classes, image_size=8, in_channels=1, key=jax.random.key(seed))


def with_data(config, **changes):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def source(count=21, seed=0):
    labels = toy_labels(count)
    return Arrays(toy_images(labels, seed=seed), labels, NAMES)


class Cache:
    """``cached_features`` in one folder, with what is said meanwhile."""

    def __init__(self, config, mesh, folder, capsys):
        self.config, self.mesh, self.folder, self.capsys = config, mesh, folder, capsys
        self.model, self.data, self.split, self.step = model_of(config), source(), "train", 4

    def __call__(self):
        model, stats = self.model
        features = cached_features(
            model, stats, self.data, self.config, self.mesh, folder=self.folder, split=self.split, step=self.step
        )
        return features, self.capsys.readouterr().err

    @property
    def files(self):
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture
def cache(config, one_device, tmp_path, capsys):
    return Cache(config, one_device, tmp_path / "features", capsys)


def test_features_are_reused_and_it_is_said(cache):
    first, said = cache()
    assert "reused" not in said
    [name] = cache.files  # nor is a temporary file left
    assert name.startswith("train-4-")
    second, said = cache()
    assert said == f"features of 'train' at step 4: reused {cache.folder / name}\n"
    assert first.values.tobytes() == second.values.tobytes()
    assert np.array_equal(first.labels, second.labels)


def change_model(cache):
    cache.model = model_of(cache.config, seed=1)


def change_statistics(cache):
    model, stats = cache.model
    cache.model = model, jax.tree.map(lambda x: x + 1, stats)


def change_one_pixel(cache):
    cache.data.images[20, 7, 7, 0] ^= 1


def change_a_label(cache):
    cache.data.labels[3] = (cache.data.labels[3] + 1) % 3


def change_mean(cache):
    cache.config = with_data(cache.config, mean=(0.4,))


def change_precision(cache):
    cache.config = with_loop(cache.config, compute_dtype="bfloat16")


def change_split(cache):
    cache.split = "test"


def change_step(cache):
    cache.step = 8


@pytest.mark.parametrize(
    "change",
    [
        change_model,
        change_statistics,
        change_one_pixel,
        change_a_label,
        change_mean,
        change_precision,
        change_split,
        change_step,
    ],
)
def test_features_of_another_model_or_other_data_are_never_used(change, cache):
    cache()
    change(cache)
    found, said = cache()
    assert "reused" not in said
    expected = extract_features(*cache.model, cache.data, cache.config, cache.mesh)
    assert found.values.tobytes() == expected.values.tobytes()
    assert np.array_equal(found.labels, expected.labels)


def test_what_changes_nothing_reuses(cache):
    cache()
    cache.config = with_loop(cache.config, eval_batch_size=7, batch_size=3)
    assert "reused" in cache()[1]


def test_one_step_of_each_split_is_kept(cache):
    for split, step in (("train", 4), ("test", 4), ("train-2", 4), ("train[:8]", 4), ("train", 8)):
        cache.split, cache.step = split, step
        cache()
    assert [name.rsplit("-", 1)[0] for name in cache.files] == ["test-4", "train-2-4", "train-8", "train__8_-4"]


@pytest.mark.parametrize("content", [b"", b"PK", None])
def test_a_damaged_file_is_computed_again(content, cache):
    expected, _ = cache()
    file = cache.folder / cache.files[0]
    file.write_bytes(file.read_bytes()[:-60] if content is None else content)
    found, said = cache()
    assert "cannot be read" in said
    assert str(file) in said
    assert np.array_equal(found.values, expected.values)
    assert "reused" in cache()[1]


def test_a_file_with_another_key_is_not_used(cache):
    expected, _ = cache()
    file = cache.folder / cache.files[0]
    np.savez(file, values=np.zeros((21, 2), np.float32), labels=np.zeros(21, np.int32), key=np.array("{}"))
    found, said = cache()
    assert "is of other features" in said
    assert np.array_equal(found.values, expected.values)


def test_a_failed_write_leaves_nothing_behind(cache, monkeypatch):
    def full(file, **arrays):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        with pytest.raises(OSError, match="No space left"):
            cache()
    assert cache.files == []


def test_fingerprints_tell_folders_apart(tmp_path):
    images = write_folder(tmp_path / "images")
    first = source_fingerprint(ImageFolder(images, "train"))
    assert source_fingerprint(ImageFolder(images, "train")) == first
    assert source_fingerprint(ImageFolder(images, "test")) != first
    file = images / "train" / "bee" / "3.jpg"
    file.write_bytes((images / "train" / "ant" / "3.jpg").read_bytes())
    assert source_fingerprint(ImageFolder(images, "train")) != first


def test_fingerprints_see_all_of_a_mixture():
    parts = [source(40, seed=1), source(40, seed=2)]
    first = source_fingerprint(Mixture(parts, (1, 1)))
    parts[1].images[17, 3, 3, 0] ^= 1
    assert source_fingerprint(Mixture(parts, (1, 1))) != first


def test_a_changed_archive_is_seen(config, tmp_path, cache):
    shard = tmp_path / "shards" / "0.tar"
    shard.parent.mkdir()
    shard.write_bytes(b"one")
    cache.config = with_data(config, kind="tar", path=str(shard.parent))
    cache()
    assert "reused" in cache()[1]
    shard.write_bytes(b"other")
    assert "reused" not in cache()[1]
