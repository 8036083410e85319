"""Asked to stop, changed options, replaying a step, beginning with another run: what a run folder survives."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from toy import bytes_of, saved_state, saved_steps, toy_config, with_checkpoint, with_loop, with_optimizer, write_npz

import eqvision
import eqvision.train as train_module
from eqvision import UnknownNameError, cli, finetune
from eqvision.checkpoint import CheckpointError, Checkpoints
from eqvision.mesh import make_mesh
from eqvision.predict import Run
from eqvision.recipes import AugmentConfig, ModelConfig, TrainConfig
from eqvision.replay import replay
from eqvision.run_folder import RunFolder, RunFolderError
from eqvision.signals import StoppedError, StopSignals
from eqvision.train import train
from eqvision.window import DivergedError


@pytest.fixture(autouse=True)
def _two_devices(monkeypatch):
    monkeypatch.setattr(train_module, "make_mesh", lambda config=None: make_mesh(num_devices=2))


@pytest.fixture(autouse=True)
def _default_handlers():
    """A shell lets what it runs in the background ignore SIGINT: then nothing here would be delivered."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def npz(tmp_path):
    return write_npz(tmp_path / "toy.npz")


def signal_in_step(monkeypatch, number: int, sent: signal.Signals) -> None:
    """The process gets the signal while its ``number``-th step runs."""
    step, calls = train_module._Loop._step, iter(range(1, 10_000))

    def interrupted(self, *arguments):
        if next(calls) == number:
            os.kill(os.getpid(), sent)
        step(self, *arguments)

    monkeypatch.setattr(train_module._Loop, "_step", interrupted)


def assert_same_end(one, other):
    for name in ("metrics.csv", "metrics.jsonl", "result.json"):
        assert Path(one.out, name).read_bytes() == Path(other.out, name).read_bytes(), name
    assert bytes_of(saved_state(one)) == bytes_of(saved_state(other))


# Signals


@pytest.mark.parametrize("sent", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_the_current_step_and_the_run_goes_on_as_if_nothing_had_been(npz, tmp_path, monkeypatch, sent):
    """The fifth of twelve steps is in the middle of a window of the log, and no checkpoint is due there."""
    whole, broken = (toy_config(tmp_path / name, npz) for name in ("whole", "broken"))
    train(whole)
    with monkeypatch.context() as patch:
        signal_in_step(patch, 5, sent)
        with pytest.raises(StoppedError, match=rf"stopped by {sent.name} after step 5 of 12; its state is saved in"):
            train(broken)
    assert saved_steps(broken) == [4, 5]
    train(broken)
    assert_same_end(whole, broken)


def test_a_signal_during_an_evaluation_leaves_it_to_the_next_start(npz, tmp_path, monkeypatch):
    whole, broken = (toy_config(tmp_path / name, npz) for name in ("whole", "broken"))
    train(whole)
    evaluate = train_module._Loop._evaluate

    def interrupted(self, number, progress):
        os.kill(os.getpid(), signal.SIGTERM)
        evaluate(self, number, progress)

    with monkeypatch.context() as patch:
        patch.setattr(train_module._Loop, "_evaluate", interrupted)
        with pytest.raises(StoppedError, match="after step 4 of 12"):
            train(broken)
    assert Checkpoints(Path(broken.out) / "checkpoints").record(4).unevaluated
    train(broken)
    assert_same_end(whole, broken)


def test_the_command_ends_with_the_documented_code(npz, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EQVISION_ALLOCATOR", "default")
    signal_in_step(monkeypatch, 2, signal.SIGTERM)
    options = ["--data.path", str(npz), "--out", str(tmp_path / "run"), "--model.name", "small_cnn"]
    options += ["--model.image-size", "8", "--model.in-channels", "1", "--loop.batch-size", "16"]
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "arrays", *options])
    assert stop.value.code == 75
    assert "The same command goes on from there" in capsys.readouterr().err


def test_the_second_signal_is_not_caught():
    before = signal.getsignal(signal.SIGINT)
    with StopSignals() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        assert stop.name == "SIGINT"
        assert signal.getsignal(signal.SIGINT) is before
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_that_is_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert not stop.requested
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


# Changed options


@pytest.mark.slow
def test_options_that_change_the_numbers_are_listed_and_refused(npz, tmp_path, capsys):
    config = with_loop(toy_config(tmp_path / "run", npz), epochs=1.0)
    train(config)
    before = (tmp_path / "run/config.yaml").read_bytes()
    other = with_loop(with_optimizer(config, learning_rate=1e-2), epochs=2.0, batch_size=8, log_every=1)
    with pytest.raises(RunFolderError) as error:
        train(other)
    message = str(error.value)
    for line in (
        "optimizer.learning_rate: 0.003 -> 0.01",
        "loop.epochs: 1.0 -> 2.0",
        "loop.batch_size: 16 -> 8",
        "--allow-config-change",
    ):
        assert line in message
    assert "log_every" not in message
    assert (tmp_path / "run/config.yaml").read_bytes() == before
    assert train(dataclasses.replace(other, allow_config_change=True)).step == 12
    assert "loop.epochs: 1.0 -> 2.0" in capsys.readouterr().err
    assert RunFolder(tmp_path / "run").config().loop.epochs == 2.0
    assert "loop.epochs: 1.0 -> 2.0" in RunFolder(tmp_path / "run").read()["changes"][0]


def test_options_that_only_say_how_to_run_may_change(npz, tmp_path, capsys):
    config = with_loop(toy_config(tmp_path / "run", npz), epochs=1.0)
    train(config)
    data = dataclasses.replace(config.data, num_threads=0)
    train(with_checkpoint(dataclasses.replace(config, data=data), keep_last=9))
    assert "resumes with other options:\n  checkpoint.keep_last: 5 -> 9" in capsys.readouterr().err


# Damage and divergence


@pytest.mark.slow
def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(npz, tmp_path, capsys):
    whole, broken = (toy_config(tmp_path / name, npz) for name in ("whole", "broken"))
    train(whole), train(broken)
    (tmp_path / "broken/checkpoints/12/record/metadata").write_text("{}")
    train(broken)
    assert "step 12 is damaged: record/metadata" in capsys.readouterr().err
    assert (tmp_path / "broken/damaged/12").is_dir()
    assert_same_end(whole, broken)


@pytest.mark.slow
def test_replaying_a_step_gives_its_numbers(npz, tmp_path, capsys):
    config = with_loop(toy_config(tmp_path / "run", npz), log_every=1)
    config = dataclasses.replace(config, augment=AugmentConfig(mixup=0.2, random_erasing=0.5))
    train(config)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    before = sorted(path.name for path in (tmp_path / "run").rglob("*"))
    for step in (2, 7, 12):
        seen = replay(tmp_path / "run", step)
        assert seen.loss == rows[step - 1]["train/loss"]
        assert seen.grad_norm == rows[step - 1]["train/grad_norm"]
        assert seen.not_finite == []
        assert len(seen.indices) == 16
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == before
    with pytest.raises(ValueError, match="--step 13 is not in the run, which has the steps 1 to 12"):
        replay(tmp_path / "run", 13)
    with pytest.raises(SystemExit):
        cli.main(["replay", str(tmp_path / "run")])
    assert "has not diverged; name the step with --step" in capsys.readouterr().err


def test_a_divergence_is_written_down_and_replayed(npz, tmp_path, capsys):
    config = with_optimizer(toy_config(tmp_path / "run", npz), name="sgd", learning_rate=1e30, clip_norm=None)
    with pytest.raises(DivergedError) as error:
        train(config)
    report = json.loads((tmp_path / "run/diverged-0.json").read_text())
    assert f"at step {report['step']} " in str(error.value)
    assert f"eqvision replay {tmp_path / 'run'} --step {report['step']}" in str(error.value)
    cli.main(["replay", str(tmp_path / "run")])
    text = capsys.readouterr().out
    assert f"step {report['step']}: loss" in text
    assert "leaves not finite after it" in text
    assert str(report["indices"]) in text


# Beginning with another run


@pytest.mark.slow
def test_fine_tuning_keeps_the_backbone_and_begins_a_new_head(npz, tmp_path, capsys):
    first = with_loop(toy_config(tmp_path / "first", npz, model="vit_ti4"), epochs=1.0)
    train(first)
    model = dataclasses.replace(first.model, image_size=12, num_classes=5)
    second = dataclasses.replace(first, out=str(tmp_path / "second"), init=first.out, model=model)
    second = with_optimizer(second, freeze=(r"^backbone\.",))
    assert train(second).step == 3
    said = capsys.readouterr().err
    assert f"begins with {first.out}, step 3" in said
    assert "backbone.position.weight: resampled from (2, 2) to (3, 3) positions" in said
    assert "head.linear.weight: fresh, (192, 5) instead of (192, 3)" in said
    old, new = saved_state(first).model, saved_state(second, num_classes=5).model
    for name in ("patch_embed", "encoder", "norm"):
        if hasattr(old.backbone, name):
            assert bytes_of(getattr(old.backbone, name)) == bytes_of(getattr(new.backbone, name)), name
    assert np.any(np.asarray(jax.tree.leaves(new.head)[0]))


def test_every_statistic_comes_to_the_layer_that_it_belongs_to(monkeypatch):
    """There are more than ten layers with statistics, of several widths: "10" comes before "2" among names."""
    new, stats = eqvision.create("resnet20_cifar", num_classes=3, key=jax.random.key(0))
    numbered = [leaf + i for i, leaf in enumerate(jax.tree.leaves(stats))]
    old_stats = jax.tree.unflatten(jax.tree.structure(stats), numbered)
    old = eqvision.create("resnet20_cifar", num_classes=3, key=jax.random.key(1))[0]
    config = TrainConfig(model=ModelConfig("resnet20_cifar"))
    monkeypatch.setattr(finetune, "load_run", lambda path: Run(config, ("a", "b", "c"), old, old_stats, 7))
    begun = finetune.start_from("some/run", new, stats)
    assert bytes_of(begun) == bytes_of((old, old_stats))


def test_another_model_cannot_be_begun_with(npz, tmp_path):
    first = with_loop(toy_config(tmp_path / "first", npz), epochs=1.0)
    train(first)
    second = toy_config(tmp_path / "second", npz, model="vit_ti4")
    with pytest.raises(CheckpointError, match=r"--init .*first \(small_cnn\) does not fit this model; \d+ parameters"):
        train(dataclasses.replace(second, init=first.out))


@pytest.mark.slow
def test_the_best_checkpoint_stays(npz, tmp_path):
    config = with_checkpoint(toy_config(tmp_path / "run", npz), keep_last=1, keep_best=1, metric="test/loss")
    train(config)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["test/loss"] for row in rows if "test/loss" in row}
    assert saved_steps(config) == sorted({12, min(losses, key=losses.__getitem__)})
    assert Checkpoints(tmp_path / "run/checkpoints").record(12).history == {str(k): v for k, v in losses.items()}


def test_a_metric_for_the_best_that_does_not_exist_is_named(npz, tmp_path):
    config = with_checkpoint(with_loop(toy_config(tmp_path / "run", npz), epochs=1.0), metric="test/acuracy")
    with pytest.raises(
        UnknownNameError, match=r"checkpoint\.metric 'test/acuracy' does not exist; nearest: test/accuracy"
    ):
        train(config)


def test_a_stop_without_room_does_not_say_that_it_saved(npz, tmp_path, monkeypatch):
    config = with_checkpoint(toy_config(tmp_path / "run", npz), on_full="continue")
    monkeypatch.setattr(Checkpoints, "_has_room", lambda self, step, state: step != 5)
    signal_in_step(monkeypatch, 5, signal.SIGTERM)
    with pytest.raises(
        CheckpointError, match=r"stopped by SIGTERM after step 5, whose state could not be saved .* step 4"
    ):
        train(config)
