"""Training segmenters: resuming bit for bit, one device against eight, void pixels, rows of weight 0, and messages."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from segmentation_files import write_folder
from test_train import Interrupted, interrupt_in_step, read_csv
from toy import bytes_of, saved_steps, with_checkpoint, with_loop
from toy_detection import first_batches
from toy_runs import Stepper, optimizer_of
from toy_segmentation import VoidScenes, emptied, install, logits_of, toy_config, toy_problem, weightless

from eqvision import UnknownNameError
from eqvision.checkpoint import Checkpoints
from eqvision.losses import SegmentationLossConfig
from eqvision.mesh import make_mesh
from eqvision.problems import segmentation_problem
from eqvision.recipes import SegmentationConfig, SegmentationDataConfig, SegmenterConfig
from eqvision.replay import replay
from eqvision.state import abstract_state
from eqvision.train import train


@pytest.fixture
def toys(monkeypatch):
    install(monkeypatch)


@pytest.fixture(scope="module")
def stepper():
    """On one device; the program that the runs of this file have, too."""
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        made = Stepper(toy_problem(toy_config("unused")))
    return made


@pytest.fixture(scope="module")
def batches(stepper):
    return first_batches(stepper.problem, 3)


def finite(tree):
    return all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(tree))


# Void pixels, rows that weigh nothing


@pytest.mark.slow
def test_the_loss_is_the_mean_over_all_labelled_pixels_of_the_batch(stepper, batches):
    """Rows of few labelled pixels weigh less; by hand in float64."""
    batch = weightless(emptied(batches[0], [1, 5]), [7], 3)
    logits = logits_of(*stepper.built, batch.images).astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    used = (batch.labels != 255) & (batch.weights > 0)[:, None, None]
    expected = -np.take_along_axis(log_p, np.where(used, batch.labels, 0)[..., None], -1)[..., 0][used].mean()
    state, logs = stepper([batch])
    assert logs[0][0] == pytest.approx(expected, rel=1e-5)
    assert finite(state)


@pytest.mark.slow
def test_rows_of_weight_0_change_nothing(stepper, batches):
    """Padding and corrupt images: bit for bit the same, whatever the rows hold."""
    one, other = (stepper([weightless(batches[0], [2, 7], junk)]) for junk in (0, 200))
    assert one[1] == other[1]
    assert bytes_of(one[0]) == bytes_of(other[0])


@pytest.mark.slow
def test_a_batch_without_labels_changes_no_parameter(stepper, batches):
    for given in (emptied(batches[0], slice(None)), weightless(batches[0], slice(None), 100)):
        state, logs = stepper([given])
        assert logs == [(0.0, 0.0)]
        assert bytes_of(state.model) == bytes_of(stepper.built[0])


# Resuming


def state_of(config):
    """What the newest checkpoint of a run holds, on one device."""
    like = abstract_state(toy_problem(config).build, config, optimizer_of(config), make_mesh(num_devices=1))
    checkpoints = Checkpoints(Path(config.out) / "checkpoints")
    return checkpoints.restore(checkpoints.latest_step(), like)


def assert_same_run(one, other):
    for name in ("metrics.csv", "metrics.jsonl", "result.json", "classes.txt"):
        assert Path(one.out, name).read_bytes() == Path(other.out, name).read_bytes(), name
    assert saved_steps(one) == saved_steps(other)
    assert bytes_of(state_of(one)) == bytes_of(state_of(other))


def killed_and_resumed(config, monkeypatch, at):
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, at)
        with pytest.raises(Interrupted):
            train(config)
    assert saved_steps(config) == [3]
    return train(config)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run of six steps."""
    config = toy_config(tmp_path_factory.mktemp("finished") / "run")
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        return config, train(config)


@pytest.mark.slow
def test_resumed_equals_uninterrupted(finished, tmp_path, monkeypatch, toys):
    config, _ = finished
    broken = dataclasses.replace(config, out=str(tmp_path / "broken"))
    killed_and_resumed(broken, monkeypatch, at=5)
    assert_same_run(config, broken)


@pytest.mark.slow
def test_resumed_equals_uninterrupted_with_batch_norm_dropout_and_the_average(tmp_path, monkeypatch, toys):
    config = toy_config(tmp_path / "whole", model="toy_unet_batch_norm", name="adamw", ema=0.9)
    broken = dataclasses.replace(config, out=str(tmp_path / "broken"))
    train(config), killed_and_resumed(broken, monkeypatch, at=6)
    assert_same_run(config, broken)


@pytest.mark.slow
def test_what_a_run_of_a_segmenter_writes(finished):
    config, result = finished
    rows = read_csv(config)
    assert [row["step"] for row in rows] == [2, 3, 4, 6]
    assert all({"train/loss", "train/grad_norm", "train/learning_rate"} <= row.keys() for row in rows)
    assert [row["step"] for row in rows if "test/mean_iou" in row] == [3, 6]
    assert {"loss", "mean_iou", "pixel_accuracy"} <= result.metrics.keys()
    stored = json.loads(Path(config.out, "result.json").read_text())
    assert stored == {f"test/{name}": None if np.isnan(x) else x for name, x in result.metrics.items()}
    names = {path.name for path in Path(config.out).iterdir()}
    assert {"predictions.png", "confusion.png", "classes.txt", "learning_curve.png"} <= names
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]


@pytest.mark.slow
def test_a_step_is_replayed(finished, toys):
    """Of the second half of the run, from the checkpoint in its middle; rows hold the mean since the row before."""
    config, _ = finished
    again = replay(config.out, 4)
    row = next(row for row in read_csv(config) if row["step"] == 4)
    assert again.loss == pytest.approx(row["train/loss"], rel=1e-6)
    assert again.not_finite == []
    assert all("digit scenes/train" in text for text in again.examples)


# One device and eight


@pytest.mark.slow
def test_one_device_equals_eight(assert_close, stepper, batches, toys):
    """With void images and rows of weight 0, so that devices differ in what they count. 1e-4 after three steps: the
    gradients of eight devices are added in another order than those of one."""
    given = [weightless(emptied(batch, [1, 5]), [7], 50) for batch in batches]
    one, eight = stepper(given), Stepper(stepper.problem, devices=8)(given)
    np.testing.assert_allclose(one[1], eight[1], rtol=1e-4)
    assert_close(eight[0].model, one[0].model, 1e-4)


@pytest.mark.slow
def test_a_run_on_one_device_goes_on_on_eight(finished, tmp_path, monkeypatch, assert_close, toys):
    config, result = finished
    moved = dataclasses.replace(config, out=str(tmp_path / "moved"))
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 4)
        with pytest.raises(Interrupted):
            train(moved)
    install(monkeypatch, devices=8)
    metrics = train(moved).metrics
    np.testing.assert_allclose(*([row["train/loss"] for row in read_csv(each)] for each in (config, moved)), rtol=1e-4)
    assert metrics["loss"] == pytest.approx(result.metrics["loss"], rel=1e-4)
    assert_close(state_of(moved).model, state_of(config).model, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "task",
    [{}, {"cross_entropy": 0.5, "dice": 1.0, "lovasz": 0.5, "class_weights": (0.3,) + (1.0,) * 10}],
    ids=["cross entropy", "all"],
)
def test_accumulated_gradients_equal_the_full_batch(task, assert_close, toys, batches):
    """The parts have unequal numbers of labelled pixels, so that means of means would be wrong. 1e-5: the gradients of
    a batch's rows are added in another order."""
    config = dataclasses.replace(toy_config("unused"), task=SegmentationLossConfig(**task))
    given = [emptied(batches[0], [0, 1, 2])]
    whole, parts = (Stepper(toy_problem(each))(given) for each in (config, with_loop(config, accumulate=2)))
    assert parts[1][0] == pytest.approx(whole[1][0], rel=1e-5)
    assert_close(parts[0].model, whole[0].model, 1e-5)


# Evaluation


def evaluated(*, batch_size, devices=1, test=None, **options):
    config = with_loop(toy_config("unused", **options), eval_batch_size=batch_size)
    problem = toy_problem(config, test)
    return problem.evaluator(make_mesh(num_devices=devices))(*problem.build()).metrics


@pytest.mark.slow
def test_metrics_depend_on_no_batch_size_and_no_devices(toys):
    """Seven images, one of them void, in batches of one (no padding), of three, and of eight on eight devices."""
    test = VoidScenes("test", void=(4,))
    one, three, eight = (evaluated(batch_size=n, devices=8 if n == 8 else 1, test=test) for n in (1, 3, 8))
    for other in (three, eight):
        assert other.keys() == one.keys()
        assert other.pop("loss") == pytest.approx(one["loss"], rel=1e-5)  # added in another order
        assert other == {name: value for name, value in one.items() if name != "loss"}  # made of counts


@pytest.mark.slow
def test_a_corrupt_image_is_not_evaluated(toys):
    """It is as if it were not in the split."""
    whole = evaluated(batch_size=8, test=VoidScenes("test", length=6))
    assert evaluated(batch_size=8, test=VoidScenes("test", corrupt=(6,))) == whole


@pytest.mark.slow
def test_a_run_without_any_label_ends(tmp_path, monkeypatch):
    """The mean IoU of nothing is no number, which must not choose the best checkpoint, nor spoil what is written."""
    install(monkeypatch, sources=lambda split: VoidScenes(split, void=range(100)))
    config = with_checkpoint(toy_config(tmp_path / "run"), keep_last=1)
    result = train(config)
    assert result.metrics["loss"] == 0
    assert np.isnan(result.metrics["mean_iou"])
    assert saved_steps(config) == [3, 6]  # of equals, the first is the best


# What does not fit together


def of_folder(path="", *, model="unet_tiny", classes=None, **data):
    return SegmentationConfig(
        model=SegmenterConfig(name=model, num_classes=classes), data=SegmentationDataConfig(path=str(path), **data)
    )


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("unet_tin", UnknownNameError, "--model.name: segmenter 'unet_tin' does not exist; nearest: unet_tiny"),
        ("resnet18", ValueError, "--model.name resnet18 is an image classifier, and this recipe trains segmenters"),
        ("detr_r50", ValueError, "--model.name detr_r50 is a detector, and this recipe trains segmenters"),
        ("sam_vit_b", UnknownNameError, "--model.name: segmenter 'sam_vit_b' does not exist"),
    ],
)
def test_a_model_of_another_kind_is_refused_before_any_data_is_read(name, error, message):
    with pytest.raises(error) as caught:
        segmentation_problem(of_folder(model=name))
    assert message in str(caught.value)


def test_data_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data\.kind 'folder' needs a path: --data\.path PATH, a folder with train/"):
        segmentation_problem(of_folder())
    with pytest.raises(ValueError, match=r"--data\.train-split and --data\.test-split are both val"):
        segmentation_problem(of_folder(tmp_path, train_split="val"))
    with pytest.raises(FileNotFoundError, match=r"nowhere"):
        segmentation_problem(of_folder(tmp_path / "nowhere"))
    write_folder(tmp_path, "train", [0, 1, 2])
    with pytest.raises(FileNotFoundError, match="val"):
        segmentation_problem(of_folder(tmp_path))
    write_folder(tmp_path, "val", [1])
    with pytest.raises(ValueError, match=r"--model\.num-classes 2 is fewer than the 3 classes of the data"):
        segmentation_problem(of_folder(tmp_path, classes=2))


def test_classes_come_from_the_data_or_are_more(tmp_path):
    """Values of any split; the test split has the classes of training."""
    write_folder(tmp_path, "train", [0, 1]), write_folder(tmp_path, "val", [3])
    problem = segmentation_problem(of_folder(tmp_path))
    assert (problem.num_classes, problem.source.class_names) == (4, ("0", "1", "2", "3"))
    assert problem.test_source.class_names == problem.source.class_names
    assert segmentation_problem(of_folder(tmp_path, classes=9)).num_classes == 9


def test_the_stream_of_a_run_begins_at_any_step(toys):
    problem = toy_problem(toy_config("unused"))
    *_, third = first_batches(problem, 3)
    stream = problem.stream(2)
    assert bytes_of(next(stream)) == bytes_of(third)
    stream.close()
