"""The input-pipeline benchmark at toy size: what it generates, measures and writes."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import input_pipeline, input_report
from benchmarks.input_pipeline import Job, Result, Wait

TOY = ["--images", "8", "--long-side", "80", "--image-size", "16", "--batch", "4", "--batches", "2", "--repeats", "1"]


@pytest.fixture
def options(tmp_path):
    input_pipeline.write_images(tmp_path / "jpegs", 8, 80)
    return input_pipeline.parse([*TOY, "--data", str(tmp_path / "jpegs")])


def result(*speeds, others=0.0):
    return Result(1.0, list(speeds), [0.002] * len(speeds), [others] * len(speeds))


def test_images_are_like_photographs(tmp_path):
    mean_bytes = input_pipeline.write_images(tmp_path, 4, 500)
    assert 40_000 < mean_bytes < 70_000
    shapes = {Image.open(file).size for file in tmp_path.glob("*/*.jpg")}
    assert shapes == {(500, 375), (375, 500)}


@pytest.mark.parametrize("decoder", ["pillow", "fast"])
def test_ours_is_measured(options, decoder):
    if decoder == "fast":
        pytest.importorskip("cv2")
    measured = input_pipeline.measure(Job("eqvision", decoder, 1, 0), options)
    assert len(measured.images_per_s) == len(measured.cpu_s) == len(measured.others) == 1
    assert min(*measured.images_per_s, measured.start_s) > 0


@pytest.mark.parity
def test_torch_is_measured(options):
    measured = input_pipeline.measure(Job("torch", "pillow", 0, 0), options)
    assert measured.images_per_s[0] > 0


@pytest.mark.parity
def test_torch_regions_are_like_ours():
    import torch

    from eqvision.data.transforms import random_region

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    theirs = np.array([input_pipeline.torch_region(500, 375) for _ in range(3000)])[:, [1, 0, 3, 2]]
    ours = np.array([random_region((375, 500), rng) for _ in range(3000)])
    np.testing.assert_allclose(theirs.mean(axis=0), ours.mean(axis=0), rtol=0.05)
    np.testing.assert_allclose(theirs.std(axis=0), ours.std(axis=0), rtol=0.05)


def test_wait_for_data(options):
    wait = input_pipeline.measure_wait(options)
    assert 0 <= wait.wait_share <= 1
    assert wait.steps == 2
    assert min(wait.stream_s, wait.step_s) > 0


def test_other_batches_are_refused(options):
    with pytest.raises(
        RuntimeError, match=r"shape \(4, 8, 8, 3\) and type float32; expected \(4, 16, 16, 3\) and uint"
    ):
        input_pipeline.check_batch((np.zeros((4, 8, 8, 3), np.float32),), options)


def test_failing_process_is_reported(options, tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)loader='eqvision'.* exited with 1:\n.*nowhere"):
        input_pipeline.run_process(Job("eqvision", "pillow", 0, 0), options, tmp_path / "nowhere")


def test_tables(tmp_path, capsys):
    out = tmp_path / "table.md"
    only = ["--only", "eqvision pillow, 1 threads", "--no-wait-share", "--wait", "0"]
    input_pipeline.main([*TOY, *only, "--rounds", "1", "--out", str(out)])
    with out.with_suffix(".csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["loader"], row["threads"], row["workers"], row["windows"]) == ("eqvision", "1", "0", "1")
    assert row["command"].startswith("python benchmarks/input_pipeline.py --images 8")
    assert "| eqvision | pillow | 1 threads |" in out.read_text()
    assert "eqvision pillow, 1 threads: " in capsys.readouterr().out


def test_ratios_and_disturbed_windows():
    results = {
        Job("eqvision", "pillow", 2, 0): [result(300.0, 310.0, 290.0), result(5.0, others=0.9)],
        Job("torch", "pillow", 0, 0): [result(100.0, 100.0, 100.0)],
        Job("torch", "pillow", 0, 2): [result(200.0, others=0.5)],
    }
    rows = [input_report.row(job, runs) for job, runs in results.items()]
    lines = input_report.markdown(rows).splitlines()
    assert lines[2] == "| eqvision | pillow | 2 threads | 300 ± 5 | 310 | 2.00 | 0 | 1.0 | 3.00 | 1.50 |"
    assert "| main thread | 100 ± 0 | 100 |" in lines[3]
    assert "| 2 workers | 200 ± 0 (disturbed) |" in lines[4]
    wait = input_report.wait_markdown([Wait(0.1, 0.15, 0.0123, 64)]).splitlines()
    assert wait[2] == "| 0.1000 | 0.1500 | 1.50 | 1.23 % | 64 |"
