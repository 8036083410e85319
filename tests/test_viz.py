"""Pictures: the augmented batch is what the step trains on; attention maps are the weights that the layers use."""

import dataclasses
import importlib.util

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from PIL import Image
from toy import NAMES, toy_config, with_loop, write_npz

import eqvision.problems.classification as problem_module
import eqvision.train as train_module
import eqvision.viz as viz_module
from eqvision import create
from eqvision.attention_maps import attention_maps, attention_weights, rollout
from eqvision.backbones import HybridViT, VisionTransformer, ViTSize
from eqvision.backbones.hybrid import HybridStem
from eqvision.classifiers import Classifier
from eqvision.cli import main
from eqvision.heads import TokenHead
from eqvision.mesh import BATCH, make_mesh
from eqvision.predict import Run
from eqvision.recipes import AugmentConfig, ModelConfig
from eqvision.state import first_state
from eqvision.step import make_step
from eqvision.train import set_up, train
from eqvision.viz import (
    TrainingBatch,
    draw_attention,
    draw_batch,
    draw_heads,
    draw_layers,
    free_names,
    label_text,
    training_batch,
    weight_text,
)

MIXED = AugmentConfig(mixup=0.8, cutmix=1.0, random_erasing=0.5)


@pytest.fixture
def config(tmp_path):
    return toy_config(tmp_path / "run", write_npz(tmp_path / "toy.npz"))


def with_augment(config, augment):
    return dataclasses.replace(config, augment=augment)


# The batch


def test_without_mixing_the_batch_is_that_of_the_stream(config):
    batch = training_batch(config, step=3, count=16)
    stream = set_up(config).problem.stream(2)
    expected = next(stream)
    stream.close()
    np.testing.assert_array_equal(batch.images, expected.images)
    np.testing.assert_array_equal(batch.labels, expected.labels)
    np.testing.assert_array_equal(batch.indices, expected.indices)
    assert batch.class_names == set_up(config).problem.source.class_names
    assert batch.size == 16
    first = training_batch(config, step=3, count=5)
    np.testing.assert_array_equal(first.images, expected.images[:5])
    assert not np.array_equal(training_batch(config, step=4, count=16).indices, expected.indices)


def marked(images, labels, weights, key, *, config, num_classes):
    """Stands in for ``augment_batch``, whose samplers take a minute to compile: noise of the key that it is given."""
    noise = 0.3 * jax.random.normal(key, images.shape)
    return images + noise, jax.nn.one_hot(labels, num_classes) + weights[:, None] * jax.random.uniform(key)


class Spy:
    """Keeps what the training step works on, as pixels and labels of every row, of all devices in any order."""

    def __init__(self):
        self.seen = []

    def __call__(self, *given, config, num_classes):
        out = marked(*given, config=config, num_classes=num_classes)
        jax.debug.callback(lambda *arrays: self.seen.append([np.asarray(array) for array in arrays]), *out)
        return out

    def rows(self, config):
        jax.effects_barrier()
        images, labels = (np.concatenate(parts) for parts in zip(*self.seen, strict=True))
        unit = images * np.float32(config.data.std[0]) + np.float32(config.data.mean[0])
        return np.concatenate([np.clip(unit * 255, 0, 255).reshape(len(images), -1), labels], axis=1)


def train_one(config, number):
    """Step ``number`` of a run, on all devices, from the parameters of step 0."""
    setup = set_up(config)
    model, stats = setup.problem.build()
    state = first_state(model, stats, config, setup.optimizer, setup.mesh)
    state = eqx.tree_at(lambda s: s.step, state, state.step + number - 1)
    stream = setup.problem.stream(number - 1)
    batch = jax.device_put(next(stream), NamedSharding(setup.mesh, BATCH))
    stream.close()
    make_step(setup.problem, setup.optimizer, setup.mesh, config)(batch, state)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_mixed_images_are_those_that_the_step_trains_on(config, monkeypatch, accumulate):
    """Two devices: their keys, the parts of each batch, the soft labels."""
    monkeypatch.setattr(train_module, "make_mesh", lambda config=None: make_mesh(num_devices=2))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, name="mlp"))  # quick to compile
    config = with_loop(with_augment(config, MIXED), accumulate=accumulate, batch_size=48)
    spy = Spy()
    monkeypatch.setattr(problem_module, "augment_batch", spy)
    monkeypatch.setattr(viz_module, "augment_batch", marked)
    train_one(config, 3)
    seen = spy.rows(config)
    batch = training_batch(config, step=3, count=48)
    drawn = np.concatenate([batch.images.reshape(48, -1), batch.labels], axis=1)
    assert seen.shape == drawn.shape == (48, 8 * 8 + 3)
    difference = np.abs(seen[:, None] - drawn[None])
    equal = (difference[..., :64].max(axis=-1) <= 0.51) & (difference[..., 64:].max(axis=-1) < 1e-5)
    np.testing.assert_array_equal(equal.sum(axis=0), 1)
    np.testing.assert_array_equal(equal.sum(axis=1), 1)
    assert len(np.unique(batch.labels[:, 0])) == 2 * 2 * accumulate  # a number for each key, plus 1 or 0


def test_steps_are_counted_from_one(config):
    for step, count in ((0, 4), (1, 0)):
        with pytest.raises(ValueError, match="steps are counted from 1") as error:
            training_batch(config, step, count)
        assert f"step={step}, count={count}" in str(error.value)


def test_labels_in_words():
    def words(label):
        return label_text(np.asarray(label), NAMES)

    assert words(1) == "bee"
    assert words([0.0, 1.0, 0.0]) == "bee"
    assert words([0.25, 0.0, 0.75]) == "cat 0.75\nant 0.25"
    assert words([1.0, 0.0, 1.0]) == "ant\ncat"
    assert words([0.0, 0.0, 0.0]) == "no class"
    assert words([0.3, -1.5]) == "0.3\n-1.5"  # regression: values, no classes
    assert words(2.5) == "2.5"
    many = tuple(f"class {i}" for i in range(5))
    assert label_text(np.full(5, 0.2), many) == "class 0 0.20\nclass 1 0.20\nclass 2 0.20\n+ 2 more"
    assert label_text(np.asarray(0), ("a very long name of a class",)) == "a very long name …"
    assert [weight_text(w) for w in (1.0, 0.0, 0.5)] == ["", "\nweight 0", "\nweight 0.5"]


def some_batch(count, size=8, channels=3):
    images = np.random.default_rng(0).integers(0, 255, (count, size, size, channels), dtype=np.uint8)
    weights = np.ones(count, np.float32)
    weights[0] = 0
    return TrainingBatch(images, np.arange(count) % 3, weights, np.arange(count), NAMES, count)


@pytest.mark.parametrize(("count", "channels"), [(1, 1), (3, 3), (8, 3), (11, 4)])
def test_any_number_of_images_and_channels_is_drawn(tmp_path, count, channels):
    path = draw_batch(some_batch(count, channels=channels), tmp_path / "new" / "batch.png", "title")
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        columns, lines = min(count, 8), -(-count // 8)
        assert picture.width == pytest.approx(176 * columns, abs=2)
        assert picture.height > 150 * lines
        assert np.asarray(picture.convert("L")).std() > 10


# Attention


def tiny_vit(key, **options):
    size = ViTSize(width=16, depth=3, num_heads=2, mlp_dim=32)
    return VisionTransformer(size, 4, image_size=(8, 12), in_channels=3, key=key, **options)


def classifier(backbone, key):
    return Classifier(backbone, None, TokenHead(16, 3, pool="mean", key=key))


def sharp(model, scale=8.0):
    """Weights of attention that differ, as a trained model's do."""

    def where(m):
        return m.backbone.encoder.blocks.attention.query.weight

    return eqx.tree_at(where, model, replace_fn=lambda weight: weight * scale)


@pytest.fixture
def images(key):
    return jax.random.normal(key, (1, 8, 12, 3))


def test_weights_are_those_that_the_attention_layer_uses(key, images, assert_close):
    """Each layer's output, recomputed from the weights, is the layer's."""
    model = sharp(classifier(tiny_vit(key), key))
    weights = attention_weights(model, images)
    assert weights.shape == (3, 1, 2, 7, 7)
    tokens, _ = model.backbone._embed(images)
    for layer in range(3):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], model.backbone.encoder.blocks)
        normed = block.norm1(tokens)
        values = block.attention.value(normed).reshape(1, 7, 2, 8)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights[layer], values).reshape(1, 7, 16)
        assert_close(block.attention.out(mixed), block.attention(normed), 1e-5)
        tokens = block(tokens)


def test_maps_of_the_class_token(key, images, assert_close):
    model = sharp(classifier(tiny_vit(key, num_registers=2), key))
    weights, maps = np.asarray(attention_weights(model, images)[:, 0]), attention_maps(model, images)
    assert maps.query == "class token"
    assert maps.heads.shape == (3, 2, 2, 3)
    assert_close(maps.heads.reshape(3, 2, 6), weights[:, :, 0, 3:], 1e-6)  # class token, two registers, then patches
    assert_close(maps.rollout.reshape(6), np.asarray(rollout(jnp.asarray(weights)))[0, 3:], 1e-5)


def test_maps_without_a_class_token_are_means_over_the_patches(key, images, assert_close):
    model = sharp(classifier(tiny_vit(key, class_token=False, num_registers=1), key))
    weights, maps = np.asarray(attention_weights(model, images)[:, 0]), attention_maps(model, images)
    assert maps.query == "patches (mean)"
    assert_close(maps.heads.reshape(3, 2, 6), weights[:, :, 1:, 1:].mean(axis=2), 1e-6)
    assert_close(maps.rollout.reshape(6), np.asarray(rollout(jnp.asarray(weights)))[1:, 1:].mean(axis=0), 1e-5)


def test_rollout_by_hand(rng, assert_close):
    weights = rng.uniform(size=(4, 2, 5, 5)).astype(np.float32)
    weights /= weights.sum(axis=-1, keepdims=True)
    expected = np.eye(5)
    for layer in weights:
        mixed = (layer.mean(axis=0) + np.eye(5)) / 2
        expected = mixed @ expected
    assert_close(rollout(jnp.asarray(weights)), expected, 1e-6)
    assert_close(rollout(jnp.asarray(weights)).sum(axis=-1), np.ones(5), 1e-6)


def test_a_hybrid_shows_the_grid_of_its_transformer(key):
    stem = HybridStem((1,), 8, in_channels=3, num_groups=4, key=key)
    size = ViTSize(width=16, depth=2, num_heads=2, mlp_dim=32)
    vit = VisionTransformer(size, 1, image_size=4, in_channels=stem.channels, key=key)
    maps = attention_maps(classifier(HybridViT(stem, vit), key), jnp.ones((1, 16, 16, 3)))
    assert maps.heads.shape == (2, 2, 4, 4)
    assert maps.query == "class token"


def test_models_without_attention_are_refused(key):
    model, _ = create("resnet20_cifar", num_classes=3, image_size=32, key=key)
    with pytest.raises(ValueError, match="attention maps need a vision transformer") as error:
        attention_maps(model, jnp.ones((1, 32, 32, 3)))
    assert "this model's backbone is ResNet" in str(error.value)


@pytest.mark.parametrize(("layers", "heads", "shape"), [(3, 2, (3, 2)), (2, 5, (5, 2)), (13, 1, (12, 1))])
def test_the_longer_of_layers_and_heads_goes_across(tmp_path, rng, layers, heads, shape):
    """No more than twelve layers, or none could be seen."""
    from eqvision.attention_maps import AttentionMaps

    maps = AttentionMaps(rng.uniform(size=(layers, heads, 2, 3)), rng.uniform(size=(2, 3)), "class token")
    image = rng.integers(0, 255, (8, 12, 3), dtype=np.uint8)
    with Image.open(draw_heads(image, maps, tmp_path / "heads.png", "title")) as picture:
        across, down = shape
        assert picture.width == pytest.approx(110 * (1.15 * across + 0.5), abs=2)
        assert picture.height == pytest.approx(110 * (1.1 * 8 / 12 * down + 0.8), abs=2)
    with Image.open(draw_layers(image, maps, tmp_path / "layers.png", "title")) as picture:
        assert np.asarray(picture.convert("L")).std() > 10


def run_of(model_name, key, size=32):
    from eqvision.recipes import DataConfig, TrainConfig

    model, state = create(model_name, num_classes=3, image_size=size, key=key)
    config = TrainConfig(model=ModelConfig(name=model_name, image_size=size), data=DataConfig(transform="cifar"))
    return Run(config, NAMES, model, state, 120)


@pytest.mark.slow
def test_pictures_of_attention(tmp_path, key):
    image = tmp_path / "photo.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(image)
    run = run_of("vit_ti16", key)
    layers, heads = draw_attention(run, image, tmp_path / "out")
    assert {layers.name, heads.name} == {"photo_layers.png", "photo_heads.png"}
    again = draw_attention(run, image, tmp_path / "out")
    assert [path.name for path in again] == ["photo_2_layers.png", "photo_2_heads.png"]
    assert free_names(tmp_path / "out", "photo")[0].name == "photo_3_layers.png"


# The command


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(["viz", *arguments])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_viz_data_from_the_command_line(tmp_path, capsys):
    data = write_npz(tmp_path / "toy.npz")
    out = tmp_path / "batch.png"
    options = ["--data.path", str(data), "--model.image-size", "8", "--model.in-channels", "1"]
    options += ["--loop.batch-size", "16", "--loop.eval-batch-size", "16", "--augment.mixup", "0.8"]
    options += ["--schedule.warmup-steps", "2"]
    main(["viz", "data", "arrays", *options, "--step", "2", "--count", "9", "--out", str(out)])
    assert capsys.readouterr().out.strip().endswith("batch.png")
    with Image.open(out) as picture:
        assert picture.width == pytest.approx(176 * 8, abs=2)


def test_viz_explains_itself(capsys):
    for arguments in (["viz"], ["viz", "--help"]):
        main(arguments)
        shown = capsys.readouterr().out
        assert "viz data RECIPE" in shown
        assert "viz attention RUN_FOLDER IMAGE..." in shown
    main(["viz", "data"])
    assert "digits" in capsys.readouterr().out


def test_mistakes_on_the_command_line(tmp_path, capsys, monkeypatch):
    assert "attention" in fails(capsys, "atention", "runs/x")
    assert "digits" in fails(capsys, "data", "digit")
    message = fails(capsys, "data", "digits", "--out", "runs/digits")
    assert "--out runs/digits is the picture here and not a run folder" in message
    assert "ends in .png" in message
    assert "image" in fails(capsys, "attention", str(tmp_path)).lower()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert "pip install 'eqvision[plots]'" in fails(capsys, "data", "digits")


@pytest.mark.slow
def test_attention_of_a_run(tmp_path, capsys, config):
    model = ModelConfig(name="vit_ti4", image_size=8, in_channels=1)
    config = with_loop(dataclasses.replace(config, model=model), epochs=1.0)
    train(config)
    image = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (10, 10), dtype=np.uint8)).save(image)
    main(["viz", "attention", config.out, str(image)])
    assert (tmp_path / "run" / "attention" / "photo_layers.png").is_file()
    assert (tmp_path / "run" / "attention" / "photo_heads.png").is_file()
    assert "photo_heads.png" in capsys.readouterr().out
