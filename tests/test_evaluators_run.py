"""Features of frozen models: what they are, each example once; the evaluators by name and by command."""

import dataclasses
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from toy import NAMES, toy_config, toy_images, toy_labels, with_loop, write_folder, write_npz

import eqvision.predict as predict_module
from eqvision import UnknownNameError, cli, create
from eqvision.classifiers import vit_classifier
from eqvision.data import Arrays, ImageFolder, load_arrays, normalize
from eqvision.evaluators import (
    check_evaluators,
    extract_features,
    few_shot,
    knn,
    linear_probe,
    run_evaluators,
)
from eqvision.heads import TokenHead
from eqvision.predict import Run, evaluate_run
from eqvision.recipes import EvalConfig
from eqvision.run_folder import RunFolder
from eqvision.types import TokenFeatures


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


# What features are


def test_the_head_is_linear_in_the_pooled_features(assert_close):
    for name in ("small_cnn", "mlp"):
        model, stats = create(name, num_classes=5, image_size=8, in_channels=1, key=jax.random.key(1))
        images = jax.random.normal(jax.random.key(2), (3, 8, 8, 1))
        pooled = model.pooled(images, stats)
        assert pooled.shape == (3, model.head.linear.weight.shape[0])
        assert_close(model.head.linear(pooled), model(images, stats)[0], 1e-6)


@pytest.mark.parametrize(("pool", "pre_logits"), [("token", None), ("mean", None), ("token", 6)])
def test_features_of_tokens_end_behind_the_pre_logits(pool, pre_logits, key, assert_close):
    head = TokenHead(4, 5, pool=pool, pre_logits=pre_logits, key=key)
    features = TokenFeatures(*(jax.random.normal(key, shape, jnp.bfloat16) for shape in ((2, 1, 4), (2, 3, 3, 4))))
    pooled = head.pooled(features)
    assert (pooled.shape, pooled.dtype) == ((2, pre_logits or 4), jnp.float32)
    assert_close(head.linear(pooled), head(features, eqx.nn.State(head))[0], 1e-6)


# Extraction


def test_each_example_comes_once_and_padding_never(config, one_device, mesh, assert_close):
    model, stats = model_of(config)
    data = source(21)
    expected = model.pooled(normalize(jnp.asarray(data.images), config.data.mean, config.data.std), stats)
    for devices, batch in ((one_device, 5), (one_device, 64), (mesh, 16)):
        found = extract_features(model, stats, data, with_loop(config, eval_batch_size=batch), devices)
        assert found.values.dtype == np.float32
        assert np.array_equal(found.labels, data.labels)
        assert_close(found.values, expected, 1e-6)


def test_extraction_is_deterministic(config, one_device):
    model, stats = model_of(config)
    first, second = (extract_features(model, stats, source(), config, one_device) for _ in range(2))
    assert first.values.tobytes() == second.values.tobytes()


def test_parameters_may_be_split_over_devices(config, one_device, assert_close):
    devices = Mesh(np.array(jax.devices()).reshape(2, 4, 1), ("data", "fsdp", "model"))
    model, stats = model_of(config)
    expected = extract_features(model, stats, source(), config, one_device).values

    def place(leaf):
        axes = P("fsdp") if leaf.ndim and leaf.shape[0] % 4 == 0 else P()
        return jax.device_put(leaf, NamedSharding(devices, axes))

    split = jax.tree.map(place, model)
    assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(split))
    found = extract_features(split, jax.device_put(stats, NamedSharding(devices, P())), source(), config, devices)
    assert_close(found.values, expected, 1e-6)


def test_images_that_cannot_be_decoded_are_left_out(config, tmp_path, one_device):
    images = write_folder(tmp_path / "images")
    (images / "train" / "bee" / "1.jpg").write_bytes(b"no picture")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, in_channels=3),
        data=dataclasses.replace(config.data, transform="none"),
    )
    model, stats = create("small_cnn", num_classes=3, image_size=8, in_channels=3, key=jax.random.key(0))
    data = ImageFolder(images, "train", on_corrupt="skip")
    found = extract_features(model, stats, data, config, one_device)
    assert np.bincount(found.labels).tolist() == [6, 5, 6]


def test_activations_have_the_type_of_the_run(config, one_device):
    model, stats = model_of(config)
    full = extract_features(model, stats, source(), config, one_device).values
    half = extract_features(model, stats, source(), with_loop(config, compute_dtype="bfloat16"), one_device).values
    assert half.dtype == np.float32
    assert 0 < np.abs(full - half).max() < 0.1 * np.abs(full).max()


@pytest.mark.usefixtures("unchecked")
def test_a_head_without_pooling_is_refused(config, one_device):
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, name="tokens"))
    model, stats = _token_model()
    with pytest.raises(ValueError, match=r"model 'tokens' gives features of shape \(16, \d+, \d+\).*a head that pools"):
        extract_features(model, stats, source(), config, one_device)


def _token_model():
    build = partial(vit_classifier, "ti", 4, image_size=8, in_channels=1, num_classes=3, pool="none")
    return eqx.nn.make_with_state(build)(key=jax.random.key(0))


# The evaluators by name


@pytest.fixture
def run_of(config, one_device):
    def run(names, config=config, **changes):
        config = with_data(config, **changes) if changes else config
        return run_evaluators(names, *model_of(config), config, RunFolder(config.out), 4, one_device)

    return run


def test_metrics_of_all_evaluators(config, run_of, one_device, capsys):
    metrics = run_of(("linear_probe", "few_shot", "knn"))
    assert list(metrics) == [
        "test/linear_probe/accuracy",
        "test/linear_probe/logistic_accuracy",
        "test/few_shot_1/accuracy",
        "test/few_shot_5/accuracy",
        "test/few_shot_10/accuracy",
        "test/knn/accuracy",
    ]
    said = capsys.readouterr().err
    assert "few_shot: left out 25 shots; class '0' has 13 training examples beside those held out" in said
    splits = [load_arrays(config.data.path, split) for split in ("train", "test")]
    given = [x for split in splits for x in extract_features(*model_of(config), split, config, one_device)]
    assert metrics["test/linear_probe/accuracy"] == linear_probe(*given, num_classes=3).accuracy > 0.8
    assert metrics["test/few_shot_5/accuracy"] == few_shot(*given, num_classes=3, shots=5).accuracy
    assert metrics["test/knn/accuracy"] == knn(*given, num_classes=3)
    assert run_of(("linear_probe", "few_shot", "knn")) == metrics
    assert capsys.readouterr().err.count("reused") == 2


def test_no_evaluators_do_nothing(run_of, config, tmp_path):
    assert run_of(()) == {}
    assert not (tmp_path / "run").exists()


def test_few_training_examples(config, run_of, tmp_path, capsys):
    file = write_npz(tmp_path / "small.npz", train=12, test=6)
    metrics = run_of(("knn", "few_shot"), path=str(file))
    assert list(metrics) == ["test/knn/accuracy", "test/few_shot_1/accuracy"]
    assert "knn: k is 12 and not 20" in capsys.readouterr().err


def test_too_few_for_one_shot_names_the_class(tmp_path, run_of, monkeypatch):
    file = write_npz(tmp_path / "one.npz", train=6)
    monkeypatch.setattr("eqvision.evaluators.run.SHOTS", (5, 10))
    with pytest.raises(ValueError, match=r"class '0' has 1 training examples .* few-shot with 5 shots needs 5"):
        run_of(("few_shot",), path=str(file))


def test_an_unknown_evaluator_names_the_nearest(run_of):
    with pytest.raises(UnknownNameError, match="evaluator 'kmn' does not exist; nearest: knn"):
        run_of(("kmn",))


@pytest.mark.parametrize("kind", ["multi_label", "regression"])
def test_tasks_without_one_class_per_image_are_refused(kind, tmp_path):
    config = toy_config(tmp_path, write_npz(tmp_path / "toy.npz", kind=kind), kind=kind)
    with pytest.raises(ValueError, match=rf"task.kind is '{kind}', and knn need one class per image"):
        check_evaluators(("knn",), config)


def test_data_without_one_class_per_image_are_refused(tmp_path, run_of):
    file = write_npz(tmp_path / "multi.npz", kind="multi_label")
    with pytest.raises(ValueError, match=r"row 0 of .* has 3 values as its label"):
        run_of(("knn",), path=str(file))


def test_a_split_is_not_measured_on_itself(run_of):
    with pytest.raises(ValueError, match="knn would be fitted and measured on the same split 'train'"):
        run_of(("knn",), test_split="train")


def test_the_configuration_names_every_evaluator(config):
    check_evaluators(EvalConfig(evaluators=("linear_probe", "few_shot", "knn")).evaluators, config)


# eqvision eval


@pytest.fixture
def saved(config, monkeypatch):
    """A run folder whose newest checkpoint is a fresh model."""
    RunFolder(config.out).open_for_training(config, NAMES, 3)
    monkeypatch.setattr(predict_module, "load_run", lambda path: Run(config, NAMES, *model_of(config), 4))
    return config


def printed(capsys):
    return dict(line.split() for line in capsys.readouterr().out.splitlines())


def test_eval_measures_classification_by_default(saved, capsys):
    cli.main(["eval", saved.out])
    assert {"test/accuracy", "test/loss"} <= printed(capsys).keys()


def test_eval_measures_any_number_of_evaluators(saved, capsys):
    cli.main(["eval", saved.out, "--evaluator", "knn", "classification"])
    both = printed(capsys)
    assert {"test/accuracy", "test/knn/accuracy"} <= both.keys()
    cli.main(["eval", saved.out, "--evaluator", "knn"])
    assert printed(capsys) == {"test/knn/accuracy": both["test/knn/accuracy"]}


def test_eval_on_data_of_other_classes(saved, tmp_path):
    labels = toy_labels(60, classes=5) // 2 + 4  # classes 4, 5, 6 of seven
    arrays = {f"images_{split}": toy_images(labels - 4, seed=n) for n, split in enumerate(("train", "test"))}
    np.savez(tmp_path / "other.npz", **arrays, labels_train=labels, labels_test=labels)
    metrics = evaluate_run(saved.out, data_path=str(tmp_path / "other.npz"), evaluators=("few_shot",))
    assert metrics["test/few_shot_5/accuracy"] > 0.8


def test_eval_refuses_an_unknown_evaluator(saved, capsys):
    with pytest.raises(SystemExit):
        cli.main(["eval", saved.out, "--evaluator", "svm"])
    assert "linear_probe" in capsys.readouterr().err
