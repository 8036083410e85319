"""Training detectors: resuming bit for bit, one device against eight, images without objects, rows of weight 0."""

import dataclasses
import json
import os
import re
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from detection_boards import Boards, mixed_sizes
from scipy.optimize import linear_sum_assignment
from test_train import Interrupted, interrupt_in_step, read_csv
from toy import bytes_of, saved_steps, with_checkpoint, with_loop
from toy_detection import Scenes, first_batches, install, on_devices, toy_config, toy_problem

import eqvision.train as train_module
from eqvision.checkpoint import Checkpoints
from eqvision.mesh import make_mesh
from eqvision.optim import make_optimizer, make_schedule
from eqvision.optim.groups import leaf_name
from eqvision.signals import StoppedError
from eqvision.state import abstract_state, first_state
from eqvision.step import make_step
from eqvision.train import train
from eqvision.window import DivergedError


@pytest.fixture(autouse=True)
def _toys(monkeypatch):
    install(monkeypatch)


def plain(out, **options):
    """SGD, which does not make full steps of the rounding of gradients that are zero, as AdamW does."""
    return toy_config(out, name="sgd", **{"learning_rate": 1e-3, "weight_decay": 0.0} | options)


class Stepper:
    """A compiled step of a configuration, to be begun anew as often as one likes."""

    def __init__(self, config, devices=1):
        self.problem, self.mesh, self.config = toy_problem(config), make_mesh(num_devices=devices), config
        schedule = make_schedule(config.schedule, config.optimizer.learning_rate, 6)  # that of the runs below
        self.optimizer = make_optimizer(config.optimizer, schedule)
        self.step = make_step(self.problem, self.optimizer, self.mesh, config)
        self.built = self.problem.build()

    def __call__(self, batches):
        """The last state, and the losses and gradient norms on the way."""
        state, logs = first_state(*self.built, self.config, self.optimizer, self.mesh), []
        for batch in batches:
            state, log = self.step(on_devices(batch, self.mesh), state)
            logs.append((float(log.loss), float(log.grad_norm)))
        return state, logs


@pytest.fixture(scope="module")
def stepper(tmp_path_factory):
    """On one device; the program that the runs of this file have, too."""
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        yield Stepper(plain(tmp_path_factory.mktemp("step")))


@pytest.fixture(scope="module")
def batches(stepper):
    return first_batches(stepper.problem, 3)


def emptied(batch, rows):
    """Without the objects of some rows."""
    valid = batch.targets.valid.copy()
    valid[rows] = False
    return batch._replace(targets=batch.targets._replace(valid=valid))


def weightless(batch, rows, junk):
    """Rows of weight 0 with something else in them."""
    weights, images, boxes = batch.weights.copy(), batch.images.copy(), batch.targets.boxes.copy()
    weights[rows], images[rows], boxes[rows] = 0.0, junk, np.nan
    targets = batch.targets._replace(boxes=boxes)
    return batch._replace(weights=weights, images=images, targets=targets)


@pytest.fixture(scope="module")
def predicted(stepper):
    """What the model says before step 0 of each row of a batch: layers, logits and boxes cxcywh in numpy."""
    forward = jax.jit(lambda batch, model, stats: model(stepper.problem._inputs(batch), stats)[0])

    def of(batch):
        logits, boxes, *_ = forward(jax.tree.map(jnp.asarray, batch), *stepper.built)
        return np.asarray(logits, np.float64), np.asarray(boxes, np.float64)

    return of


def loss_by_hand(predicted, batch, rows):
    """Deformable DETR's loss of these images, with SciPy's matching."""
    total, (logits, boxes) = 0.0, predicted
    for row in rows:
        valid = batch.targets.valid[row]
        truth = batch.targets.boxes[row][valid] / np.tile(batch.size[row][::-1], 2)
        labels = batch.targets.labels[row][valid]
        for p, found in zip(1 / (1 + np.exp(-logits[:, row])), boxes[:, row], strict=True):
            yes, no = -0.25 * (1 - p) ** 2 * np.log(p), -0.75 * p**2 * np.log(1 - p)
            centres = np.concatenate([truth[:, :2] + truth[:, 2:], 2 * (truth[:, 2:] - truth[:, :2])], axis=1) / 2
            l1 = np.abs(found[:, None] - centres[None]).sum(-1)
            pairs = 5 * l1 + 2 * (1 - giou_by_hand(found, truth))
            queries, objects = linear_sum_assignment(2 * (yes - no)[:, labels] + pairs)
            change = (yes - no)[queries, labels[objects]].sum()
            total += 2 * (no.sum() + change) + pairs[queries, objects].sum()
    return total / max(1, batch.targets.valid[list(rows)].sum())


def giou_by_hand(found, truth):
    """Of boxes cxcywh with boxes xyxy."""
    low, high = found[:, None, :2] - found[:, None, 2:] / 2, found[:, None, :2] + found[:, None, 2:] / 2
    shared = np.clip(np.minimum(high, truth[:, 2:]) - np.maximum(low, truth[:, :2]), 0, None).prod(-1)
    hull = (np.maximum(high, truth[:, 2:]) - np.minimum(low, truth[:, :2])).prod(-1)
    union = (high - low).prod(-1) + (truth[:, 2:] - truth[:, :2]).prod(-1) - shared
    return shared / union - (hull - union) / hull


def trained(model):
    """Without parameters that change nothing, whose gradients are rounding alone: biases of projections, which the
    norm behind them takes away, and of keys, which add the same to all logits of a query."""

    def kept(path, leaf):
        name = leaf_name(path)
        useless = name.endswith("key.bias") or (name.startswith("projections.") and name.endswith("conv.bias"))
        return jnp.zeros_like(leaf) if useless else leaf

    return jax.tree.map_with_path(kept, model)


def finite(tree):
    return all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(tree))


# Images without objects, rows that weigh nothing


def test_a_batch_without_objects_trains(stepper, batches):
    state, logs = stepper([emptied(batches[0], slice(None))] * 3)
    assert finite(state)
    assert finite(logs)
    assert logs[-1][0] < logs[0][0]
    assert bytes_of(state.model) != bytes_of(stepper.built[0])


def test_empty_images_share_a_batch_with_others(stepper, predicted, batches):
    """The divisor is the number of objects of the whole batch, to which empty images bring none but their queries."""
    batch = emptied(batches[0], [1, 4, 5])
    state, logs = stepper([batch])
    assert finite(state)
    assert logs[0][0] == pytest.approx(loss_by_hand(predicted(batch), batch, range(8)), rel=1e-5)
    nothing = emptied(batch, slice(None))
    assert stepper([nothing])[1][0][0] == pytest.approx(loss_by_hand(predicted(batch), nothing, range(8)), rel=1e-5)


@pytest.mark.slow
def test_rows_of_weight_0_change_nothing(stepper, predicted, batches):
    """Padding and corrupt images: bit for bit the same, whatever the rows hold."""
    rows = [2, 7]
    one, other = (stepper([weightless(batches[0], rows, junk)]) for junk in (0, 200))
    assert one[1] == other[1]
    assert bytes_of(one[0]) == bytes_of(other[0])
    assert finite(one[0])
    used = [row for row in range(8) if row not in rows]
    assert one[1][0][0] == pytest.approx(loss_by_hand(predicted(batches[0]), batches[0], used), rel=1e-5)


def test_a_batch_of_weight_0_changes_no_parameter(stepper, batches):
    state, logs = stepper([weightless(batches[0], slice(None), 100)])
    assert logs == [(0.0, 0.0)]
    assert bytes_of(state.model) == bytes_of(stepper.built[0])


# Resuming


def state_of(config):
    """What the newest checkpoint of a run holds, on one device."""
    problem = toy_problem(config)
    schedule = make_schedule(config.schedule, config.optimizer.learning_rate, 6)
    like = abstract_state(problem.build, config, make_optimizer(config.optimizer, schedule), make_mesh(num_devices=1))
    checkpoints = Checkpoints(Path(config.out) / "checkpoints")
    return checkpoints.restore(checkpoints.latest_step(), like)


def assert_same_run(one, other):
    for name in ("metrics.csv", "metrics.jsonl", "result.json"):
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
    config = plain(tmp_path_factory.mktemp("finished") / "run")
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        return config, train(config)


@pytest.mark.slow
def test_resumed_equals_uninterrupted(finished, tmp_path, monkeypatch):
    config, _ = finished
    broken = dataclasses.replace(config, out=str(tmp_path / "broken"))
    killed_and_resumed(broken, monkeypatch, at=5)
    assert_same_run(config, broken)


def test_what_a_run_of_a_detector_writes(finished):
    config, result = finished
    rows = read_csv(config)
    assert [row["step"] for row in rows] == [2, 3, 4, 6]
    assert all({"train/loss", "train/grad_norm", "train/learning_rate"} <= row.keys() for row in rows)
    assert [row["step"] for row in rows if "test/AP" in row] == [3, 6]
    assert {"loss", "AP", "AP50"} <= result.metrics.keys()
    stored = json.loads(Path(config.out, "result.json").read_text())
    assert stored == {f"test/{name}": None if np.isnan(x) else x for name, x in result.metrics.items()}
    assert Checkpoints(Path(config.out) / "checkpoints").record(6).history.keys() == {"3", "6"}
    assert (Path(config.out) / "predictions.png").exists()
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]


@pytest.mark.slow
def test_resumed_equals_uninterrupted_with_batch_norm_dropout_and_the_average(tmp_path, monkeypatch):
    config = toy_config(tmp_path / "whole", model="toy_deformable_batch_norm", ema=0.9)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.2))
    broken = dataclasses.replace(config, out=str(tmp_path / "broken"))
    train(config), killed_and_resumed(broken, monkeypatch, at=6)
    assert_same_run(config, broken)


def test_a_signal_during_an_evaluation_leaves_it_to_the_next_start(finished, tmp_path, monkeypatch):
    config, _ = finished
    broken = dataclasses.replace(config, out=str(tmp_path / "broken"))
    evaluate = train_module._Loop._evaluate

    def interrupted(self, number, progress):
        os.kill(os.getpid(), signal.SIGTERM)
        evaluate(self, number, progress)

    with monkeypatch.context() as patch:
        patch.setattr(train_module._Loop, "_evaluate", interrupted)
        with pytest.raises(StoppedError, match="after step 3 of 6"):
            train(broken)
    assert Checkpoints(Path(broken.out) / "checkpoints").record(3).unevaluated
    train(broken)
    assert_same_run(config, broken)


# One device and eight


def assert_same_curve(one, other):
    """1e-4: the gradients of eight devices are added in another order than those of one, and six steps amplify that."""
    np.testing.assert_allclose(one, other, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["toy_deformable", "toy_detr", "toy_mask_rcnn", "toy_centernet"])
def test_one_device_equals_eight(model, tmp_path, assert_close, stepper, batches):
    """With empty images and rows of weight 0, so that devices differ in what they count."""
    toy = toy_config(tmp_path, model=model)
    config = dataclasses.replace(plain(tmp_path), model=toy.model, task=toy.task)
    if model == "toy_mask_rcnn":
        batches = first_batches(toy_problem(config), 3)  # with masks
    given = [weightless(emptied(batch, [1, 5]), [7], 50) for batch in batches]
    one = (stepper if model == "toy_deformable" else Stepper(config))(given)
    eight = Stepper(config, devices=8)(given)
    assert_same_curve(one[1], eight[1])
    # 1e-4 of each leaf's scale after three steps, for the same reason
    assert_close(trained(eight[0].model), trained(one[0].model), 1e-4)


@pytest.mark.slow
def test_a_run_on_one_device_goes_on_on_eight_with_the_same_loss_curve(finished, tmp_path, monkeypatch, assert_close):
    config, result = finished
    moved = dataclasses.replace(config, out=str(tmp_path / "moved"))
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 4)
        with pytest.raises(Interrupted):
            train(moved)
    assert saved_steps(moved) == [3]
    install(monkeypatch, devices=8)
    metrics = train(moved).metrics
    curves = [[row["train/loss"] for row in read_csv(each)] for each in (config, moved)]
    assert_same_curve(*curves)
    assert metrics["loss"] == pytest.approx(result.metrics["loss"], rel=1e-4)
    assert_close(trained(state_of(moved).model), trained(state_of(config).model), 1e-4)


# R-CNNs, which draw what they are trained on


@pytest.mark.slow
def test_an_rcnn_resumes_where_it_was_and_trains_without_objects(tmp_path, monkeypatch):
    """What is drawn is told by the step and the image; every third scene is empty."""
    install(monkeypatch, sources=lambda split, masks: Scenes(split, empty=range(0, 100, 3), masks=masks))
    config, broken = (toy_config(tmp_path / name, model="toy_mask_rcnn") for name in ("whole", "broken"))
    result = train(config)
    assert result.metrics.keys() >= {"AP", "mask_AP", "loss"}
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 4)
        with pytest.raises(Interrupted):
            train(broken)
    train(broken)
    assert_same_run(config, broken)


# Accumulation, precision, shapes


@pytest.mark.slow
def test_accumulated_gradients_equal_the_full_batch(tmp_path, assert_close, stepper, batches):
    """The parts have unequal numbers of objects, so that means of means would be wrong."""
    given = [emptied(batches[0], [0, 1, 2])]
    whole, parts = stepper(given), Stepper(with_loop(plain(tmp_path), accumulate=2))(given)
    assert parts[1][0] == pytest.approx(whole[1][0], rel=1e-5)
    # 1e-5: the gradients of a batch's rows are added in another order
    assert_close(trained(parts[0].model), trained(whole[0].model), 1e-5)


@pytest.mark.slow
def test_bfloat16_computes_and_keeps_float32_where_it_matters(tmp_path, stepper, batches):
    low = Stepper(with_loop(plain(tmp_path), compute_dtype="bfloat16"))
    state, logs = low(batches)
    assert finite(state)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.model)} == {jnp.dtype("float32")}
    exact = stepper(batches)[1]
    assert logs != exact
    np.testing.assert_allclose(np.array(logs)[:, 0], np.array(exact)[:, 0], rtol=0.05)
    inputs = low.problem._inputs(jax.tree.map(jnp.asarray, batches[0]))
    predictions, _ = jax.eval_shape(lambda model, stats: model(inputs, stats), *low.built)
    assert inputs.images.dtype == jnp.bfloat16
    assert predictions.boxes_cxcywh.dtype == predictions.logits.dtype == jnp.float32


@pytest.mark.slow
def test_batches_of_several_shapes_train(tmp_path):
    """Images of the transform "detr" come in buckets, each of which needs a program of its own."""
    config = plain(tmp_path)
    data = dataclasses.replace(config.data, transform="detr", scales=(24, 32), longest=48)
    config = dataclasses.replace(config, data=data, model=dataclasses.replace(config.model, in_channels=3))
    step = Stepper(config)
    problem = dataclasses.replace(step.problem, source=Boards(mixed_sizes(32)))
    by_shape = {batch.images.shape: batch for batch in first_batches(problem, 4)}
    assert len(by_shape) > 1
    one, other, *_ = by_shape.values()
    state, logs = step([one, other, one, other])
    assert finite(state)
    assert logs[2][0] < logs[0][0]
    assert logs[3][0] < logs[1][0]


# Evaluation


@pytest.fixture(scope="module")
def evaluated():
    """Metrics of one model for a batch size and a number of devices."""
    with pytest.MonkeyPatch.context() as patch:
        install(patch)

        def evaluate(model="toy_deformable", *, batch_size, devices=1, test=None):
            config = with_loop(toy_config("unused", model=model), eval_batch_size=batch_size)
            problem = toy_problem(config, test=test or Scenes("test", masks=model == "toy_mask_rcnn"))
            return problem.evaluator(make_mesh(num_devices=devices))(*problem.build()).metrics

        yield evaluate


def assert_same_metrics(one, other):
    assert one.keys() == other.keys()
    for name in one:  # 1e-5: losses are added in another order; AP is made of counts
        assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-7, nan_ok=True), name


@pytest.mark.slow
@pytest.mark.parametrize("model", ["toy_deformable", "toy_detr", "toy_mask_rcnn", "toy_centernet"])
def test_metrics_depend_on_no_batch_size_and_no_devices(model, evaluated):
    """Seven images, one of them empty, in batches of one (no padding), of three, and of eight on eight devices."""
    test = Scenes("test", empty=(4,), masks=model == "toy_mask_rcnn")
    one = evaluated(model, batch_size=1, test=test)
    assert_same_metrics(evaluated(model, batch_size=3, test=test), one)
    assert_same_metrics(evaluated(model, batch_size=8, devices=8, test=test), one)


@pytest.mark.slow
def test_a_corrupt_image_is_not_evaluated(evaluated):
    """It is as if it were not in the split."""
    whole = evaluated(batch_size=8, test=Scenes("test", length=6))
    assert_same_metrics(evaluated(batch_size=8, test=Scenes("test", corrupt=(6,))), whole)


@pytest.mark.slow
def test_a_run_without_any_object_ends(tmp_path, monkeypatch):
    """AP of nothing is no number, which must not choose the best checkpoint, nor spoil what is written."""
    everything = tuple(range(100))
    install(monkeypatch, sources=lambda split: Scenes(split, empty=everything))
    config = with_checkpoint(plain(tmp_path / "run"), keep_last=1)
    result = train(config)
    assert np.isfinite(result.metrics["loss"])
    assert np.isnan(result.metrics["AP"])
    assert all(np.isfinite(row["train/loss"]) for row in read_csv(config))
    assert saved_steps(config) == [3, 6]  # of equals, the first is the best


# Divergence


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, stepper):
    """The label of the first scene of the second batch is no class."""
    bad = next(index for index in first_batches(stepper.problem, 2)[1].indices.tolist())

    class Mislabelled(Scenes):
        def _composed(self, index):
            example = super()._composed(index)
            return example._replace(labels=example.labels + 10) if index == bad else example

    install(monkeypatch, sources=Mislabelled)
    config = with_loop(plain(tmp_path / "run"), log_every=3)
    with pytest.raises(DivergedError) as caught:
        train(config)
    message = str(caught.value)
    assert re.match(r"the loss is nan at step 2 \(learning rate 0\.001\)", message), message
    assert f"scene {bad} of digit scenes/train" in message
    report = json.loads((tmp_path / "run" / "diverged-0.json").read_text())
    assert report["step"] == 2
    assert str(report["indices"]) in message
    assert report["indices"] == first_batches(toy_problem(config), 2)[1].indices.tolist()
    assert saved_steps(config) == []
