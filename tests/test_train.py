"""The loop: what a run leaves behind, resuming bit for bit, one device against eight, divergence, bad input."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from sklearn.metrics import average_precision_score
from toy import (
    NAMES,
    bytes_of,
    fresh_state,
    saved_state,
    saved_steps,
    toy_config,
    toy_images,
    toy_labels,
    toy_problem,
    with_checkpoint,
    with_loop,
    with_optimizer,
    write_folder,
    write_npz,
)

import eqvision.problems.classification as problem_module
import eqvision.train as train_module
from eqvision import UnknownNameError, create
from eqvision.checkpoint import Checkpoints
from eqvision.data import Arrays, CorruptImageError, eval_transform, load_arrays, normalize, train_stream
from eqvision.evaluate import Evaluator
from eqvision.layers import MissingKeyError
from eqvision.losses import weighted_mean
from eqvision.mesh import BATCH, make_mesh
from eqvision.optim import make_optimizer, make_schedule
from eqvision.recipes import ScheduleConfig
from eqvision.setup import load_source
from eqvision.step import make_step
from eqvision.tasks import MultiLabel, SingleLabel
from eqvision.train import train
from eqvision.types import ClassificationBatch, WeightedValues
from eqvision.window import DivergedError


@pytest.fixture
def two_devices(monkeypatch):
    """Compiling and running for eight takes longer, and says nothing more where devices do not matter."""
    monkeypatch.setattr(train_module, "make_mesh", lambda config=None: make_mesh(num_devices=2))


@pytest.fixture
def npz(tmp_path):
    return write_npz(tmp_path / "toy.npz")


class Interrupted(BaseException):
    """Stands for a killed process."""


def interrupt_in_step(monkeypatch, number: int) -> None:
    """The next run dies when it is about to make its ``number``-th step."""
    step, calls = train_module._Loop._step, iter(range(1, 10_000))

    def dying(self, *arguments):
        if next(calls) == number:
            raise Interrupted
        step(self, *arguments)

    monkeypatch.setattr(train_module._Loop, "_step", dying)


def read_csv(config):
    lines = (Path(config.out) / "metrics.csv").read_text().splitlines()
    header, *rows = (line.split(",") for line in lines)
    return [{name: float(value) for name, value in zip(header, row, strict=True) if value} for row in rows]


# What a run leaves behind


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of twelve steps on eight devices, to look at."""
    folder = tmp_path_factory.mktemp("finished")
    config = with_loop(toy_config(folder / "run", write_npz(folder / "toy.npz")), epochs=8.0)
    return config, train(config)


def test_the_run_folder_holds_what_the_documentation_says(finished):
    config, result = finished
    assert result.folder == Path(config.out)
    assert {path.name for path in result.folder.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "confusion.png",
        "learning_curve.png",
        "metrics.csv",
        "metrics.jsonl",
        "parameters.txt",
        "predictions.png",
        "result.json",
        "tensorboard",
    }
    assert saved_steps(config) == [4, 8, 12, 16, 20, 24]  # keep_last=5, and the first of the best


def test_one_row_per_logged_step(finished):
    config, _ = finished
    rows = read_csv(config)
    assert [row["step"] for row in rows] == [3, 4, 6, 8, 9, 12, 15, 16, 18, 20, 21, 24]
    assert all({"train/loss", "train/grad_norm", "train/learning_rate"} <= row.keys() for row in rows)
    evaluated = [row["step"] for row in rows if "test/accuracy" in row]
    assert evaluated == [4, 8, 12, 16, 20, 24]
    assert (Path(config.out) / "metrics.csv").read_text().startswith("step,train/loss,")


def test_csv_and_jsonl_say_the_same(finished):
    config, _ = finished
    lines = (Path(config.out) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == read_csv(config)


def test_the_network_learns(finished):
    config, result = finished
    rows = read_csv(config)
    assert rows[-1]["train/loss"] < 0.5 * rows[0]["train/loss"]
    assert result.metrics["accuracy"] > 0.9


def test_the_result_is_the_last_evaluation(finished):
    config, result = finished
    last = read_csv(config)[-1]
    stored = json.loads((result.folder / "result.json").read_text())
    assert stored == {f"test/{name}": value for name, value in result.metrics.items()}
    assert stored == {name: value for name, value in last.items() if name.startswith("test/")}
    assert result.step == 24


def test_logged_learning_rates_are_those_of_the_schedule(finished):
    config, _ = finished
    schedule = make_schedule(config.schedule, config.optimizer.learning_rate, 24)
    for row in read_csv(config):
        assert row["train/learning_rate"] == pytest.approx(float(schedule(row["step"] - 1)), rel=1e-6)


@pytest.mark.parametrize("kind", ["multi_label", "regression"])
def test_other_tasks_train_end_to_end(kind, tmp_path, two_devices):
    npz = write_npz(tmp_path / "toy.npz", kind=kind)
    config = with_loop(toy_config(tmp_path / "run", npz, kind=kind), epochs=8.0)
    result = train(config)
    rows = read_csv(config)
    assert rows[-1]["train/loss"] < 0.7 * rows[0]["train/loss"]
    headline = {"multi_label": "mean_average_precision", "regression": "mean_squared_error"}[kind]
    assert f"test/{headline}" in rows[-1]
    if kind == "multi_label":
        assert result.metrics[headline] > 0.9
    assert not (result.folder / "confusion.png").exists()
    assert (result.folder / "learning_curve.png").exists()


# Resuming


def resumed_and_not(config, monkeypatch, tmp_path):
    """The same run in one go, and killed six steps after its start (two after a checkpoint) and started again."""
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"))
    broken = dataclasses.replace(config, out=str(tmp_path / "broken"))
    train(whole)
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 7)
        with pytest.raises(Interrupted):
            train(broken)
    assert saved_steps(broken) == [4]
    train(broken)
    return whole, broken


def assert_same_run(whole, broken):
    for name in ("metrics.csv", "metrics.jsonl", "result.json"):
        one, other = (Path(config.out, name).read_bytes() for config in (whole, broken))
        assert one == other, name
    assert saved_steps(whole) == saved_steps(broken)
    assert bytes_of(saved_state(whole)) == bytes_of(saved_state(broken))


def test_resumed_equals_uninterrupted_with_batch_norm_and_augmentation(npz, tmp_path, monkeypatch, two_devices):
    config = toy_config(tmp_path, npz)
    whole, broken = resumed_and_not(config, monkeypatch, tmp_path)
    assert_same_run(whole, broken)
    assert int(saved_state(whole).step) == 12


@pytest.mark.slow
def test_resumed_equals_uninterrupted_with_dropout_and_drop_path(npz, tmp_path, monkeypatch, two_devices):
    config = with_loop(toy_config(tmp_path, npz, model="vit_ti4"), epochs=3.0)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.2, drop_path=0.3))
    assert_same_run(*resumed_and_not(config, monkeypatch, tmp_path))


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_starts_over(npz, tmp_path, monkeypatch, two_devices):
    whole, broken = (with_loop(toy_config(tmp_path / name, npz), epochs=2.0) for name in ("whole", "broken"))
    train(whole)
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 4)
        with pytest.raises(Interrupted):
            train(broken)
    assert [row["step"] for row in read_csv(broken)] == [3]
    train(broken)
    assert_same_run(whole, broken)


@pytest.mark.slow
def test_a_checkpoint_is_the_state_of_its_step_though_training_goes_on(npz, tmp_path, monkeypatch, two_devices):
    """Checkpoints are written in the background while the next steps reuse the memory of the state."""
    config = with_checkpoint(toy_config(tmp_path / "run", npz), every=1, keep_last=12)
    copies, save = {}, Checkpoints.save

    def copying(self, step, state, record):
        copies[step] = bytes_of(jax.tree.map(jnp.copy, state))
        save(self, step, state, record)

    monkeypatch.setattr(Checkpoints, "save", copying)
    train(config)
    assert saved_steps(config) == list(range(1, 13))
    for step in (1, 2, 7, 12):
        assert bytes_of(saved_state(config, step)) == copies[step], step


def test_a_finished_run_is_not_trained_again(npz, tmp_path, monkeypatch, two_devices):
    config = with_loop(toy_config(tmp_path / "run", npz), epochs=1.0)
    first = train(config)
    before = {name: (first.folder / name).read_bytes() for name in ("metrics.csv", "metrics.jsonl", "result.json")}
    interrupt_in_step(monkeypatch, 1)  # any step would raise
    again = train(config)
    assert again == first
    assert {name: (first.folder / name).read_bytes() for name in before} == before


def test_another_seed_gives_another_run(npz, tmp_path, two_devices):
    one = with_loop(toy_config(tmp_path / "one", npz), epochs=1.0)
    other = dataclasses.replace(one, seed=1, out=str(tmp_path / "other"))
    train(one), train(other)
    assert read_csv(one)[0]["train/loss"] != read_csv(other)[0]["train/loss"]


# One device and eight


def toy_batch(mesh, weights, size: int = 16):
    labels = toy_labels(size).astype(np.int32)
    batch = ClassificationBatch(toy_images(labels), labels, np.asarray(weights, np.float32), np.arange(size))
    batch = batch._replace(indices=batch.indices.astype(np.int32))
    return jax.device_put(batch, NamedSharding(mesh, BATCH))


def five_steps(config, num_devices, weights):
    mesh = make_mesh(num_devices=num_devices)
    optimizer = make_optimizer(config.optimizer, constant_rate(config))
    step, state = make_step(toy_problem(config), optimizer, mesh, config), fresh_state(config, mesh=mesh)
    for _ in range(5):
        state, log = step(toy_batch(mesh, weights), state)
    return state, log


def constant_rate(config):
    return make_schedule(ScheduleConfig(kind="constant"), config.optimizer.learning_rate, 1)


# Zero weights in a row leave some devices with nothing but padding, which must not count in the global mean.
@pytest.mark.parametrize("weights", [[1.0] * 16, [1.0] * 9 + [0.0] * 7], ids=["full", "padded"])
def test_one_device_equals_eight(weights, tmp_path, assert_close):
    config = with_optimizer(toy_config(tmp_path, tmp_path), name="sgd", learning_rate=0.05)
    one, eight = (five_steps(config, count, weights) for count in (1, 8))
    assert_close(eight[0].model, one[0].model, 1e-6)
    assert_close(eight[0].stats, one[0].stats, 1e-6)
    assert_close(eight[1], one[1], 1e-6)


def test_a_step_is_the_gradient_step_of_the_weighted_mean(tmp_path, assert_close):
    """Against ``jax.grad`` of the whole batch on one device, without any mesh."""
    config = with_optimizer(
        toy_config(tmp_path, tmp_path), name="sgd", learning_rate=0.1, momentum=0.0, weight_decay=0.0, clip_norm=None
    )
    weights = [1.0] * 9 + [0.0] * 7
    mesh = make_mesh(num_devices=8)
    optimizer = make_optimizer(config.optimizer, constant_rate(config))
    state, log = make_step(toy_problem(config), optimizer, mesh, config)(
        toy_batch(mesh, weights), fresh_state(config, mesh=mesh)
    )
    start, batch = fresh_state(config), toy_batch(make_mesh(num_devices=1), weights)
    images = normalize(batch.images, config.data.mean, config.data.std)

    def loss_of(model):
        outputs, stats = model(images, start.stats, train=True)
        return weighted_mean(*SingleLabel().loss(outputs, batch)), stats

    (loss, stats), grads = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(start.model)
    # 1e-5: a bias that begins at zero is the sum of 1,024 signed terms, here in another order than on one device
    assert_close(state.model, jax.tree.map(lambda p, g: p - 0.1 * g, start.model, grads), 1e-5)
    assert_close(state.stats, stats, 1e-6)
    assert_close(log.loss, loss, 1e-6)
    norm = np.sqrt(sum(np.square(np.asarray(g, np.float64)).sum() for g in jax.tree.leaves(grads)))
    assert float(log.grad_norm) == pytest.approx(norm, rel=1e-5)


# Evaluation


def logits_of(state, config, source):
    images = np.stack([eval_transform("digits", 8)(source[i].image) for i in range(len(source))])
    return np.asarray(state.model(normalize(jnp.asarray(images), config.data.mean, config.data.std), state.stats)[0])


@pytest.mark.parametrize(("batch_size", "num_devices"), [(8, 1), (8, 8), (24, 8), (16, 2), (40, 8), (21, 1)])
def test_each_example_counts_once(batch_size, num_devices, npz, tmp_path):
    config = with_loop(toy_config(tmp_path, npz), eval_batch_size=batch_size)
    mesh, source = make_mesh(num_devices=num_devices), load_arrays(npz, "test")
    state = fresh_state(config, mesh=mesh)
    evaluation = Evaluator(config, SingleLabel(), source, mesh)(state.model, state.stats)

    logits = logits_of(fresh_state(config), config, source)
    right = logits.argmax(axis=1) == source.labels
    assert evaluation.metrics["accuracy"] == pytest.approx(right.mean(), abs=1e-7)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert evaluation.metrics["loss"] == pytest.approx(-log_p[np.arange(20), source.labels].mean(), rel=1e-5)
    expected = np.zeros((3, 3))
    np.add.at(expected, (source.labels, logits.argmax(axis=1)), 1)
    np.testing.assert_array_equal(evaluation.confusion, expected)


def test_samples_are_spread_over_the_split_and_belong_together(npz, tmp_path, assert_close):
    config, source = toy_config(tmp_path, npz), load_arrays(npz, "test")
    state = fresh_state(config)
    samples = Evaluator(config, SingleLabel(), source, make_mesh(num_devices=1))(state.model, state.stats).samples
    assert len(samples.images) == 16
    places = [next(i for i in range(20) if np.array_equal(source.images[i], image)) for image in samples.images]
    assert places == sorted(set(places))
    assert (places[0], places[-1]) == (0, 19)
    np.testing.assert_array_equal(samples.labels, source.labels[places])
    assert_close(samples.outputs, logits_of(state, config, source)[places], 1e-5)


@pytest.mark.parametrize(("batch_size", "num_devices"), [(8, 8), (24, 8), (7, 1)])
def test_mean_average_precision_is_that_of_the_whole_split(batch_size, num_devices, tmp_path):
    npz = write_npz(tmp_path / "toy.npz", kind="multi_label")
    config = with_loop(toy_config(tmp_path, npz, kind="multi_label"), eval_batch_size=batch_size)
    mesh, source = make_mesh(num_devices=num_devices), load_arrays(npz, "test")
    state = fresh_state(config, mesh=mesh)
    metrics = Evaluator(config, MultiLabel(), source, mesh)(state.model, state.stats).metrics
    expected = average_precision_score(source.labels, logits_of(fresh_state(config), config, source), average="macro")
    assert metrics["mean_average_precision"] == pytest.approx(expected, abs=1e-6)


# Divergence


def test_an_absurd_learning_rate_stops_the_run_within_the_log_window(npz, tmp_path, two_devices):
    config = with_optimizer(toy_config(tmp_path / "run", npz), name="sgd", learning_rate=1e30, clip_norm=None)
    config = dataclasses.replace(config, schedule=ScheduleConfig(kind="constant"))
    with pytest.raises(DivergedError) as caught:
        train(config)
    message = str(caught.value)
    found = re.match(r"the (loss|norm of the gradient) is (nan|inf) at step (\d+) \(learning rate 1e\+30\)", message)
    assert found, message
    step = int(found[3])
    assert step <= 3  # log_every
    assert "optimizer.learning-rate" in message
    stream = train_stream(load_arrays(npz, "train"), batch_size=16, seed=0, start_step=step - 1)
    rows = next(stream).indices.tolist()
    stream.close()
    assert str(rows) in message
    assert f"row {rows[0]} of {npz} (train)" in message
    assert saved_steps(config) == []


def test_no_checkpoint_follows_a_loss_that_is_not_finite(npz, tmp_path, monkeypatch, two_devices):
    config = with_checkpoint(toy_config(tmp_path / "run", npz), every=1)
    inject_nan(monkeypatch, at_step=3, into="loss")
    with pytest.raises(DivergedError, match="the loss is nan at step 3"):
        train(config)
    assert saved_steps(config) == [1, 2]
    assert [row["step"] for row in read_csv(config)] == [1, 2]


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_saved(npz, tmp_path, monkeypatch, two_devices):
    """The loss of that step is fine, its update is not: the parameters it leaves must not become a checkpoint."""
    config = with_checkpoint(toy_config(tmp_path / "run", npz), every=1)
    inject_nan(monkeypatch, at_step=3, into="gradient")
    with pytest.raises(DivergedError, match="the norm of the gradient is nan at step 3"):
        train(config)
    assert saved_steps(config) == [1, 2]


def inject_nan(monkeypatch, *, at_step: int, into: str) -> None:
    """Makes a NaN where the batch holds the first example of batch ``at_step``."""

    @dataclasses.dataclass(frozen=True)
    class NaNTask(SingleLabel):
        def loss(self, outputs, batch):
            values, weights = super().loss(outputs, batch)
            is_marked = batch.indices == marked
            # sqrt has the slope infinity at 0, and 0 times infinity is NaN; everywhere else this is the constant 1
            infinite_slope = jnp.sqrt(jnp.where(is_marked, 0.0 * outputs[:, 0], 1.0))
            poison = jnp.nan if into == "loss" else infinite_slope
            return WeightedValues(jnp.where(is_marked, values + poison, values), weights)

    marked = _first_seen_in(at_step)
    monkeypatch.setattr(problem_module, "make_task", lambda kind, loss, smoothing: NaNTask(loss, smoothing))


def _first_seen_in(step: int) -> int:
    """An example of the toy archive that no earlier batch of 16 of seed 0 holds."""
    source = Arrays(toy_images(toy_labels(48), seed=48), toy_labels(48))
    stream = train_stream(source, batch_size=16, seed=0)
    batches = [next(stream).indices for _ in range(step)]
    stream.close()
    return int(np.setdiff1d(batches[-1], np.concatenate(batches[:-1]))[0])


# Bad input is refused before step 0


def test_a_label_outside_the_heads_range_is_named_before_step_0(npz, tmp_path, two_devices):
    config = toy_config(tmp_path / "run", npz)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=2))
    with pytest.raises(ValueError, match=r"label 2 in row 2 of .*toy\.npz \(train\) but the head has 2 classes"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_an_unknown_model_names_the_nearest(npz, tmp_path, two_devices):
    with pytest.raises(UnknownNameError, match="model 'resnet20_cifr' does not exist; nearest: resnet20_cifar"):
        train(toy_config(tmp_path / "run", npz, model="resnet20_cifr"))
    assert not (tmp_path / "run").exists()


def test_an_option_that_the_model_lacks_is_refused(npz, tmp_path, two_devices):
    config = toy_config(tmp_path / "run", npz, model="resnet20_cifar")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, drop_path=0.1))
    with pytest.raises(ValueError, match="model 'resnet20_cifar' has no option 'drop_path'"):
        train(config)


@pytest.mark.parametrize("option", ["batch_size", "eval_batch_size"])
def test_a_batch_that_devices_cannot_share_is_refused(option, npz, tmp_path):
    config = with_loop(toy_config(tmp_path / "run", npz), **{option: 20})
    expected = f"--loop.{option.replace('_', '-')} 20 cannot be shared by 8 devices.*multiple of 8, such as 16"
    with pytest.raises(ValueError, match=expected):
        train(config)
    assert not (tmp_path / "run").exists()


def test_a_missing_path_is_explained(tmp_path, two_devices):
    config = toy_config(tmp_path / "run", "")
    with pytest.raises(ValueError, match=r"data\.kind 'arrays' needs a path for the split 'train': --data\.path"):
        train(config)


def test_a_missing_run_folder_is_explained(npz, tmp_path):
    with pytest.raises(ValueError, match=r"config\.out is empty"):
        train(dataclasses.replace(toy_config(tmp_path, npz), out=""))


def test_a_loss_that_does_not_fit_the_task_is_refused(npz, tmp_path, two_devices):
    config = toy_config(tmp_path / "run", npz)
    config = dataclasses.replace(config, task=dataclasses.replace(config.task, loss="squared_error"))
    with pytest.raises(ValueError, match=r"task\.loss 'squared_error' does not fit task\.kind 'single_label'"):
        train(config)


@pytest.mark.parametrize(("kind", "labels"), [("multi_label", "single_label"), ("regression", "multi_label")])
def test_labels_of_another_task(kind, labels, tmp_path, two_devices, unchecked):
    """Class indices under multi_label are refused; 0/1 columns are real values too, so regression takes them."""
    npz = write_npz(tmp_path / "toy.npz", kind=labels)
    config = with_loop(toy_config(tmp_path / "run", npz, kind=kind), epochs=1.0)
    if kind == "regression":
        assert "mean_squared_error" in train(config).metrics
        return
    with pytest.raises(ValueError, match=r"'multi_label' needs a row of 0/1.*row 0 of .*has the class index 0"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_a_head_that_does_not_fit_the_targets_of_a_regression(tmp_path, two_devices):
    npz = write_npz(tmp_path / "toy.npz", kind="regression")
    config = toy_config(tmp_path / "run", npz, kind="regression")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=1))
    with pytest.raises(ValueError, match=r"row 0 of .* has 2 values to predict but model\.num_classes is 1"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_a_random_layer_without_a_key_is_named(key):
    model, state = create("vit_ti4", num_classes=3, image_size=8, in_channels=1, dropout=0.5, key=key)
    with pytest.raises(MissingKeyError, match=r"dropout\(0\.5\) is random in training and got key=None"):
        model(jnp.zeros((1, 8, 8, 1)), state, train=True)


# Image folders


def folder_config(out, data):
    config = toy_config(out, data)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, kind="folder", transform="cifar"),
        model=dataclasses.replace(config.model, in_channels=3),
        loop=dataclasses.replace(config.loop, epochs=2.0, eval_batch_size=8, batch_size=6, eval_every=None),
    )


def test_a_corrupt_image_stops_the_run_with_its_path(tmp_path, two_devices):
    images = write_folder(tmp_path / "images")
    broken = images / "train" / "bee" / "3.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(CorruptImageError) as caught:
        train(folder_config(tmp_path / "run", images))
    assert str(broken.absolute()) in str(caught.value)
    assert "on_corrupt='skip'" in str(caught.value)


def test_corrupt_images_can_be_skipped_and_are_counted(tmp_path, two_devices, caplog):
    images = write_folder(tmp_path / "images")
    for split in ("train", "test"):
        (images / split / "bee" / "0.png").write_bytes(b"not an image")
    config = folder_config(tmp_path / "run", images)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, on_corrupt="skip"))
    result = train(config)
    assert str(images / "train" / "bee" / "0.png") in caplog.text
    assert str(images / "test" / "bee" / "0.png") in caplog.text
    state = saved_state(config)
    source = load_source(config, "test")
    evaluation = Evaluator(config, SingleLabel(), source, make_mesh(num_devices=1))(state.model, state.stats)
    assert source.num_skipped == 1
    np.testing.assert_array_equal(evaluation.confusion.sum(axis=1), [3, 2, 3])  # the skipped bee is missing
    assert evaluation.metrics["accuracy"] == pytest.approx(result.metrics["accuracy"])


def test_an_empty_folder_is_explained(tmp_path, two_devices):
    for name in ("train/ant", "train/bee", "test/ant", "test/bee"):
        (tmp_path / "images" / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no images found in .*images/train"):
        train(folder_config(tmp_path / "run", tmp_path / "images"))


def test_a_wrongly_nested_folder_is_explained(tmp_path, two_devices):
    write_folder(tmp_path / "outer" / "images")
    with pytest.raises(FileNotFoundError, match=r"has no folder 'train', but .*images has: pass path="):
        train(folder_config(tmp_path / "run", tmp_path / "outer"))


@pytest.mark.slow
def test_class_names_of_a_folder_reach_the_run(tmp_path, two_devices):
    config = folder_config(tmp_path / "run", write_folder(tmp_path / "images"))
    train(config)
    assert train_module.RunFolder(config.out).class_names() == NAMES
