"""How processes find each other, and what a run of several does: the same as a run of one."""

import csv
import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
from toy import write_npz

from eqvision.distributed import (
    Explicit,
    check_same,
    explicit_flags,
    find_launcher,
    initialise,
    is_main_process,
    main_first,
    on_main,
)
from eqvision.recipes import MeshConfig

TESTS = Path(__file__).parent
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
OPEN_MPI_4 = {**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}
TPU_POD = {**KUBERNETES, "TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "2"}


# Who this process is


@pytest.mark.parametrize(
    ("environment", "method"),
    [
        ({}, None),
        (SLURM, "slurm"),
        ({**SLURM, "SLURM_NTASKS": "1"}, None),
        ({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "8"}, None),  # the shell of salloc, outside srun
        (OPEN_MPI_4, "ompi"),
        ({**SLURM, **OPEN_MPI_4}, "ompi"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1"}, None),
        (TPU_POD, "gketpu"),
        ({**TPU_POD, "TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({**TPU_POD, "TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, "gketpu"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a pod that is no part of an indexed job
    ],
)
def test_a_launcher_is_used_only_where_it_started_several_processes(environment, method):
    launcher = find_launcher(environment)
    assert (launcher and launcher.method) == method


def test_the_names_of_launchers_are_those_of_jax():
    """``cluster_detection_method`` takes names that its documentation does not list in full."""
    from jax._src.clusters import ClusterEnv

    from eqvision.distributed import LAUNCHERS

    assert {each.method for each in LAUNCHERS} - {None} <= {each.name for each in ClusterEnv._cluster_types}


def test_a_launcher_that_lacks_something_says_the_way_out(monkeypatch):
    with pytest.raises(
        ValueError, match=r"Open MPI 5 .* add --mesh\.coordinator HOST:PORT, .* or .* none to run alone"
    ):
        find_launcher(OPEN_MPI)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"`kubernetes`.* is not installed: pip install 'jax\[k8s\]', or give --mesh"):
        find_launcher(KUBERNETES)


def test_flags_alone_say_who_this_is():
    config = MeshConfig(coordinator="node1:1234", num_processes=4, process_id=3)
    assert explicit_flags(config, {}) == Explicit("node1:1234", 4, 3, None)
    assert explicit_flags(MeshConfig(), SLURM) is None


def test_the_launcher_fills_in_what_the_flags_leave_out():
    config = MeshConfig(coordinator="node1:1234")
    assert explicit_flags(config, OPEN_MPI) == Explicit("node1:1234", 4, 2, [0])
    assert explicit_flags(config, SLURM) == Explicit("node1:1234", 8, 3, [1])
    assert explicit_flags(config, {**SLURM, "JAX_LOCAL_DEVICE_IDS": "0,1"}).local_devices is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(num_processes=2), "--mesh.num-processes 2 need --mesh.coordinator HOST:PORT"),
        (MeshConfig(process_id=0), "--mesh.process-id 0 need --mesh.coordinator HOST:PORT, .* which is empty"),
        (MeshConfig(coordinator="none", num_processes=2, process_id=1), "--mesh.process-id 1 need .* which is none"),
        (MeshConfig(coordinator="localhost"), "--mesh.coordinator localhost is not HOST:PORT; .* such as node1:12345"),
        (MeshConfig(coordinator="localhost:x"), "--mesh.coordinator localhost:x is not HOST:PORT"),
        (MeshConfig(coordinator="localhost:70000"), "localhost:70000 is not HOST:PORT"),
        (MeshConfig(coordinator="h:1", process_id=0), "--mesh.num-processes 0 with .* h:1; expected the number"),
        (MeshConfig(coordinator="h:1", num_processes=2), "--mesh.process-id -1 with .* h:1; expected 0 to 1, another"),
        (MeshConfig(coordinator="h:1", num_processes=2, process_id=2), "--mesh.process-id 2 .*; expected 0 to 1"),
    ],
)
def test_flags_of_which_some_are_missing_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        explicit_flags(config, {})


def test_alone_nothing_happens(monkeypatch):
    def fail(*arguments, **options):
        raise AssertionError("connected")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    for name in (*SLURM, *OPEN_MPI_4, *TPU_POD):
        monkeypatch.delenv(name, raising=False)
    initialise(MeshConfig())
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    initialise(MeshConfig(coordinator="none"))


def test_what_jax_is_told(monkeypatch):
    """JAX's own reading of SLURM is taken by name; explicit flags switch every reading of the environment off."""
    told = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **options: told.append((given, options)))
    monkeypatch.setattr("eqvision.distributed.meet", lambda *given: told.append(given))
    for name in (*OPEN_MPI_4, *TPU_POD):
        monkeypatch.delenv(name, raising=False)
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    initialise(MeshConfig(), timeout_seconds=7)
    assert told == [((None,) * 4, {"cluster_detection_method": "slurm", "initialization_timeout": 7})]
    told.clear()
    initialise(MeshConfig(coordinator="node1:1234"), timeout_seconds=7)
    options = {"cluster_detection_method": "deactivate", "initialization_timeout": 7}
    assert told == [("node1:1234", 8, 3, 7), (("node1:1234", 8, 3, [1]), options)]


# Together


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def test_alone_every_helper_just_runs():
    assert is_main_process()
    assert main_first(lambda: 3) == 3
    seen = []
    on_main(lambda: seen.append(1))
    assert seen == [1]
    check_same("the configuration", "a")
    with pytest.raises(ZeroDivisionError):
        main_first(lambda: 1 / 0)


def run_processes(count, devices, arguments, *, timeout=300, **variables):
    """``python ARGUMENTS ADDRESS COUNT ID`` so many times at once; exit codes and outputs."""
    address = f"localhost:{free_port()}"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_", "TPU_"))},
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "EQVISION_ALLOCATOR": "default",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
        **variables,
    }
    running = [
        subprocess.Popen(
            [sys.executable, *arguments(address, count, index)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(count)
    ]
    outputs, hung = [], []
    for index, process in enumerate(running):
        try:
            outputs.append(process.communicate(timeout=timeout)[0])
        except subprocess.TimeoutExpired:  # its output says where: multiprocess_train.py dumps its stack before that
            process.kill()
            outputs.append(process.communicate()[0])
            hung.append(index)
    assert not hung, f"processes {hung} did not end in {timeout} s\n" + "\n".join(outputs)
    return [process.returncode for process in running], outputs


def run_script(script, count, devices=2):
    text = textwrap.dedent(script)
    return run_processes(count, devices, lambda address, n, index: ["-c", text, address, str(n), str(index)])


START = """
import sys
from eqvision.distributed import check_same, initialise, is_main_process, main_first, on_main
from eqvision.recipes import MeshConfig
from toy import write_npz
address, count, index = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
initialise(MeshConfig(coordinator=address, num_processes=count, process_id=index), timeout_seconds=60)
"""


@pytest.mark.slow
def test_what_processes_do_together(tmp_path):
    script = f"""
    import jax, pathlib
    folder = pathlib.Path({str(tmp_path)!r})
    initialise(MeshConfig())  # connected already
    assert (jax.process_count(), jax.process_index(), len(jax.devices())) == (3, index, 6)
    assert is_main_process() == (index == 0)
    def create():
        if index == 0:
            assert not folder.joinpath("made").exists()
            folder.joinpath("made").write_text("by process 0")
        return folder.joinpath("made").read_text()
    assert main_first(create) == "by process 0"
    on_main(lambda: folder.joinpath("alone").write_text(str(index)))
    assert folder.joinpath("alone").read_text() == "0"
    check_same("the configuration", "equal")
    try:
        check_same("the configuration", f"other {{index // 2}}")
        raise AssertionError("not noticed")
    except ValueError as error:
        assert str(error).startswith("the configuration of process 2 differs from that of process 0"), error
    try:
        main_first(lambda: 1 / 0 if index == 0 else None)
        raise AssertionError("not noticed")
    except (ZeroDivisionError, RuntimeError) as error:
        print(f"{{index}} {{type(error).__name__}} {{error}}")
    """
    codes, outputs = run_script(START + textwrap.dedent(script), 3)
    assert codes == [0, 0, 0], outputs
    assert "0 ZeroDivisionError division by zero" in outputs[0]
    expected = "RuntimeError process 0 failed, so process {} of 3 ends: ZeroDivisionError: division by zero"
    for index in (1, 2):
        assert f"{index} {expected.format(index)}" in outputs[index]


@pytest.mark.slow
def test_a_sharded_step_over_processes_equals_one_process(tmp_path):
    """Two and four processes of four devices in all, data 2 x fsdp 2, against this process."""
    from multiprocess_step import digest, train_steps

    expected = train_steps(jax.devices()[:4])
    script = f"""
    import jax, numpy as np
    from multiprocess_step import train_steps
    losses, params = train_steps(jax.devices())
    if is_main_process():
        np.savez({str(tmp_path / "out.npz")!r}, losses, *params)
    """
    for count in (2, 4):
        codes, outputs = run_script(START + textwrap.dedent(script), count, devices=4 // count)
        assert codes == [0] * count, outputs
        with np.load(tmp_path / "out.npz") as stored:
            losses, *params = (stored[name] for name in stored.files)
        np.testing.assert_allclose(losses, expected[0], rtol=1e-6)
        assert len(params) == len(expected[1])
        for actual, leaf in zip(params, expected[1], strict=True):
            assert np.max(np.abs(actual - leaf)) <= 1e-6
    assert digest(expected[1]) != digest(train_steps(jax.devices()[:4], steps=1)[1])


# A run (R3): 1 -> 2 -> 1 processes


def run_stage(folder, npz, epochs, processes, *, fsdp=1, more=()):
    """Train to ``epochs`` with four devices in all, by the command line with ``more`` options."""
    ids = folder / "ids"
    ids.mkdir(parents=True, exist_ok=True)
    options = (
        "train arrays --model.name resnet20_cifar --model.image-size 8 --model.in-channels 1 --data.transform digits "
        "--schedule.kind constant --schedule.warmup-steps 0 --optimizer.name sgd --optimizer.learning-rate 0.002 "
        "--optimizer.weight-decay 1e-3 --loop.batch-size 16 --loop.eval-batch-size 16 --loop.log-every 1 "
        f"--checkpoint.keep-last 9 --allow-config-change --loop.epochs {epochs} --mesh.fsdp {fsdp}"
    ).split()
    options += ["--out", str(folder / "run"), "--data.path", str(npz), *map(str, more)]

    def command(address, count, index):
        mesh = f"--mesh.coordinator {address} --mesh.num-processes {count} --mesh.process-id {index}".split()
        return [str(TESTS / "multiprocess_train.py"), *options, *(mesh if count > 1 else [])]

    codes, outputs = run_processes(processes, 4 // processes, command, EQVISION_TEST_IDS=str(ids))
    assert codes == [0] * processes, "\n".join(outputs)
    return outputs


def ids_by_step(folder, last):
    """Step -> ids of the whole batch; a later stage's reading replaces what an earlier one read ahead."""
    found: dict[int, list[int]] = {}
    files = sorted((folder / "ids").iterdir(), key=lambda file: tuple(map(int, file.stem.split("-"))))
    for start in sorted({int(file.stem.split("-")[0]) for file in files}):
        parts = [read_lines(file) for file in files if file.stem.startswith(f"{start}-")]
        for step in range(start + 1, min(map(max, parts)) + 1):
            found[step] = [index for part in parts for index in part[step]]
    return {step: found[step] for step in range(1, last + 1)}


def read_lines(file):
    return {line["step"]: line["ids"] for line in map(json.loads, file.read_text().splitlines())}


def parameters_of(folder):
    """Name -> array of the newest checkpoint, without eqvision's own reader."""
    import orbax.checkpoint as ocp

    newest = max((folder / "run" / "checkpoints").iterdir(), key=lambda path: int(path.name))
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        shapes = reader.metadata(newest / "state").item_metadata.tree
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # and not on the devices that wrote it
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), shapes)
        tree = reader.restore(newest / "state", args=ocp.args.StandardRestore(like))
    leaves = jax.tree_util.tree_leaves_with_path(tree["model"])
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def metrics_of(folder):
    with (folder / "run" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 2])
def test_a_run_moves_between_one_process_and_two(fsdp, tmp_path):
    npz = write_npz(tmp_path / "toy.npz")
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    run_stage(whole, npz, 3, 1, fsdp=fsdp)
    for epochs, processes in ((1, 1), (2, 2), (3, 1)):
        outputs = run_stage(moved, npz, epochs, processes, fsdp=fsdp)
        for other in outputs[1:]:
            assert "test/accuracy" not in other  # the first process alone prints results
    check_equal_runs(moved, whole)


@pytest.mark.slow
def test_four_processes_train_as_one(tmp_path):
    npz = write_npz(tmp_path / "toy.npz")
    whole, split = tmp_path / "whole", tmp_path / "split"
    run_stage(whole, npz, 1, 1)
    run_stage(split, npz, 1, 4)
    check_equal_runs(split, whole)


@pytest.mark.slow
def test_two_processes_begin_with_a_run_and_learn_from_it(tmp_path):
    npz, first = write_npz(tmp_path / "toy.npz"), tmp_path / "first"
    run_stage(first, npz, 1, 1)
    more = ("--init", first / "run", "--distill.teacher", first / "run", "--distill.weight", 0.5)
    whole, split = tmp_path / "whole", tmp_path / "split"
    run_stage(whole, npz, 1, 1, more=more)
    run_stage(split, npz, 1, 2, more=more)
    check_equal_runs(split, whole)


def check_equal_runs(actual, expected):
    rows, expected_rows = metrics_of(actual), metrics_of(expected)
    assert ids_by_step(actual, len(rows)) == ids_by_step(expected, len(rows))
    assert [row["step"] for row in rows] == [row["step"] for row in expected_rows]
    for row, wanted in zip(rows, expected_rows, strict=True):
        for name in ("train/loss", "test/loss", "test/accuracy"):  # the 20 test examples count once each
            assert bool(row[name]) == bool(wanted[name])
            assert float(row[name] or 0) == pytest.approx(float(wanted[name] or 0), rel=1e-5)
    parameters, wanted = parameters_of(actual), parameters_of(expected)
    assert parameters.keys() == wanted.keys()
    for name, leaf in parameters.items():
        assert np.max(np.abs(leaf - wanted[name])) <= 1e-6, name
