"""``eqvision doctor``: what it says of this machine, and of machines that have something wrong."""

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from eqvision import cli, doctor
from eqvision.doctor import Finding

MIB = 2**20


def by_name(findings) -> dict[str, Finding]:
    assert len({finding.name for finding in findings}) == len(findings)
    return {finding.name: finding for finding in findings}


@pytest.fixture
def no_devices(monkeypatch):
    """Without the process that looks at devices, which has its own tests."""
    monkeypatch.setattr(doctor, "devices", lambda: [Finding("devices", "cpu", "1 x cpu")])


# The command


def test_the_table_of_this_machine(no_devices, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    cli.main(["doctor"])  # no exit code but 0
    printed = capsys.readouterr().out
    assert re.search(rf"^  jax +{re.escape(jax.__version__)}$", printed, re.MULTILINE)
    assert re.search(r"^  Pillow +\d+\.\d+.*jpeg", printed, re.MULTILINE)
    assert re.search(r"^  write speed +\d+ MB/s", printed, re.MULTILINE)
    assert re.search(r"^  XLA_FLAGS +--xla_cpu_enable_fast_math=false$", printed, re.MULTILINE)
    assert str(tmp_path) in printed
    assert "secret" not in printed
    assert printed.endswith("0 problems\n")
    assert list(tmp_path.iterdir()) == []  # the file of the speed test is gone


def test_json_says_the_same(no_devices, monkeypatch, capsys):
    findings = [Finding("disk", "a", "1"), Finding("disk", "b", "2", "mend it"), Finding("packages", "c", "3", "", "n")]
    monkeypatch.setattr(doctor, "examine", lambda *, workers: findings)
    for arguments in (["doctor", "--json"], ["doctor"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 1
    answer, text = capsys.readouterr().out.split("\n}\n")
    answer = json.loads(answer + "}")
    assert answer["problems"] == 1
    assert [Finding(**row) for row in answer["findings"]] == findings
    assert text.splitlines() == ["disk", "  a  1", "! b  2", "packages", "  c  3  (n)", "1 problem:", "  b: mend it"]


def test_workers_reach_the_check_of_shared_memory(no_devices, monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(doctor, "disk", lambda folder, workers: given.append((folder, workers)) or [])
    doctor.examine(tmp_path, workers=3)
    assert given == [(tmp_path, 3)]


# Packages


def test_required_versions_are_those_of_the_project():
    project = tomllib.loads((Path(doctor.__file__).parents[1] / "pyproject.toml").read_text())["project"]
    asked = dict(requirement.split(">=") for requirement in project["dependencies"])
    assert {**asked, "jaxlib": asked["jax"]} == doctor.REQUIRED
    assert project["requires-python"] == ">={}.{}".format(*doctor.PYTHON)


@pytest.mark.parametrize(("found", "good"), [("0.9.3", False), ("0.10", True), ("0.10.0.dev1", True), ("1.0", True)])
def test_an_old_package_is_a_problem(found, good, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found)
    finding = by_name(doctor.packages())["jax"]
    assert finding.value == found
    assert finding.problem == ("" if good else "needs 0.10 or newer: pip install -U 'jax>=0.10'")


def test_missing_packages(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = by_name(doctor.packages())
    assert found["optax"].problem == "needs 0.2.8 or newer: pip install -U 'optax>=0.2.8'"
    assert found["simplejpeg"].value == "not installed; fast JPEG decoding: pip install 'eqvision[fast]'"
    assert found["simplejpeg"].problem == ""


def test_either_package_of_opencv_counts(monkeypatch):
    def version(name):
        if name == "opencv-python":
            return "4.12"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert by_name(doctor.packages())["opencv-python-headless"].value == "4.12"


# Decoders


def test_decoders_of_this_machine():
    from PIL import features

    found = by_name(doctor.decoders())
    turbo = features.version("libjpeg_turbo") if features.check("libjpeg_turbo") else None
    assert (f"libjpeg-turbo {turbo}" if turbo else "not turbo") in found["Pillow"].value
    assert all(finding.problem == "" for finding in found.values())


def test_a_missing_decoder_is_no_problem_and_a_broken_one_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    [pillow, simplejpeg, _] = doctor.decoders()
    assert pillow.problem == ""
    assert simplejpeg == Finding("decoders", "simplejpeg", "not installed")

    def broken():
        raise ImportError("libGL.so.1: cannot open shared object file")

    monkeypatch.setattr(doctor, "_opencv", broken)
    opencv = doctor.decoders()[2]
    assert opencv.value == "broken: libGL.so.1: cannot open shared object file"
    assert opencv.problem == "install OpenCV anew, or what it misses"


def test_pillow_without_jpeg_is_a_problem(monkeypatch):
    monkeypatch.setattr("PIL.features.check", lambda name: False)
    assert doctor.decoders()[0] == Finding(
        "decoders", "Pillow", "broken: Pillow was built without JPEG", "install Pillow anew, or what it misses"
    )


# System


def test_memory_and_the_limit_of_a_container(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(
        "MemTotal: 16777216 kB\nMemFree: 1 kB\nMemAvailable: 8388608 kB\nHugePages: 0\n"
    )
    assert doctor._memory(tmp_path) == "16.0 GiB, 8.0 GiB available"
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert doctor._memory(tmp_path) == "16.0 GiB, 8.0 GiB available"
    (tmp_path / "sys/fs/cgroup/memory.max").write_text(f"{2**31}\n")
    assert doctor._memory(tmp_path) == "16.0 GiB, 8.0 GiB available, this container may use 2.0 GiB"
    assert doctor._memory(tmp_path / "elsewhere") == "unknown"


@pytest.mark.parametrize(("value", "note"), [("never", True), ("madvise", False), ("always", False)])
def test_huge_pages(value, note, tmp_path):
    file = tmp_path / "sys/kernel/mm/transparent_hugepage/enabled"
    file.parent.mkdir(parents=True)
    file.write_text("always madvise never\n".replace(value, f"[{value}]"))
    [finding] = doctor._huge_pages(tmp_path)
    assert (finding.value, bool(finding.note), finding.problem) == (value, note, "")
    assert doctor._huge_pages(tmp_path / "elsewhere") == []


# Disk


def with_free(monkeypatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=2**34, used=2**34 - free, free=free))


@pytest.mark.parametrize(
    ("free", "workers", "problem", "note"),
    [(64, 0, False, False), (64, 1, False, False), (63, 0, False, True), (63, 1, True, False), (100, 2, True, False)],
)
def test_shared_memory(free, workers, problem, note, monkeypatch, tmp_path):
    with_free(monkeypatch, free * MIB)
    [finding] = doctor._shared_memory(tmp_path, workers)
    assert (bool(finding.problem), bool(finding.note)) == (problem, note)
    assert finding.value == f"16.0 GiB, {free} MiB free"
    if problem:
        assert "--shm-size" in finding.problem
        assert "--data.num-workers 0" in finding.problem


def test_a_full_disk_is_a_problem(monkeypatch, tmp_path):
    with_free(monkeypatch, 2**30 - 1)
    found = by_name(doctor.disk(tmp_path, shared=tmp_path / "none"))
    assert f"choose another --out than {tmp_path}" in found["current folder"].problem
    assert found["current folder"].value == f"{tmp_path}: 1024 MiB of 16.0 GiB free"


def test_folders_that_cannot_be_written_are_problems(monkeypatch, tmp_path):
    monkeypatch.setenv("EQVISION_CACHE", str(tmp_path / "file" / "cache"))
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(doctor, "_space", lambda folder: Finding("disk", "current folder", ""))
    found = by_name(doctor.disk(tmp_path / "file", shared=tmp_path / "none"))
    assert found["write speed"].value.startswith(f"cannot write to {tmp_path / 'file'}: ")
    assert found["write speed"].problem == "choose another --out"
    assert found["cache folder"].problem == "set EQVISION_CACHE to a writable folder"


def test_a_cache_folder_that_does_not_exist_yet_is_not_made(monkeypatch, tmp_path):
    monkeypatch.setenv("EQVISION_CACHE", str(tmp_path / "a" / "b"))
    assert doctor._cache() == Finding("disk", "cache folder", str(tmp_path / "a" / "b"))
    assert list(tmp_path.iterdir()) == []


# Devices


def test_the_training_step_lowers_the_loss_and_a_device_that_does_not_is_a_problem(monkeypatch):
    device = jax.devices("cpu")[1]
    before, after = doctor.training_step(device)
    assert after < before
    assert re.match(r"finished in \d+\.\d s", doctor._step_row(device)["value"])
    monkeypatch.setattr(doctor, "training_step", lambda device: (1.0, float("nan")))
    assert doctor._step_row(device) == {"value": "loss 1.0000 -> nan", "problem": "the device computes wrong numbers"}


def test_a_step_that_fails_is_shown(monkeypatch):
    def fails(device):
        raise RuntimeError("CUDA_ERROR_OUT_OF_MEMORY\nand a long trace")

    monkeypatch.setattr(doctor, "training_step", fails)
    assert doctor._step_row(None)["value"] == "failed: CUDA_ERROR_OUT_OF_MEMORY"
    assert doctor._step_row(None)["problem"]


def test_devices_are_reported_by_another_process(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    found = by_name(doctor.devices())
    assert re.match(r"\d+ x cpu", found["cpu"].value)
    assert re.match(r"finished in \d+\.\d s", found["cpu training step"].value)
    assert all(finding.problem == "" for finding in found.values())


def answered(monkeypatch, code: int, out: str = "", error: str = "") -> list[Finding]:
    answer = subprocess.CompletedProcess([], code, out, error)
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: answer)
    return doctor.devices()


def test_a_process_that_dies_or_hangs_is_a_problem(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    [finding] = answered(monkeypatch, -6, error="F1 Unknown flag in XLA_FLAGS: --xla_no\n*** Check failure ***\n\n")
    assert finding.value == "does not start (exit code -6): F1 Unknown flag in XLA_FLAGS: --xla_no"
    assert finding.problem == "mend XLA_FLAGS"
    [finding] = answered(monkeypatch, 1, error="Traceback\nRuntimeError: no driver\n")
    assert finding.value == "does not start (exit code 1): RuntimeError: no driver"
    assert finding.problem == "try JAX_PLATFORMS=cpu"
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    [finding] = answered(monkeypatch, 1)
    assert finding.problem == "JAX_PLATFORMS=cuda does not work here; unset it"

    def hangs(*arguments, **options):
        raise subprocess.TimeoutExpired([], options["timeout"])

    monkeypatch.setattr(subprocess, "run", hangs)
    [finding] = doctor.devices()
    assert finding.value == "no answer in 300 s"
    assert "another process may hold the device" in finding.problem


def test_a_gpu_that_jax_does_not_see(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    cpu, gpu = Finding("devices", "cpu", "1 x cpu"), Finding("devices", "gpu", "1 x NVIDIA")
    [finding] = doctor._unused_gpu([cpu], driver=tmp_path)
    assert 'pip install -U "jax[cuda13]"' in finding.problem
    assert doctor._unused_gpu([cpu, gpu], driver=tmp_path) == []
    assert doctor._unused_gpu([cpu], driver=tmp_path / "none") == []
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    [finding] = doctor._unused_gpu([cpu], driver=tmp_path)
    assert (finding.problem, finding.note) == ("", "JAX_PLATFORMS hides the GPU from JAX")
