"""Loggers beside metrics.csv: TensorBoard events, and Weights & Biases through a stand-in for its package."""

import dataclasses
import importlib.machinery
import importlib.util
import struct
import sys
import types
import urllib.error
import urllib.request

import jax
import numpy as np
import pytest

from eqvision import loggers as loggers_module
from eqvision.loggers import open_loggers
from eqvision.recipes import LogConfig, TrainConfig
from eqvision.run_folder import RunFolder

TENSORBOARD = LogConfig(tensorboard=True)
WANDB = LogConfig(tensorboard=False, wandb="digits-project")


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "my_run"
    path.mkdir()
    return RunFolder(path)


def config_of(log):
    return dataclasses.replace(TrainConfig(), seed=7, log=log)


def events(file):
    """Every event of a file; a record is its length, a checksum, the bytes, a checksum."""
    from tensorboardX.proto.event_pb2 import Event

    content, found, at = file.read_bytes(), [], 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        found.append(Event.FromString(content[at + 12 : at + 12 + length]))
        at += 12 + length + 4
    return found


def scalars(folder):
    """What TensorBoard shows: files in the order of names, and a START drops what it has from that step on."""
    from tensorboardX.proto.event_pb2 import SessionLog

    shown = []
    for file in sorted((folder.path / "tensorboard").iterdir()):
        for event in events(file):
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                shown = [row for row in shown if row[0] < event.step]
            shown += [(event.step, value.tag, round(value.simple_value, 5)) for value in event.summary.value]
    return shown


def test_tensorboard_holds_every_value_under_its_step(folder):
    with open_loggers(config_of(TENSORBOARD), folder, 0) as loggers:
        loggers.write(20, {"train/loss": 2.5, "time/data_wait": 0.25})
        loggers.write(20, {"test/accuracy": 0.5})
        loggers.write(40, {"train/loss": float("nan")})
    shown = scalars(folder)
    assert shown[:3] == [(20, "train/loss", 2.5), (20, "time/data_wait", 0.25), (20, "test/accuracy", 0.5)]
    assert shown[3][:2] == (40, "train/loss")
    assert np.isnan(shown[3][2])


def test_events_are_on_disk_as_soon_as_they_are_written(folder):
    """A run that is killed keeps the events up to its checkpoint; the resumed run does not write those again."""
    loggers = open_loggers(config_of(TENSORBOARD), folder, 0)
    loggers.write(20, {"train/loss": 2.5})
    assert scalars(folder) == [(20, "train/loss", 2.5)]
    loggers.close()


def test_a_resumed_run_purges_the_events_after_the_restored_step(folder):
    """Both starts lie within one second, so the names of the two files must order them too."""
    with open_loggers(config_of(TENSORBOARD), folder, 0) as loggers:
        for step in (10, 20, 30, 40):
            loggers.write(step, {"train/loss": float(step)})
    with open_loggers(config_of(TENSORBOARD), folder, 20) as loggers:
        loggers.write(30, {"train/loss": -30.0})
    assert len(list((folder.path / "tensorboard").iterdir())) == 2
    assert [(step, value) for step, _, value in scalars(folder)] == [(10, 10.0), (20, 20.0), (30, -30.0)]


def test_a_run_that_starts_over_purges_everything(folder):
    with open_loggers(config_of(TENSORBOARD), folder, 10) as loggers:
        loggers.write(20, {"train/loss": 1.0})
    with open_loggers(config_of(TENSORBOARD), folder, 0) as loggers:
        loggers.write(10, {"train/loss": 2.0})
    assert scalars(folder) == [(10, "train/loss", 2.0)]


def test_pictures_arrive_as_png(folder):
    picture = np.zeros((6, 9, 3), np.uint8)
    picture[2:4] = (255, 0, 0)
    with open_loggers(config_of(TENSORBOARD), folder, 0) as loggers:
        loggers.write_image(5, "samples", picture)
    (file,) = (folder.path / "tensorboard").iterdir()
    (image,) = [value.image for event in events(file) for value in event.summary.value]
    assert (image.height, image.width, image.colorspace) == (6, 9, 3)
    assert image.encoded_image_string.startswith(b"\x89PNG")


def hide(monkeypatch, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))


def test_without_tensorboardx_a_line_says_so_and_nothing_fails(folder, monkeypatch, capsys):
    hide(monkeypatch, "tensorboardX")
    with open_loggers(config_of(TENSORBOARD), folder, 0) as loggers:
        loggers.write(20, {"train/loss": 2.5})
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "pip install 'eqvision[logging]'" in printed
    assert "metrics.csv" in printed
    assert list(folder.path.iterdir()) == []


def test_nothing_is_written_where_nothing_is_asked_for(folder, capsys):
    with open_loggers(config_of(LogConfig(tensorboard=False)), folder, 0) as loggers:
        loggers.write(20, {"train/loss": 2.5})
    assert list(folder.path.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_only_the_first_process_writes(folder, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with open_loggers(config_of(LogConfig(tensorboard=True, wandb="project")), folder, 0) as loggers:
        loggers.write(20, {"train/loss": 2.5})
    assert list(folder.path.iterdir()) == []


class FakeRun:
    def __init__(self, options):
        self.options, self.logged, self.exit_code = options, [], None

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self, exit_code):
        self.exit_code = exit_code


@pytest.fixture
def wandb(monkeypatch):
    """Stands in for the package: online, with an account, and a network."""
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.runs = []
    module.errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))
    module.settings = types.SimpleNamespace(mode="online", base_url="https://wandb.example")
    module.setup = lambda: types.SimpleNamespace(settings=module.settings)
    module.Image = lambda pixels: ("picture", pixels.shape)

    def init(**options):
        module.runs.append(FakeRun(options))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(loggers_module, "_reachable", lambda url: url == "https://wandb.example")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return module


def test_wandb_gets_the_configuration_and_every_value(folder, wandb):
    with open_loggers(config_of(WANDB), folder, 0) as loggers:
        loggers.write(20, {"train/loss": 2.5})
        loggers.write_image(20, "samples", np.zeros((4, 5, 3), np.uint8))
    (run,) = wandb.runs
    assert run.options["project"] == "digits-project"
    assert run.options["name"] == "my_run"
    assert run.options["mode"] == "online"
    assert run.options["config"]["seed"] == 7
    assert run.options["dir"] == str(folder.path)
    assert run.logged == [(20, {"train/loss": 2.5}), (20, {"samples": ("picture", (4, 5, 3))})]
    assert run.exit_code == 0


def test_wandb_resumed_runs_keep_their_id(folder, wandb, tmp_path):
    for step in (0, 20):
        open_loggers(config_of(WANDB), folder, step).close()
    other = RunFolder(tmp_path / "other")
    other.path.mkdir()
    open_loggers(config_of(WANDB), other, 0).close()
    first, resumed, different = (run.options["id"] for run in wandb.runs)
    assert first == resumed == (folder.path / "wandb_id").read_text()
    assert different != first
    assert [run.options["resume"] for run in wandb.runs] == ["allow"] * 3


def fail_in(loggers):
    with loggers:
        raise RuntimeError("diverged")


def test_wandb_marks_a_run_that_failed(folder, wandb):
    with pytest.raises(RuntimeError, match="diverged"):
        fail_in(open_loggers(config_of(WANDB), folder, 0))
    assert wandb.runs[0].exit_code == 1


def test_wandb_without_a_network_goes_offline_with_a_note(folder, wandb, capsys):
    wandb.settings.base_url = "https://unreachable.example"
    open_loggers(config_of(WANDB), folder, 0).close()
    assert [run.options["mode"] for run in wandb.runs] == ["offline"]
    printed = capsys.readouterr().err
    assert "https://unreachable.example does not answer" in printed
    assert "WANDB_MODE=offline is chosen" in printed
    assert "wandb sync" in printed


def test_wandb_without_an_account_goes_offline_with_a_note(folder, wandb, capsys):
    start = wandb.init

    def refuse(**options):
        if options["mode"] == "online":
            raise wandb.errors.Error("No API key configured.\nmore lines")
        return start(**options)

    wandb.init = refuse
    open_loggers(config_of(WANDB), folder, 0).close()
    assert [run.options["mode"] for run in wandb.runs] == ["offline"]
    assert "No API key configured; WANDB_MODE=offline is chosen" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_wandb_mode_of_the_user_decides(folder, wandb, monkeypatch, capsys, mode):
    monkeypatch.setenv("WANDB_MODE", mode)
    open_loggers(config_of(WANDB), folder, 0).close()
    assert [run.options["mode"] for run in wandb.runs] == [mode]
    assert capsys.readouterr().err == ""


def test_wandb_that_is_not_installed_names_the_extra(folder, monkeypatch):
    hide(monkeypatch, "wandb")
    with pytest.raises(ModuleNotFoundError) as error:
        open_loggers(config_of(WANDB), folder, 0)
    assert "pip install 'eqvision[wandb]'" in str(error.value)
    assert "--log.wandb" in str(error.value)


def answers(monkeypatch, error):
    def urlopen(url, timeout):
        if error is not None:
            raise error
        import contextlib

        return contextlib.nullcontext()

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return loggers_module._reachable("https://wandb.example")


def test_a_server_that_answers_with_an_error_is_reachable(monkeypatch):
    assert answers(monkeypatch, None)
    assert answers(monkeypatch, urllib.error.HTTPError("https://wandb.example", 404, "none", {}, None))
    assert not answers(monkeypatch, urllib.error.URLError("no route"))
    assert not answers(monkeypatch, TimeoutError())
