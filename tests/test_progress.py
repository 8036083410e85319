"""The progress line, by a clock that the tests turn."""

import sys

import jax
import pytest

from eqvision import progress as progress_module
from eqvision.profiling import Cost
from eqvision.progress import Progress, duration_text

ROW = {"train/loss": 1.25, "train/learning_rate": 3e-3, "train/grad_norm": 0.5, "train/epoch": 1.0}


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

    monkeypatch.setattr(progress_module.time, "perf_counter", lambda: Clock.now)
    return Clock


def test_timing_is_measured_and_stays_out_of_the_row(clock):
    with Progress(0, 100, batch_size=8) as progress:
        row = dict(ROW)
        clock.now += 4.0
        returned = progress.update(10, row, waited=1.0)
        assert returned is row
        assert row == ROW
        assert progress.timing["time/step_seconds"] == pytest.approx(0.4)
        assert progress.timing["time/examples_per_second"] == pytest.approx(20.0)
        assert progress.timing["time/data_wait"] == pytest.approx(0.25)
        assert progress.timing["memory/host_gib"] > 0
        assert not set(progress.timing) & set(row)
        clock.now += 1.0
        progress.update(20, row, waited=1.0)  # all of it: nothing more since the last row
        assert progress.timing["time/data_wait"] == 0
        assert progress.timing["time/step_seconds"] == pytest.approx(0.1)


def test_the_line_shows_everything(clock, capsys):
    with Progress(0, 200, batch_size=8, cost=Cost(flops=4e12, peak=1e14)) as progress:
        clock.now += 10.0
        progress.update(50, ROW, waited=0.5)
    line = capsys.readouterr().err
    for part in ("step 50/200", "25%", "ETA 0:30", "loss 1.2500", "40 examples/s", "data wait 5%", "lr 3.00e-03"):
        assert part in line, part
    assert "grad 0.50" in line
    assert "GiB" in line
    assert "MFU 20.0%" in line  # 4e12 in 0.2 s, of 1e14 per second


def test_waiting_before_the_first_step_counts_in_no_row(clock):
    with Progress(0, 200, batch_size=8, waited=30.0) as progress:
        clock.now += 10.0
        progress.update(50, ROW, waited=31.0)
        assert progress.timing["time/data_wait"] == pytest.approx(0.1)


@pytest.mark.parametrize("cost", [None, Cost(flops=4e12, peak=None)])
def test_unknown_devices_show_no_mfu(clock, capsys, cost):
    with Progress(0, 200, batch_size=8, cost=cost) as progress:
        clock.now += 10.0
        progress.update(50, ROW, waited=0.5)
        assert "time/mfu" not in progress.timing
    assert "MFU" not in capsys.readouterr().err


def test_a_resumed_run_counts_from_its_first_step(clock, capsys):
    with Progress(100, 200, batch_size=8) as progress:
        clock.now += 10.0
        progress.update(110, ROW, waited=0.0)
    line = capsys.readouterr().err
    assert "step 110/200" in line
    assert "ETA 1:30" in line


def test_time_of_an_evaluation_counts_in_no_step(clock, capsys):
    with Progress(0, 200, batch_size=8) as progress:
        clock.now += 1.0
        progress.update(10, ROW, waited=0.0)
        clock.now += 60.0
        progress.note(10, {"accuracy": 0.5, "loss": 2.0, "other": 1.0}, "accuracy")
        clock.now += 1.0
        progress.update(20, ROW, waited=0.0)
        assert progress.timing["time/step_seconds"] == pytest.approx(0.1)
    assert "step 10: test/accuracy 0.5000  test/loss 2.0000" in capsys.readouterr().err


def test_memory_is_that_of_the_fullest_device(clock, capsys, monkeypatch):
    class Device:
        def __init__(self, peak):
            self.peak = peak

        def memory_stats(self):
            return {"peak_bytes_in_use": self.peak}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device(2**30), Device(3 * 2**30)])
    with Progress(0, 200, batch_size=8) as progress:
        clock.now += 1.0
        progress.update(10, ROW, waited=0.0)
        assert progress.timing["memory/device_gib"] == 3.0
    assert "device 3.0 GiB" in capsys.readouterr().err


def test_a_terminal_gets_one_moving_line_with_the_same_values(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    with Progress(0, 200, batch_size=8) as progress:
        clock.now += 10.0
        progress.update(50, ROW, waited=0.5)
        progress._bar.refresh()
    shown = capsys.readouterr().err
    for part in ("50/200", "25%", "ETA", "loss 1.2500", "40 examples/s", "data wait 5%"):
        assert part in shown, part


def test_only_the_first_process_prints(clock, capsys, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with Progress(0, 200, batch_size=8) as progress:
        clock.now += 1.0
        progress.update(10, ROW, waited=0.0)
        progress.note(10, {"accuracy": 0.5}, "accuracy")
        assert progress.timing["time/step_seconds"] == pytest.approx(0.1)
    assert capsys.readouterr().err == ""


def test_durations():
    assert [duration_text(s) for s in (5, 65.9, 3600, 90061)] == ["0:05", "1:05", "1:00:00", "25:01:01"]
